"""The commands `doctor`, `bench`, `verify` and `figure`, and wrong requests to them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from called_commands import answer_of, refusal_of
from glyphs_dataset import new_dataset
from PIL import Image

from metagmvae.evaluation.bench import loader_speed
from metagmvae.infra.cli import build_parser, main

COMMANDS = next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
"""Parsers by command name."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset large enough for 20-way episodes and for the loader benchmark."""
    return new_dataset(tmp_path_factory.mktemp("glyphs") / "data", (30, 24, 6), drawings=40, block=64, shard_rows=512)


def test_verify_lists_damage_and_exits_with_1(data, tmp_path):
    assert answer_of("verify", str(data))["problems"] == []
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "test" / "shard-000000.tar").unlink()
    answer = answer_of("verify", str(broken), code=1)
    assert [(row["kind"], row["file"]) for row in answer["problems"]] == [("missing", "test/shard-000000.tar")]
    assert "no dataset.json there" in refusal_of("verify", tmp_path / "nothing")


@pytest.mark.slow
def test_bench_episodes_and_loader(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loader_speed, "TRAINED_STEPS", 2)
    record = tmp_path / "bench.json"
    size = ["--data", str(data), "--split", "validation"]
    few = ["--episodes", "3", "--literal-episodes", "2", "--record", str(record)]
    answer = answer_of("bench", "episodes", *size, *few)
    assert all(row["processor_seconds_per_episode"] > 0 for row in answer["rows"])
    assert answer["largest_difference_in_accuracy"] == 0
    assert [row["episodes"] for row in answer["rows"]] == [2, 3]
    assert json.loads(record.read_text())["environment"]["versions"]["torch"]
    answer = answer_of("bench", "loader", *size, "--pictures", "800", "--repeats", "1")
    assert len(answer["rows"]) == 6
    assert all(row["samples_per_s"] > 0 for row in answer["rows"])
    assert set(answer["waiting_share_in_training"]) == {"memory", "mmap"}


def test_bench_features_and_prepare(tmp_path):
    answer = answer_of("bench", "features", "--rows", "3000")
    assert answer["rows"] == 3000
    assert all(answer[name] > 0 for name in answer if name.endswith("_rows_per_s"))
    for number in range(6):
        folder = tmp_path / "pictures" / f"class{number}"
        folder.mkdir(parents=True)
        Image.new("L", (28, 28), number).save(folder / "one.png")
    source = ["--from", "folder", "--source", str(tmp_path / "pictures")]
    answer = answer_of("bench", "prepare", *source, "--workers", "0")
    assert answer["images"] == 6
    assert [row["workers"] for row in answer["rows"]] == [0]
    assert answer["rows"][0]["images_per_s"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "loader"], "name it with --data"),
        (["bench", "step", "--repeats", "0"], "--repeats is 0"),
        (["bench", "loader", "--data", "DATA", "--split", "test", "--pictures", "900"], "holds 240"),
        (["bench", "episodes", "--data", "DATA", "--split", "test"], "way 20 exceeds the 6"),
        (["bench", "episodes", "--data", "DATA", "--split", "x"], "no split 'x'"),
        (["table", "nobody", "--results", "DATA"], "no result of 'nobody'; expected nobody-5way-1shot.json or similar"),
        (["table", "flip", "--results", "DATA"], "no result of 'flip'; did you mean 'flips'?"),
        (["table", "nobody", "--results", "DATA/none"], "/none: no such folder; give the folder of the files of eval"),
    ],
)
def test_wrong_request_is_one_error_line(data, words, message):
    assert message in refusal_of(*[word.replace("DATA", str(data)) for word in words])


@pytest.mark.ray
def test_doctor_reports_an_mlflow_server_that_is_down(tmp_path):
    """In a new process, because it starts a Ray cluster."""
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


def test_doctor_counts_the_registered_models_of_all_pages(monkeypatch):
    from metagmvae.infra.tracking import store
    from metagmvae.infra.workflows.doctor import CHECKS

    class Page(list):
        def __init__(self, items, token):
            super().__init__(items)
            self.token = token

    class Client:
        def search_registered_models(self, page_token=None):
            return Page(["b"], "") if page_token else Page(["a"] * 100, "next")

    monkeypatch.setattr(store, "connect", lambda tracking, create: store.Store(Client(), "sqlite:///x", None))
    result = CHECKS["mlflow store"]()
    assert result.state == "ok"
    assert result.found.endswith(", 101 registered models")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_description_an_example_and_a_text_for_every_argument(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"Example:\n  metagmvae {command}" in capsys.readouterr().out
    for action in COMMANDS[command]._actions:
        assert action.help, (command, action.dest)


def test_figure_writes_png_files(data, tmp_path):
    import mlflow_template

    run = mlflow_template.new_run(tmp_path / "run")
    answer = answer_of("figure", str(run), "--data", str(data), "--out", str(tmp_path / "figures"))
    names = {Path(file).name for file in answer["figures"]}
    assert names == {"reconstructions.png", "modes.png", "latents.png"}
    for file in answer["figures"]:
        with Image.open(file) as image:
            assert image.width > 300
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10
    assert main(["figure", str(run), "--data", str(data), "--split", "x", "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


def test_one_episode_has_no_interval_anywhere(data, tmp_path, capsys):
    import mlflow_template

    run = mlflow_template.new_run(tmp_path / "run")
    record, episodes = tmp_path / "one.json", tmp_path / "one.parquet"
    request = ["evaluate", str(run), "--data", str(data), "--episodes", "1"]
    answer = answer_of(*request, "--baselines", "--record", str(record), "--results", str(episodes))
    assert answer["ci95"] is None
    assert {row["ci95"] for row in answer["baselines"]} == {None}
    assert main(request) == 0
    assert "ci95: no interval" in capsys.readouterr().out
    page = tmp_path / "page.html"
    (row,) = answer_of("compare", str(record), "--html", str(page))["rows"]
    assert [result["ci95"] for result in row["results"]] == [None]
    assert "± 0.00" not in page.read_text()
    assert "ci95" not in (run / "evaluations.jsonl").read_text()
