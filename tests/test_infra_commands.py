"""Commands about the machine and about data, as a user types them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from metagmvae.evaluation.bench import loader_speed
from metagmvae.infra.cli import main
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs") / "data"
    write_dataset(open_source("glyphs", classes=(30, 24, 6), drawings=40), folder, block=64, shard_rows=512)
    return folder


def answer_of(capsys, *request: str, code: int = 0):
    capsys.readouterr()
    assert main([*request, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_verify_ends_with_one_when_there_is_damage(data, tmp_path, capsys):
    assert answer_of(capsys, "verify", str(data))["problems"] == []
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "test" / "shard-000000.tar").unlink()
    answer = answer_of(capsys, "verify", str(broken), code=1)
    assert [(row["kind"], row["file"]) for row in answer["problems"]] == [("missing", "test/shard-000000.tar")]
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert "no dataset.json there" in capsys.readouterr().err


def test_bench_episodes_and_loader_compare_like_with_like(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loader_speed, "TRAINED_STEPS", 2)
    record = tmp_path / "bench.json"
    size = ["--data", str(data), "--split", "validation"]
    few = ["--episodes", "3", "--literal-episodes", "2", "--record", str(record)]
    answer = answer_of(capsys, "bench", "episodes", *size, *few)
    assert answer["largest_difference_in_accuracy"] == 0
    assert [row["episodes"] for row in answer["rows"]] == [2, 3]
    assert json.loads(record.read_text())["environment"]["versions"]["torch"]
    answer = answer_of(capsys, "bench", "loader", *size, "--pictures", "800", "--repeats", "1")
    assert len(answer["rows"]) == 6
    assert all(row["samples_per_s"] > 0 for row in answer["rows"])
    assert set(answer["waiting_share_in_training"]) == {"memory", "mmap"}


def test_bench_features_and_prepare_come_to_an_end_and_count_what_they_wrote(tmp_path, capsys):
    answer = answer_of(capsys, "bench", "features", "--rows", "3000")
    assert answer["rows"] == 3000
    assert all(answer[name] > 0 for name in answer if name.endswith("_rows_per_s"))
    for number in range(6):
        folder = tmp_path / "pictures" / f"class{number}"
        folder.mkdir(parents=True)
        Image.new("L", (28, 28), number).save(folder / "one.png")
    source = ["--from", "folder", "--source", str(tmp_path / "pictures")]
    answer = answer_of(capsys, "bench", "prepare", *source, "--workers", "0")
    assert answer["images"] == 6
    assert [row["workers"] for row in answer["rows"]] == [0]
    assert answer["rows"][0]["images_per_s"] > 0


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (["bench", "loader"], "name it with --data"),
        (["bench", "step", "--repeats", "0"], "--repeats is 0"),
        (["bench", "loader", "--data", "DATA", "--split", "test", "--pictures", "900"], "holds 240"),
        (["bench", "episodes", "--data", "DATA", "--split", "test"], "20 ways were asked for and there are 6"),
        (["bench", "episodes", "--data", "DATA", "--split", "x"], "no split 'x'"),
        (["table", "nobody", "--results", "DATA"], "no result of 'nobody'"),
    ],
)
def test_wrong_requests(data, capsys, request_, reason):
    assert main([part.replace("DATA", str(data)) for part in request_]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


@pytest.mark.ray
def test_doctor_names_a_store_that_is_down_and_its_remedy(tmp_path):
    """In a process of its own: it starts a Ray cluster."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "metagmvae", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    checks = {row["check"]: row for row in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1, done.stderr
    assert checks["mlflow store"]["state"] == "wrong"
    assert "unset MLFLOW_TRACKING_URI" in checks["mlflow store"]["remedy"]
    assert checks["ray"]["state"] == "ok", checks["ray"]
    assert {"python", "packages", "device", "disk", "memory", "home folder"} <= checks.keys()
    assert list(tmp_path.iterdir()) == []


def test_figures_of_a_model_are_pictures(data, tmp_path, capsys):
    import mlflow_template

    run = mlflow_template.new_run(tmp_path / "run")
    answer = answer_of(capsys, "figure", str(run), "--data", str(data), "--out", str(tmp_path / "figures"))
    names = {Path(file).name for file in answer["figures"]}
    assert names == {"reconstructions.png", "modes-meta-training.png", "modes-meta-test.png", "latent-map.png"}
    for file in answer["figures"]:
        with Image.open(file) as picture:
            assert picture.width > 300
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10
    assert main(["figure", str(run), "--data", str(data), "--split", "x", "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()
