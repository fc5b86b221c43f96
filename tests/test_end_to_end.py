"""The commands as a user types them, in this process; the local engine without Ray and MLflow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_words import set_words, small_glyphs
from PIL import Image

from metagmvae.infra.cli import main
from metagmvae.pipelines.shards.dataset import Dataset

ROOT = Path(__file__).parents[1]
TINY = {
    "model.channels": 8,
    "model.width": 32,
    "model.latent": 8,
    "model.reconstruct": "features",
    "pretrain.steps": 4,
    "pretrain.batch": 16,
    "train.steps": 4,
    "train.set_size": 24,
    "train.samples": 4,
    "train.decode_samples": 2,
    "train.checkpoint_every": 2,
    "train.log_every": 2,
    "train.precision": "float32",
    "validation.every": 4,
    "validation.episodes": 5,
    "adapt.samples": 4,
    "tracking.enabled": "false",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_glyphs(tmp_path_factory.mktemp("glyphs") / "data")


def options(data, out, **more):
    settings = TINY | {"data.uri": data, "run.out": out} | more
    return set_words(settings)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    assert main(["train", "omniglot-cpu", *options(data, out), "--json"]) == 0
    return out


def test_a_run_leaves_its_settings_its_record_and_its_lines(run, data):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in lines] == [2, 4, 6, 8]
    assert {"validation/5w1s", "validation/5w5s"} <= lines[-1].keys()
    record = json.loads((run / "run.json").read_text())
    assert record["data_fingerprint"] == Dataset.open(data).fingerprint


def test_evaluate_prints_one_json_object_and_keeps_what_is_asked(run, data, tmp_path, capsys):
    capsys.readouterr()
    request = ["evaluate", str(run), "--data", str(data), "--way", "5", "--shot", "1", "--episodes", "4", "--json"]
    assert main([*request, "--results", str(tmp_path / "r.parquet"), "--record", str(tmp_path / "r.json")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"accuracy", "ci95", "way", "shot", "query", "episodes", "seed", "data", "model"} <= answer.keys()
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["accuracy"] == answer["accuracy"]
    assert kept["environment"]["versions"]["torch"]
    assert (tmp_path / "r.parquet").exists()


def test_several_ways_and_baselines_on_the_same_episodes(run, data, capsys):
    capsys.readouterr()
    size = ["--shot", "2", "--query", "3", "--episodes", "4", "--json"]
    assert main(["evaluate", str(run), "--data", str(data), "--ways", "2", "6", "--baselines", *size]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in answer["rows"]] == [2, 6]
    expected = [
        (way, name)
        for way in (2, 6)
        for name in (
            "nearest class mean",
            "logistic regression",
            "soft k-means",
            "EM on features, identity",
            "EM on features, diagonal",
            "nearest class mean, features unscaled",
            "logistic regression, features unscaled",
        )
    ]
    assert [(row["way"], row["baseline"]) for row in answer["baselines"]] == expected
    kept = {Path(file).name for file in answer["kept"]}
    assert kept >= {"test-2way-2shot-transductive.json", "test-6way-2shot-transductive.parquet"}
    assert {file.name for file in (run / "results").iterdir()} >= kept
    line = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert line["test/6w2s/transductive"] == answer["rows"][1]["accuracy"]
    assert main(["evaluate", str(run), "--data", str(data), "--ways", "2", "7"]) == 2
    assert "7 ways were asked for and there are 6 classes" in capsys.readouterr().err


def test_classify_names_images_on_disk(run, data, tmp_path, capsys):
    images = Dataset.open(data).images("test")
    for name in ("one", "two"):
        (tmp_path / "support" / name).mkdir(parents=True)
        Image.fromarray(images[len(name)][0]).save(tmp_path / "support" / name / "a.png")
    (tmp_path / "query").mkdir()
    Image.fromarray(images[9][0]).save(tmp_path / "query" / "q.png")
    request = ["classify", str(run), "--support", str(tmp_path / "support"), "--query", str(tmp_path / "query")]
    capsys.readouterr()
    assert main([*request, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["queries"]
    assert row["one"] + row["two"] == pytest.approx(1)
    assert row["class"] in ("one", "two")
    Image.fromarray(images[3][0]).save(tmp_path / "support" / "two" / "b.png")
    assert main([*request, "--figure", str(tmp_path / "seen.png"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["shots"] == [1, 2]
    with Image.open(answer["figure"]) as picture:
        assert picture.width > 200


def test_prepare_takes_a_folder_of_pictures_and_lists_what_it_left_out(tmp_path, capsys):
    for number in range(12):
        (tmp_path / "pictures" / f"c{number % 3}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(tmp_path / "pictures" / f"c{number % 3}" / f"{number}.png")
    (tmp_path / "pictures" / "c0" / "broken.png").write_bytes(b"not a picture")
    request = ["prepare", "folder", "--source", str(tmp_path / "pictures"), "--out", str(tmp_path / "out"), "--json"]
    assert main(request) == 2
    assert "1 of 13 images cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    request += ["--max-broken", "0.1", "--channels", "3", "--size", "16", "--fractions", "0.34", "0.33", "0.33"]
    assert main(request) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["samples"] == {"train": 4, "validation": 4, "test": 4}
    assert [skipped["name"] for skipped in answer["skipped"]] == ["c0/broken.png"]
    assert Dataset.open(tmp_path / "out").images("train").shape == (4, 3, 16, 16)
    assert main(["prepare", "glyphs", "--channels", "3", "--out", str(tmp_path / "glyphs")]) == 2
    assert "has no option 'channels'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (["prepare", "omniglot", "--source", "nowhere", "--out", "x"], "nowhere"),
        (["train", "omniglot-cpu", "--set", "train.step=1"], "did you mean 'steps'"),
        (["train", "omniglot-cpu", "--set", "data.uri=nowhere"], "no dataset.json there"),
        (["evaluate", "nowhere", "--data", "nowhere"], "nowhere"),
        (["classify", "nowhere", "--support", "a", "--query", "b"], "nowhere: no such model"),
        (["track", "nowhere"], "nowhere: not a run folder"),
        (["trian"], "invalid choice"),
        (["evaluate", "x", "--data", "y", "--way", "five"], "invalid int value"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(request_, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(request_)
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    assert code == 2
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not list(tmp_path.iterdir())


def test_a_run_folder_is_not_overwritten_and_resumes_only_what_it_was(run, data, capsys):
    assert main(["train", "omniglot-cpu", *options(data, run)]) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main(["train", "omniglot-cpu", *options(data, run, **{"train.seed": 5}), "--resume"]) == 2
    assert "train.seed: 5, 0" in capsys.readouterr().err


def test_the_local_engine_needs_neither_ray_nor_mlflow(data, tmp_path):
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow'): sys.modules[name] = None\n"
        "from metagmvae.infra.cli import main\n"
        "raise SystemExit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "train", "omniglot-cpu", *options(data, tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint.pt").exists()
