"""The commands from `prepare` to `classify` on a small run of the local engine."""

import json
from pathlib import Path

import pytest
from called_commands import answer_of, refusal_of
from command_words import TINY, set_words
from PIL import Image

from metagmvae.infra.cli import main
from metagmvae.infra.runs.run_folder import EVALUATIONS, METRICS, RECORD, RESULTS
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.package import load_model

SETTINGS = TINY | {"model.reconstruct": "features"}


def options(data, out, **more):
    settings = SETTINGS | {"data.uri": data, "run.out": out} | more
    return set_words(settings)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    assert main(["train", "omniglot-cpu", *options(data, out), "--json"]) == 0
    return out


def test_run_folder_has_metric_lines_and_a_record(run, data):
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [line["global_step"] for line in lines] == [2, 4, 6, 8]
    assert {"validation/5w1s", "validation/5w5s"} <= lines[-1].keys()
    record = json.loads((run / RECORD).read_text())
    assert record["data_fingerprint"] == Dataset.open(data).fingerprint
    preprocessing = Dataset.open(data).preprocessing
    assert record["preprocessing"] == preprocessing.model_dump(mode="json")
    assert load_model(run).preprocessing == preprocessing


def test_evaluate_prints_one_json_object_and_writes_the_requested_files(run, data, tmp_path):
    request = ["evaluate", run, "--data", data, "--way", 5, "--shot", 1, "--episodes", 4]
    answer = answer_of(*request, "--results", tmp_path / "r.parquet", "--record", tmp_path / "r.json")
    assert {"accuracy", "ci95", "way", "shot", "query", "episodes", "seed", "data", "model"} <= answer.keys()
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["accuracy"] == answer["accuracy"]
    assert record["environment"]["versions"]["torch"]
    assert record["dataset"]["name"] == "glyphs"
    assert record["encoder"]["trained"]["by"] == "the run of the model"
    assert (tmp_path / "r.parquet").exists()


def test_unbalanced_queries_are_recorded_and_not_stored_with_the_model(run, data, tmp_path):
    request = ["evaluate", run, "--data", data, "--query", 3, "--episodes", 4, "--baselines"]
    answer = answer_of(*request, "--unbalanced", "--record", tmp_path / "r.json")
    assert "kept" not in answer
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["unbalanced"]
    assert all(row["unbalanced"] for row in record["baselines"])


def test_evaluate_several_ways_with_baselines(run, data):
    size = ["--shot", 2, "--query", 3, "--episodes", 4]
    answer = answer_of("evaluate", run, "--data", data, "--ways", "2", "6", "--baselines", *size)
    assert [row["way"] for row in answer["rows"]] == [2, 6]
    expected = [
        (way, name)
        for way in (2, 6)
        for name in (
            "nearest class mean",
            "logistic regression",
            "soft k-means",
            "optimal transport",
            "Laplacian",
            "EM on features, identity",
            "EM on features, diagonal",
            "nearest class mean, features unscaled",
            "logistic regression, features unscaled",
        )
    ]
    assert [(row["way"], row["baseline"]) for row in answer["baselines"]] == expected
    assert [(row["way"], row["baseline"]) for row in answer["paired"]] == expected
    for row, pair in zip(answer["baselines"], answer["paired"], strict=True):
        result = next(result for result in answer["rows"] if result["way"] == row["way"])
        assert pair["difference"] == pytest.approx(result["accuracy"] - row["accuracy"])
        assert row["settings"].get("features", "scaled") in ("scaled", "unscaled")
        assert 0 <= row["validation_accuracy"] <= 1
    assert {row["split"] for row in answer["baseline_trials"]} == {"validation"}
    kept = {Path(file).name for file in answer["kept"]}
    assert kept >= {"test-2way-2shot-transductive.json", "test-6way-2shot-transductive.parquet"}
    assert {file.name for file in (run / RESULTS).iterdir()} >= kept
    line = json.loads((run / EVALUATIONS).read_text().splitlines()[-1])
    assert line["test/6w2s/transductive"] == answer["rows"][1]["accuracy"]
    assert "way 7 exceeds the 6 classes" in refusal_of("evaluate", run, "--data", data, "--ways", "2", "7")


def test_prepare_folder_lists_skipped_images(tmp_path):
    for number in range(12):
        (tmp_path / "images" / f"c{number % 3}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(tmp_path / "images" / f"c{number % 3}" / f"{number}.png")
    (tmp_path / "images" / "c0" / "broken.png").write_bytes(b"not an image")
    request = ["prepare", "folder", "--source", tmp_path / "images", "--out", tmp_path / "out"]
    assert "1 of 13 images cannot be" in refusal_of(*request)
    assert not (tmp_path / "out").exists()
    request += ["--max-broken", "0.1", "--channels", "3", "--size", "16", "--fractions", "0.34", "0.33", "0.33"]
    answer = answer_of(*request)
    assert answer["samples"] == {"train": 4, "validation": 4, "test": 4}
    assert [skipped["name"] for skipped in answer["skipped"]] == ["c0/broken.png"]
    assert Dataset.open(tmp_path / "out").images("train").shape == (4, 3, 16, 16)
    request = ["prepare", "glyphs", "--channels", "3", "--out", tmp_path / "glyphs"]
    assert "has no option 'channels'" in refusal_of(*request)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "omniglot", "--source", "nowhere", "--out", "x"], "nowhere"),
        (["train", "omniglot-cpu", "--set", "train.step=1"], "did you mean 'train.steps'"),
        (["train", "omniglot-cpu", "--set", "data.uri=nowhere"], "no dataset.json there"),
        (["evaluate", "nowhere", "--data", "nowhere"], "nowhere"),
        (["classify", "nowhere", "--support", "a", "--query", "b"], "nowhere: no such model"),
        (["track", "nowhere"], "nowhere: not a run folder"),
        (["trian"], "'trian' is no command; did you mean 'train'?"),
        (["evaluate", "x", "--data", "y", "--way", "five"], "invalid int value"),
    ],
)
def test_wrong_request_is_one_error_line_and_writes_nothing(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refusal_of(*words)
    assert not list(tmp_path.iterdir())


def test_run_folder_is_not_overwritten_and_resumed_only_with_its_settings(run, data):
    assert "continue with --resume" in refusal_of("train", "omniglot-cpu", *options(data, run))
    words = ["train", "omniglot-cpu", *options(data, run, **{"train.seed": 5}), "--resume"]
    assert "train.seed: 5, 0" in refusal_of(*words)
