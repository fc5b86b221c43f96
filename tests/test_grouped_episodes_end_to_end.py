"""Patients whose tint gives their class away: the default measures other patients, and every command draws so."""

import csv
import json

import numpy as np
import pytest
from command_words import TINY, set_words

import metagmvae
from metagmvae.infra.cli import main

CLASSES, PATIENTS, IMAGES = 5, 2, 15
"""Classes, patients of each class in each split, and images of each patient."""
SPLITS = ("train", "validation", "test")
SETTINGS = TINY | {"pretrain.steps": 0, "train.components": 4, "run.figures": "false"}
for key in ("pretrain.batch", "model.channels"):
    del SETTINGS[key]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pixels of 8 x 8 images in colour. The tint of a patient is strong, the pattern of a class weak."""
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(CLASSES, 8 * 8, 1))
    images, labels, patients, splits = [], [], [], []
    for split in SPLITS:
        for label in range(CLASSES):
            for patient in range(PATIENTS):
                tint = rng.normal(size=3)
                noise = rng.normal(size=(IMAGES, 8 * 8, 3))
                images.append(3 * tint + 0.25 * pattern[label] + 0.5 * noise)
                labels += [f"class{label}"] * IMAGES
                patients += [f"{split}{label}{patient}"] * IMAGES
                splits += [split] * IMAGES
    out = tmp_path_factory.mktemp("tinted") / "data"
    vectors = np.concatenate(images).reshape(len(labels), -1).astype(np.float32)
    metagmvae.prepare_vectors(vectors, labels, splits=splits, groups=patients, out=out)
    return out


@pytest.fixture
def answer(capsys):
    """Runs a command; returns its JSON answer."""

    def call(*words):
        code = main([*map(str, words), "--json"])
        out = capsys.readouterr().out
        assert code == 0, out
        return json.loads(out)

    return call


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    words = set_words(SETTINGS | {"data.uri": data, "run.out": out, "validation.query": 8, "validation.shots": [1]})
    assert main(["train", "vectors", *words, "--json"]) == 0
    return out


TASK = ("--shot", 5, "--query", 8, "--episodes", 60)


def test_the_default_is_the_accuracy_on_other_patients(data, answer):
    words = ("evaluate", "vectors", "--data", data, *TASK, "--head", "logistic-regression")
    apart, mixed = answer(*words), answer(*words, "--mix-groups")
    assert (apart["groups"], mixed["groups"]) == ("apart", "mixed")
    assert mixed["accuracy"] > 0.9
    assert apart["accuracy"] < 0.7
    assert apart["heads"] != []


@pytest.mark.parametrize(
    "kind", [("--queries", "dirichlet:0.5"), ("--unbalanced",), ("--baselines",), ("--mode", "inductive")]
)
def test_every_kind_of_queries_and_the_baselines_are_of_other_patients(data, run, answer, kind):
    words = ("evaluate", run, "--data", data, *TASK, *kind)
    apart, mixed = answer(*words), answer(*words, "--mix-groups")
    rows = {"model": (apart, mixed)}
    for name, other in zip(apart.get("baselines", []), mixed.get("baselines", []), strict=True):
        rows[name["baseline"]] = (name, other)
    for name, (honest, optimistic) in rows.items():
        assert (honest["groups"], optimistic["groups"]) == ("apart", "mixed")
        assert optimistic["accuracy"] > honest["accuracy"] + 0.05, name
    assert len(rows) == (1 if kind != ("--baselines",) else len(rows))


def test_stored_results_are_those_across_groups_and_compare_reuses_no_others(data, run, answer, capsys):
    words = ("--data", data, *TASK)
    apart = answer("evaluate", run, *words)
    assert "kept" in apart
    assert "kept" not in answer("evaluate", run, *words, "--mix-groups")
    stored = json.loads((run / "results" / "test-5way-5shot-transductive.json").read_text())
    assert (stored["groups"], stored["accuracy"]) == ("apart", apart["accuracy"])
    rows = {}
    for option in ((), ("--mix-groups",)):
        compared = answer("compare", run, "vectors", *words, *option)
        rows[option] = next(row for row in compared["rows"] if row["name"] == "first")
        assert len(compared["paired"]) == 1
    assert rows[()]["results"][0]["accuracy"] == apart["accuracy"]
    assert rows["--mix-groups",]["results"][0]["accuracy"] > apart["accuracy"] + 0.05
    assert (rows[()]["groups"], rows["--mix-groups",]["groups"]) == ("apart", "mixed")
    assert main(["compare", str(run), *map(str, words), "--mix-groups"]) == 0
    assert "mixed" in capsys.readouterr().out


def test_results_of_different_protocols_are_not_paired(data, run, answer, tmp_path):
    words = ("evaluate", "vectors", "--data", data, *TASK)
    for name, option in (("apart", ()), ("mixed", ("--mix-groups",))):
        answer(*words, *option, "--record", tmp_path / f"{name}.json", "--results", tmp_path / f"{name}.parquet")
    compared = answer("compare", tmp_path / "apart.json", tmp_path / "mixed.json")
    assert compared["paired"] == []
    assert "groups mixed, not apart" in str(compared)
    answer("compare", "paper:omniglot/meta-gmvae", tmp_path / "apart.json", "--csv", tmp_path / "rows.csv")
    lines = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert (lines[0]["groups"], lines[-1]["groups"]) == ("", "apart")
    assert main(["compare", str(tmp_path / "apart.json"), str(tmp_path / "mixed.json"), "--strict"]) == 2


def test_validation_calibration_and_open_queries_follow_the_groups(data, run, answer, tmp_path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    honest = [line["validation/5w1s"] for line in lines if "validation/5w1s" in line]
    words = set_words(SETTINGS | {"data.uri": data, "run.out": tmp_path / "mixed", "validation.query": 8})
    changes = set_words({"validation.shots": [1], "validation.mix_groups": "true"})
    answer("train", "vectors", *words, *changes)
    lines = [json.loads(line) for line in (tmp_path / "mixed" / "metrics.jsonl").read_text().splitlines()]
    assert len(honest) == 1
    assert next(line["validation/5w1s"] for line in lines if "validation/5w1s" in line) > honest[0]
    fitted = answer("calibrate", run, "--data", data, "--way", 3, "--shot", 5, "--episodes", 10, "--query", 8)
    assert {row["shot"] for row in fitted["temperatures"]} == {5}
    mixed = answer("calibrate", tmp_path / "mixed", "--data", data, "--way", 3, "--shot", 5, "--episodes", 10)
    for apart, other in zip(fitted["temperatures"], mixed["temperatures"], strict=True):
        assert apart["nll_uncalibrated"] > other["nll_uncalibrated"]
    opened = ("evaluate", run, "--data", data, "--way", 3, "--shot", 5, "--query", 8, "--episodes", 20, "--open", 2)
    rows = [answer(*opened, *option)["rows"] for option in ((), ("--mix-groups",))]
    for apart, other in zip(*rows, strict=True):
        assert (apart["groups"], other["groups"]) == ("apart", "mixed")
        assert other["accuracy"] > apart["accuracy"]


def test_calibration_is_lowered_to_what_the_groups_allow(data, run, capsys):
    words = ["calibrate", str(run), "--data", str(data), "--shot", "25", "--query", "16", "--episodes", "2"]
    assert main([*words, "--no-unknown"]) == 0
    said = capsys.readouterr().err
    assert "calibration with shot 15 instead of 25" in said
    assert "calibration with query 15 instead of 16" in said


def test_tasks_of_the_supervised_oracle_are_of_different_patients(data, answer, tmp_path, capsys):
    words = {"method.name": "protonets", "method.tasks": "labels", "method.network": "mlp", "method.way": 3}
    words |= {"method.shot": 2, "method.query": 4, "data.uri": data, "run.out": tmp_path / "oracle"}
    changes = set_words(SETTINGS | words | {"validation.query": 8, "validation.shots": [1]})
    answer("train", "vectors", *changes)
    assert main(["train", "vectors", *changes, "--set", "method.shot=21", "--set", f"run.out={tmp_path / 'no'}"]) == 2
    said = capsys.readouterr().err
    assert "method.way is 3, but only 0 classes of split 'train' have 21 and 4 images (method.shot and" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("evaluate", "vectors", "--shot", 5, "--query", 26), "shot 5 and query 26 need 31 images per class"),
        (("evaluate", "vectors", "--shot", 14, "--query", 16), "way 5 exceeds the 0 classes of the split that have 14"),
    ],
)
def test_what_the_groups_do_not_allow_is_one_line(data, capsys, words, reason):
    assert main([*map(str, words), "--data", str(data)]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert len(said.strip().splitlines()) == 1


def test_a_dataset_without_groups_has_none_to_mix(tmp_path, capsys):
    vectors = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    metagmvae.prepare_vectors(vectors, [str(n % 5) for n in range(100)], out=tmp_path / "data")
    words = [
        "evaluate",
        "vectors",
        "--data",
        str(tmp_path / "data"),
        "--split",
        "train",
        "--query",
        "5",
        "--mix-groups",
    ]
    assert main(words) == 2
    assert "mix_groups: the dataset has no groups; omit this option" in capsys.readouterr().err
