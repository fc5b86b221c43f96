"""The whole road on a user's own vectors: equal to that on features, resumed, packaged, classified, served, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow_template
import numpy as np
import pytest
import torch
from called_commands import answer_of, refusal_of
from command_words import TINY, set_words
from torch import nn

import metagmvae
from metagmvae.configs.schema import ModelSettings, Settings
from metagmvae.evaluation.fewshot.encoder_package import feature_source
from metagmvae.infra.cli import main
from metagmvae.infra.registry.register import register, save_pyfunc
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.runs.local_context import LocalContext
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.training.models import encoders
from metagmvae.training.models.encode_images import vectors_as_images
from metagmvae.training.models.encoders import VectorEncoder, encoder_digest
from metagmvae.training.trainer.builders import build_encoder_model
from metagmvae.training.trainer.checkpoint import load_state
from metagmvae.training.trainer.package import LoadedModel, load_model, save_package

SETTINGS = TINY | {"pretrain.steps": 0, "train.components": 4, "run.figures": "false"}
for key in ("pretrain.batch", "model.channels"):
    del SETTINGS[key]
ON = ["--way", "3", "--shot", "1", "--query", "5", "--episodes", "10"]


class Pooled(nn.Module):
    """An encoder without weights, so that it draws no random numbers: the mean of 4 x 4 pixels, and their square."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.avg_pool2d(x, 4).flatten(1) - 0.1
        return torch.cat([pooled, pooled.square()], dim=1)


@pytest.fixture(scope="module")
def features(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the glyphs by `Pooled`."""
    out = tmp_path_factory.mktemp("features") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "load_extension", lambda group, name: lambda shape: Pooled())
        dataset, settings = Dataset.open(data), Settings(model=ModelSettings(encoder="pooled"))
        model = build_encoder_model(settings.model, dataset.image_shape, seed=0).eval()
        with feature_source(LoadedModel(model, settings, dataset.image_shape, {}), dataset, "float32") as source:
            write_dataset(source, out)
    return out


@pytest.fixture(scope="module")
def vectors(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as vectors, in an order of the source that gives the same stored order."""
    dataset, rows, labels, splits = Dataset.open(features), [], [], []
    for split in dataset.splits:
        stored = dataset.rows(split)[:]
        order = np.argsort(keyed_rng("shards", 0, split).permutation(len(stored)))
        rows.append(stored[order])
        labels += np.array(dataset.class_names(split))[dataset.labels(split)][order].tolist()
        splits += [split] * len(stored)
    out = tmp_path_factory.mktemp("vectors") / "data"
    metagmvae.prepare_vectors(np.concatenate(rows), labels, splits=splits, out=out)
    return out


def train_words(data: Path, out: Path, *words: object, **changes: object) -> list[str]:
    settings = SETTINGS | {"data.uri": data, "run.out": out} | changes
    return ["train", "vectors", *set_words(settings), *map(str, words), "--json"]


@pytest.fixture(scope="module")
def run(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "vectors"
    assert main(train_words(vectors, out)) == 0
    return out


def test_vectors_give_the_model_and_the_accuracy_of_the_same_features(
    features: Path,
    vectors: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoders, "load_extension", lambda group, name: lambda shape: Pooled())
    shards = [
        [[shard["sha256"] for shard in part["shards"]] for part in Dataset.open(d).manifest["splits"].values()]
        for d in (features, vectors)
    ]
    assert shards[0] == shards[1]
    assert main(train_words(features, tmp_path / "run")) == 0
    ours, theirs = (load_state(path / "checkpoint.pt")["model"] for path in (run, tmp_path / "run"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for words in (("--baselines",), ("--mode", "inductive")):
        first, second = (
            answer_of("evaluate", model, "--data", dataset, *ON, *words)
            for model, dataset in ((run, vectors), (tmp_path / "run", features))
        )
        assert [first[key] for key in ("accuracy", "ece")] == [second[key] for key in ("accuracy", "ece")]
        for row in [*first.get("baselines", []), *second.get("baselines", [])]:
            del row["seconds"]
        assert first.get("baselines") == second.get("baselines")
    alone = [answer_of("evaluate", "vectors", "--data", vectors, *ON)["accuracy"]]
    alone.append(answer_of("evaluate", features / "encoder", "--data", features, *ON)["accuracy"])
    assert alone[0] == alone[1] > 1 / 3


def test_a_killed_training_resumes_to_the_same_weights(vectors: Path, run: Path, tmp_path: Path) -> None:
    report = LocalContext.report

    def killed(self: LocalContext, line: Any, state: Any) -> None:
        if line is not None and line["global_step"] >= 4:
            raise KeyboardInterrupt
        report(self, line, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalContext, "report", killed)
        assert main(train_words(vectors, tmp_path / "run")) == 130
    assert load_state(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    assert main(train_words(vectors, tmp_path / "run", "--resume")) == 0
    ours, whole = (load_state(path / "checkpoint.pt")["model"] for path in (tmp_path / "run", run))
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


@pytest.fixture(scope="module")
def task(vectors: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two labelled vectors of three test classes each and their labels, nine others, and theirs."""
    dataset = Dataset.open(vectors)
    rows, labels = dataset.rows("test")[:], np.array(dataset.class_names("test"))[dataset.labels("test")]
    places = [np.flatnonzero(labels == name)[:5] for name in sorted(set(labels))[:3]]
    support, query = np.concatenate([p[:2] for p in places]), np.concatenate([p[2:] for p in places])[::-1]
    return rows[support], labels[support], rows[query], labels[query]


@pytest.mark.mlflow
def test_package_registry_classifier_command_and_server_give_the_same_answers(
    run: Path, task: Any, tmp_path: Path
) -> None:
    support, labels, query, _ = task
    loaded = load_model(run)
    expected = metagmvae.FewShotClassifier(loaded, mode="transductive").fit(support, labels).predict_proba(query)
    assert expected.shape == (9, 3)

    # By the network itself, without the code above it.
    model = loaded.model
    assert isinstance(model.encoder, VectorEncoder)
    h_nF = model.encode_images(torch.as_tensor(np.concatenate([support, query]))[:, :, None, None])
    torch.testing.assert_close(h_nF, model.scale_features(torch.as_tensor(np.concatenate([support, query]))))

    package = save_package(tmp_path / "package", loaded)
    tracking = mlflow_template.new_store(tmp_path / "store")
    version = register(run, tracking, "vectors")
    registered = resolve_model(version.uri, tracking_uri=f"sqlite:///{tmp_path}/store/mlflow.db")
    for other in (package, registered):
        again = metagmvae.FewShotClassifier(other, mode="transductive").fit(support, labels).predict_proba(query)
        np.testing.assert_array_equal(again, expected)

    np.savez(tmp_path / "labelled.npz", vectors=support, labels=labels)
    names = np.array([f"sound {number}" for number in range(9)])
    np.savez_compressed(tmp_path / "new.npz", vectors=query.astype(np.float64), names=names)
    words = ["classify", package, "--support", tmp_path / "labelled.npz", "--query", tmp_path / "new.npz"]
    found = answer_of(*words)
    assert (found["vectors"], found["shots"], found["left_out"]) == (9, [2, 2, 2], [])
    assert [row["query"] for row in found["queries"]] == names.tolist()
    rows = [[row["probabilities"][name] for name in found["classes"]] for row in found["queries"]]
    np.testing.assert_array_equal(rows, expected)
    np.save(tmp_path / "new.npy", query)
    counts = answer_of(*words[:-1], tmp_path / "new.npy", "--table", tmp_path / "rows.parquet", "--mode", "inductive")
    assert counts["predicted"].keys() == set(labels)

    save_pyfunc(tmp_path / "served", package, loaded)
    served = import_mlflow().pyfunc.load_model(str(tmp_path / "served"))
    request = {"vectors": np.concatenate([support, query]), "label": [*labels.tolist(), *[None] * 9]}
    np.testing.assert_array_equal(served.predict(request), expected)
    assert "preprocessed" not in served.metadata.get_params_schema().to_dict()[0]["name"]


@pytest.mark.mlflow
def test_a_served_model_refuses_other_requests(run: Path, tmp_path: Path) -> None:
    from mlflow import MlflowException

    loaded = load_model(run)
    save_pyfunc(tmp_path / "served", save_package(tmp_path / "package", loaded), loaded)
    served = import_mlflow().pyfunc.load_model(str(tmp_path / "served"))
    size, label = loaded.image_shape[0], np.array([0, 1, -1])
    for vectors, message in (
        (np.ones((3, size - 1)), f"the model takes vectors of {size} values"),
        (np.full((3, size), np.inf), "value 0 of vector 0 is inf"),
        ([[1.0] * size, [1.0] * size, [1.0]], "vectors differ in length"),
    ):
        with pytest.raises(MlflowException, match=message):
            served.predict({"vectors": vectors, "label": label})


def test_the_classifier_refuses_what_is_no_vector(run: Path, task: Any) -> None:
    support, labels, query, _ = task
    classifier = metagmvae.FewShotClassifier(run).fit(support.astype(np.float64), labels)
    assert not hasattr(classifier, "pixel_range_")
    with pytest.raises(DataError, match=r"X: value 0 of vector 0 is 1e\+300; give finite numbers"):
        classifier.predict(np.full_like(query, 1e300, dtype=np.float64))
    size = support.shape[1]
    with pytest.raises(DataError, match=f"X has {size - 1} values in a row; the model takes vectors of {size} values"):
        metagmvae.FewShotClassifier(run).fit(support[:, 1:], labels)
    for arguments in ({"preprocessed": False}, {"pixel_range": (0, 1)}):
        with pytest.raises(DataError, match="are for images, and the model takes vectors; omit them"):
            metagmvae.FewShotClassifier(run, **arguments).fit(support, labels)
    with pytest.raises(DataError, match="holds <U1"):
        vectors_as_images(load_model(run).model, np.array([["a"] * size]), "x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrain.steps": 5}, "vectors, which no encoder reads: set it to 0, or use the preset vectors"),
        ({"model.average": "crops"}, "model.average is 'crops', but {data} holds vectors, which no encoder reads"),
        ({"model.image_size": 64}, "model.image_size is 64, but {data} holds vectors"),
        ({"model.encoder": "conv5"}, "model.encoder is 'conv5', but {data} holds vectors"),
        ({"model.features": "view-whitened"}, 'holds vectors: set model.features to "whitened"'),
        ({"model.reconstruct": "pixels", "train.start": "random"}, 'set model.reconstruct = "features", or use the'),
        (
            {"method.name": "protonets", "method.tasks": "images", "method.network": "mlp"},
            "augments images: set",
        ),
        ({"method.name": "scratch", "train.steps": 0}, 'set method.network = "mlp", or use the preset vectors'),
    ],
)
def test_a_training_says_what_it_cannot_do_with_vectors(
    settings: dict[str, object], message: str, vectors: Path, tmp_path: Path
) -> None:
    words = [word for word in train_words(vectors, tmp_path / "run", **settings) if word != "--json"]
    assert message.format(data=vectors) in refusal_of(*words)
    assert not (tmp_path / "run").exists()


def test_commands_for_images_say_what_they_cannot_do_with_vectors(
    data: Path, vectors: Path, run: Path, task: Any, tmp_path: Path
) -> None:
    assert "holds vectors; an encoder is trained on images: prepare the images" in refusal_of(
        "pretrain", "vectors", *set_words({"data.uri": vectors, "run.out": tmp_path / "x"})
    )
    out = ("--out", tmp_path / "out")
    assert "vectors are features already" in refusal_of("features", run, "--data", vectors, *out)
    size = Dataset.open(vectors).row_shape[0]
    takes = f"the model takes vectors of {size} values"
    assert f"holds images (1, 28, 28), and {takes}" in refusal_of("evaluate", run, "--data", data, *ON)
    assert "figure 3 shows images: prepare the images" in refusal_of("figure", 3, run, "--data", vectors, *out)
    assert "give one of vectors as --data" in refusal_of("evaluate", "vectors", "--data", data, *ON)
    support, labels, query, _ = task
    np.savez(tmp_path / "labelled.npz", vectors=support, labels=labels)
    np.savez(tmp_path / "unlabelled.npz", vectors=support)
    np.savez(tmp_path / "narrow.npz", vectors=query[:, 1:])
    np.savez(tmp_path / "one.npz", vectors=support, labels=np.zeros(6, int))
    words = ["classify", run, "--support", tmp_path / "labelled.npz", "--query"]
    assert f"holds float32 (9, {size - 1}), and {takes}" in refusal_of(*words, tmp_path / "narrow.npz")
    assert "is a folder, and the model takes vectors" in refusal_of(*words, tmp_path)
    for option, value in (
        ("--figure", [tmp_path / "a.png"]),
        ("--invert", []),
        ("--recursive", []),
        ("--labels", ["a.csv"]),
    ):
        assert f"{option}: is for images" in refusal_of(*words, tmp_path / "narrow.npz", option, *value)
    words[3:] = [tmp_path / "unlabelled.npz", "--query", tmp_path / "labelled.npz"]
    assert "holds no labels; save the class of each vector in it as labels" in refusal_of(*words)
    words[3] = tmp_path / "one.npz"
    assert "holds 1 class; give two or more" in refusal_of(*words)
    images = mlflow_template.new_run(tmp_path / "images")
    words[1] = images
    assert "is a file of vectors, and run takes images; give a folder" in refusal_of(*words, "--no-invert")


def test_the_vectors_alone_are_a_model_that_classifies(vectors: Path, task: Any, tmp_path: Path) -> None:
    """By the nearest class mean in cosine, here in plain loops."""
    support, labels, query, _ = task
    written = answer_of("encoder", "vectors", "--data", vectors, "--out", tmp_path / "model")
    assert (written["weights"], written["features"]) == (None, support.shape[1])
    np.savez(tmp_path / "labelled.npz", vectors=support, labels=labels)
    np.save(tmp_path / "new.npy", query)
    words = ("classify", tmp_path / "model", "--support", tmp_path / "labelled.npz", "--query", tmp_path / "new.npy")
    means = {}
    for name in set(labels):
        mean = sum(vector / np.linalg.norm(vector) for vector in support[labels == name])
        means[name] = mean / np.linalg.norm(mean)
    for row, vector in zip(answer_of(*words)["queries"], query, strict=True):
        assert row["class"] == max(means, key=lambda name: float(means[name] @ vector))


def test_the_encoder_of_vectors_has_the_digest_in_the_manifest(vectors: Path) -> None:
    dataset = Dataset.open(vectors)
    assert encoder_digest(VectorEncoder(dataset.image_shape)) == dataset.manifest["encoder"]["sha256"]
    with pytest.raises(ValueError, match="takes vectors, not images"):
        VectorEncoder((3, 8, 8))
    with pytest.raises(ValueError, match=r"model\.encoder \(vectors\): vectors have no size and no views"):
        encoders.build_encoder("vectors", dataset.image_shape, 64, averaging="mirror")
