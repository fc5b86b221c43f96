"""Encoders alone on the command line: `encoder`, `features`, `evaluate`, `classify`, `compare`, wrong requests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from called_commands import answer_of, called
from PIL import Image

from metagmvae.evaluation.encoders.evaluate_encoders import evaluate_model
from metagmvae.evaluation.encoders.heads import HEADS
from metagmvae.evaluation.fewshot.paired import paired_difference
from metagmvae.infra.cli import main
from metagmvae.infra.registry.pyfunc_model import Predictor
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.workflows.estimator import FewShotClassifier
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset

timm = pytest.importorskip("timm")
NAME = "timm:test_resnet"
TASK = ["--way", "4", "--shot", "2", "--query", "5", "--episodes", "12"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def package(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "encoder"
    words = ["encoder", NAME, "--weights", str(weights), "--image-size", "32", "--data", str(data), "--out", str(out)]
    assert main(words) == 0
    return out


def test_evaluate_by_name_or_package_names_encoder_head_and_settings(
    data: Path, weights: Path, package: Path, tmp_path: Path
) -> None:
    by_package = answer_of("evaluate", package, "--data", data, "--head", "em", *TASK)
    options = ["--weights", weights, "--image-size", "32", "--record", tmp_path / "record.json"]
    by_name = answer_of("evaluate", NAME, "--data", data, "--head", "em", *TASK, *options)
    assert by_name["accuracy"] == by_package["accuracy"]
    assert (by_name["head"], by_name["mode"]) == ("em", "transductive")
    (row,) = by_name["heads"]
    assert (row["encoder"], row["head"], set(row["settings"])) == (NAME, "em", {"e_step", "temperature"})
    assert "kept" not in by_package
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["encoder"]["trained"]["weights"]["file"] == weights.name


def test_the_settings_of_a_head_are_the_best_on_validation_episodes(data: Path, package: Path) -> None:
    loaded, dataset = resolve_model(package), Dataset.open(data)
    task = {"way": 3, "shot": 1, "query": 5, "episodes": 20}
    (result,) = evaluate_model(loaded, dataset, [task], head="soft-k-means")
    assert result.tuning is not None
    best = max(result.tuning.trials, key=lambda trial: trial["accuracy"])
    assert result.tuning.settings == best["settings"]
    assert result.tuning.protocol["split"] == "validation"


@pytest.mark.parametrize("head", HEADS)
def test_probabilities_of_a_head_belong_to_its_accuracy(data: Path, package: Path, head: str) -> None:
    task = {"way": 3, "shot": 2, "query": 5, "episodes": 8}
    (result,) = evaluate_model(resolve_model(package), Dataset.open(data), [task], head=head)
    assert result.reliability is not None
    bins = result.reliability.summary()["bins"]
    right = sum(each["accuracy"] * each["queries"] for each in bins)
    assert right == pytest.approx(result.mean * sum(each["queries"] for each in bins))
    assert result.uncalibrated is None, "the encoder has no temperature"


def test_a_calibrated_encoder_is_evaluated_at_its_temperature(data: Path, package: Path, tmp_path: Path) -> None:
    words = ["--head", "nearest-mean", "--way", "4", "--shot", "2", "--query", "5", "--episodes", "10"]
    answer_of("calibrate", package, "--data", data, *words, "--out", tmp_path / "calibrated")
    plain = answer_of("evaluate", package, "--data", data, *TASK)
    calibrated = answer_of("evaluate", tmp_path / "calibrated", "--data", data, *TASK)
    assert calibrated["accuracy"] == plain["accuracy"]
    assert calibrated["temperature"] != 1
    assert calibrated["ece_uncalibrated"] == pytest.approx(plain["ece"])


def test_features_of_an_encoder_by_name(data: Path, weights: Path, package: Path, tmp_path: Path) -> None:
    """Its features are a data set that the package is evaluated on too, with the same accuracy as on images."""
    out = tmp_path / "features"
    words = ["--data", data, "--out", out, "--weights", weights, "--image-size", "32", "--dtype", "float32"]
    made = answer_of("features", NAME, *words)
    assert (made["encoder"]["encoder"], made["feature_size"]) == (NAME, resolve_model(package).model.feature_dim)
    on_features, on_images = (
        answer_of("evaluate", package, "--data", uri, "--head", "nearest-mean", *TASK) for uri in (out, data)
    )
    assert on_features["accuracy"] == pytest.approx(on_images["accuracy"], abs=0.02)


def write_images(data: Path, folder: Path) -> list[str | Path]:
    """2, 3 and 4 labelled images of three classes, and three queries of each."""
    dataset = Dataset.open(data)
    labels, images = dataset.labels("test"), dataset.images("test", "auto", 4096)
    for k, label in enumerate(np.unique(labels)[:3]):
        for j, row in enumerate(np.flatnonzero(labels == label)[: 5 + k]):
            part = folder / ("query" if j < 3 else f"support/class{k}")
            part.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(images[np.array([row])])[0, 0]).save(part / f"class{k}_{j}.png")
    return ["--support", folder / "support", "--query", folder / "query"]


@pytest.mark.parametrize("head", ["nearest-mean", "soft-k-means", "em"])
def test_classify_with_a_head(head: str, data: Path, package: Path, tmp_path: Path) -> None:
    folders = write_images(data, tmp_path)
    answer = answer_of("classify", package, *folders, "--head", head, "--data", data)
    assert answer["shots"] == [2, 3, 4]
    assert answer["calibrated"]
    assert (answer["head"]["name"], answer["head"]["encoder"]) == (head, NAME)
    assert answer["head"]["chosen_on"]["split"] == "validation"
    assert ("settings" in answer["head"]) == (head != "nearest-mean")
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in answer["queries"])
    right = sum(row["query"].startswith(row["class"]) for row in answer["queries"])
    assert right >= 5  # of 9, by chance 3: glyphs differ enough for random weights


def test_a_calibrated_encoder_is_used_by_classify_estimator_and_server(
    data: Path, package: Path, tmp_path: Path
) -> None:
    calibrated = tmp_path / "calibrated"
    shutil.copytree(package, calibrated)
    folders = write_images(data, tmp_path)
    plain = answer_of("classify", package, *folders, "--head", "em")
    assert not plain["calibrated"]
    assert plain["head"]["note"].startswith("defaults: no dataset")
    size = ["--way", "3", "--shot", "3", "--query", "5", "--episodes", "30"]
    fitted = answer_of("calibrate", calibrated, "--data", data, "--head", "em", *size)
    assert fitted["head"]["name"] == "em"
    (temperature,) = fitted["temperatures"]
    assert temperature["nll"] < temperature["nll_uncalibrated"]
    answer = answer_of("classify", calibrated, *folders)
    assert (answer["calibrated"], answer["head"]["name"], answer["mode"]) == (True, "em", "transductive")
    assert answer["head"]["settings"] == fitted["head"]["tasks"][0]["settings"]
    p_PK = np.array([list(row["probabilities"].values()) for row in answer["queries"]])

    support = sorted((tmp_path / "support").rglob("*.png"))
    queries = sorted((tmp_path / "query").iterdir())
    y = [path.parent.name for path in support]
    classifier = FewShotClassifier(calibrated, mode="transductive").fit(support, y)
    np.testing.assert_allclose(classifier.predict_proba(queries), p_PK, atol=1e-6)
    other = FewShotClassifier(calibrated, head="nearest-mean").fit(support, y)
    assert not np.allclose(other.predict_proba(queries), p_PK, atol=1e-3)

    predictor = Predictor()
    predictor.load_context(SimpleNamespace(artifacts={"package": str(calibrated)}))
    request = {"images": [path.read_bytes() for path in support + queries], "label": y + [None] * 9}
    np.testing.assert_allclose(predictor.predict(None, request), p_PK, atol=1e-6)
    del request["label"]
    assert predictor.predict(None, request).shape == (18, resolve_model(package).model.feature_dim)

    unknown = answer_of("classify", calibrated, *folders, "--unknown")
    assert set(unknown["predicted"]) == {"class0", "class1", "class2", "unknown"}
    assert all(len(row["probabilities"]) == 4 for row in unknown["queries"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "inductive", "head": "em"}, "the head em classifies queries together"),
        ({"head": "emm"}, "head 'emm': there is none of this name"),
        ({"samples": 3}, "samples: not for an encoder alone"),
    ],
)
def test_wrong_arguments_of_the_estimator(data: Path, package: Path, options: dict[str, Any], message: str) -> None:
    images = Dataset.open(data).images("test")[:4]
    with pytest.raises(DataError, match=message):
        FewShotClassifier(package, **options).fit(images, [0, 0, 1, 1])


def test_compare_shows_the_paired_difference_across_modes(
    data: Path, package: Path, weights: Path, tmp_path: Path
) -> None:
    other = ["--weights", weights, "--image-size", "48"]
    page = tmp_path / "page.html"
    answer = answer_of("compare", package, NAME, "--data", data, "--head", "em", *other, *TASK, "--html", page)
    first, second = answer["rows"]
    assert (first["name"], second["name"]) == (f"{package.name}, em", f"{NAME}, em")
    (pair,) = answer["paired"]
    assert {row["setting"].rpartition(" ")[2] for row in answer["settings"]} <= {
        "model.image_size",
        "e_step",
        "temperature",
    }
    assert ">over trainings</th>" not in page.read_text(), "one training of each"
    loaded = [resolve_model(package), resolve_model(NAME, weights=weights, image_size=48, dataset=Dataset.open(data))]
    task = {"way": 4, "shot": 2, "query": 5, "episodes": 12}
    ours, theirs = (evaluate_model(each, Dataset.open(data), [task], head="em")[0] for each in loaded)
    assert pair["difference"] == pytest.approx(paired_difference(theirs, ours).difference)


def test_wrong_requests_are_one_line_and_leave_nothing(
    data: Path, weights: Path, package: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "out"
    written = ["--data", data, "--out", out]
    on_data, folders = ["--data", data], ["--support", tmp_path, "--query", tmp_path]
    classify = ["classify", package, *write_images(data, tmp_path_factory.mktemp("images"))]
    opened = ["evaluate", package, "--open", "2", *on_data]
    for text, words in [
        ("nothing: not the name of an encoder", ["encoder", "nothing", *written]),
        ("has no published weights", ["encoder", "conv4", *written]),
        ("no such file", ["encoder", NAME, "--weights", "none.pth", *written]),
        ("does not fit the network", ["encoder", "resnet18", "--weights", weights, *written]),
        ("--image-size -1", ["features", NAME, "--weights", weights, "--image-size", "-1", *written]),
        ("already exists", ["encoder", NAME, "--weights", weights, *on_data, "--out", package]),
        ("--weights x: only for an encoder by name", ["evaluate", package, "--weights", "x", *on_data]),
        ("--image-size 32: only for", ["classify", package, "--image-size", "32", *folders]),
        ("--set adapt.iterations=3", ["evaluate", package, "--set", "adapt.iterations=3", *on_data]),
        ("--mode inductive: the head em", ["evaluate", package, "--head", "em", "--mode", "inductive", *on_data]),
        ("did you mean 'em'", ["evaluate", package, "--head", "emm", *on_data]),
        ("--open: the head optimal-transport", [*opened, "--way", "3", "--head", "optimal-transport"]),
        ("more than 6 validation classes", [*opened, "--way", "6", "--split", "train"]),
        ("--unknown: timm:test_resnet has no level", [*classify, "--unknown"]),
        ("--unknown: the head optimal-transport gives", [*classify, "--unknown", "--head", "optimal-transport"]),
        ("did you mean 'em'", ["serve", package, "--head", "emm"]),
        ("give --data URI to evaluate it", ["compare", NAME, package]),
        ("--head em: only with --data", ["compare", package, "--head", "em"]),
        ("--weights x: is for one encoder by name, and 0", ["compare", package, "--weights", "x", *on_data]),
        ("--image-size 3: no encoder by name", ["compare", package, "--image-size", "3", *on_data]),
    ]:
        code, _, said = called(*words)
        lines = [line for line in said.splitlines() if "does not record" not in line]
        assert (code, len(lines)) == (2, 1), (words, lines)
        assert text in lines[0]
        assert not list(tmp_path.iterdir()), words
