"""The workflow over a dataset of features: pretrain, features, train, evaluate, classify."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from called_commands import answer_of, refusal_of
from command_words import TINY, set_words
from folder_contents import contents
from PIL import Image

from metagmvae.evaluation.encoders.evaluate_encoders import evaluate_model
from metagmvae.evaluation.encoders.frozen_comparison import compare_with_frozen
from metagmvae.evaluation.fewshot.baselines import nearest_class_mean
from metagmvae.evaluation.fewshot.encoder_package import feature_source, load_dataset_encoder
from metagmvae.evaluation.fewshot.evaluate_tasks import evaluate_tasks
from metagmvae.evaluation.fewshot.paired import paired_difference
from metagmvae.infra.cli import main
from metagmvae.infra.cluster.tasks import ray_map
from metagmvae.infra.runs.run_folder import METRICS
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.feature_source import open_features
from metagmvae.pipelines.shards.verify import verify_dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.training.models.encoders import encoder_digest
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.package import load_model

SETTINGS = TINY | {"pretrain.projector": "[16, 8]"}


def command(*words: object, **settings: object) -> list[str]:
    return [*map(str, words), *set_words(settings)]


@pytest.fixture(scope="module")
def encoder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "encoder"
    assert main(command("pretrain", "omniglot-cpu", "--json", **SETTINGS | {"data.uri": data, "run.out": out})) == 0
    return out


@pytest.fixture(scope="module")
def features(data: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "data"
    assert main(["features", str(encoder), "--data", str(data), "--out", str(out), "--dtype", "float32"]) == 0
    return out


def on_features(features: Path, out: Path, **more: object) -> list[str]:
    settings = SETTINGS | {"data.uri": features, "run.out": out, "pretrain.steps": 0, "pretrain.projector": "[]"} | more
    return command("train", "omniglot-cpu", "--json", **settings)


@pytest.fixture(scope="module")
def model(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "model"
    assert main(on_features(features, out)) == 0
    return out


def test_the_trained_model_is_compared_with_its_frozen_encoder_on_the_same_episodes(
    data: Path, features: Path, model: Path
) -> None:
    """By `compare_with_frozen`, and by `compare` with the package of the encoder inside the dataset of features."""
    dataset, trained, task = (
        Dataset.open(features),
        load_model(model),
        {"way": 3, "shot": 1, "query": 5, "episodes": 10},
    )
    rows = compare_with_frozen(trained, dataset, [task], heads=("nearest-mean", "em"))
    (ours,) = evaluate_tasks(trained, dataset, [task])
    for row, head in zip(rows, ("nearest-mean", "em"), strict=True):
        (theirs,) = evaluate_model(load_dataset_encoder(dataset), dataset, [task], head=head)
        expected = paired_difference(ours, theirs, any_mode=True)
        assert (row["head"], row["difference"], row["ci95"]) == (head, expected.difference, expected.ci95)
        assert row["head_mode"] == theirs.mode
    with pytest.raises(DataError, match="holds images; name the encoder"):
        compare_with_frozen(trained, Dataset.open(data), [task])
    words = ["--way", "3", "--query", "5", "--episodes", "10", "--data", features]
    (pair,) = answer_of("compare", features / "encoder", model, *words)["paired"]
    assert (pair["against"], pair["difference"]) == ("encoder, nearest-mean", rows[0]["difference"])


def test_pretraining_validates_the_encoder_by_episodes_and_probes(encoder: Path) -> None:
    lines = [json.loads(line) for line in (encoder / METRICS).read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["pretrain", "pretrain"]
    last = lines[-1]
    assert {"validation/5w1s", "validation/5w1s_ci95", "validation/neighbours", "validation/linear"} <= last.keys()
    assert json.loads((encoder / "run.json").read_text())["kind"] == "encoder"
    assert [path.name for path in (encoder / "figures").glob("*.png")] == ["curves.png"]


def test_stored_features_equal_those_of_the_encoder(data: Path, encoder: Path, features: Path) -> None:
    images, encoded = Dataset.open(data), Dataset.open(features)
    loaded = load_model(encoder)
    assert (encoded.kind, encoded.row_shape, encoded.image_shape) == ("features", (32,), (1, 28, 28))
    assert verify_dataset(features) == []
    for split in ("train", "validation", "test"):
        assert encoded.index(split)["key"].to_pylist() == images.index(split)["key"].to_pylist()
        assert (encoded.labels(split) == images.labels(split)).all()
        with torch.inference_mode():
            x = loaded.model.scale_images(torch.as_tensor(images.images(split)))
            expected = loaded.model.encode_images(x).numpy()
        np.testing.assert_allclose(encoded.rows(split), expected, rtol=1e-4, atol=1e-5)
    assert encoder_digest(load_dataset_encoder(encoded).model.encoder) == encoded.manifest["encoder"]["sha256"]


def test_images_of_another_shape_name_the_options_of_prepare(data: Path, encoder: Path) -> None:
    larger = replace(load_model(encoder), image_shape=(3, 32, 32))
    with (
        pytest.raises(DataError, match=r"\(3, 32, 32\); prepare them with --size 32 --channels 3$"),
        feature_source(larger, Dataset.open(data), "float16"),
    ):
        pass


@pytest.mark.ray
def test_workers_write_the_same_bytes_and_finish_an_interrupted_dataset(
    data: Path, encoder: Path, tmp_path: Path
) -> None:
    """The second dataset is half written when the workers start on it."""
    loaded, images = load_model(encoder), Dataset.open(data)
    small = {"block": 16, "shard_rows": 64}
    with feature_source(loaded, images, "float16") as source, ray_map(2) as map_tasks:
        write_dataset(source, tmp_path / "ray", map_tasks=map_tasks, **small)
        (tmp_path / "half").mkdir()

        def half(function, tasks):
            for number, task in enumerate(tasks):
                if number == len(tasks) // 2:
                    raise InterruptedError
                yield function(*task)

        with pytest.raises(InterruptedError):
            write_dataset(source, tmp_path / "half", map_tasks=half, **small)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "half").rglob("*.tar")}
        assert before
        write_dataset(source, tmp_path / "half", map_tasks=map_tasks, **small)
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with feature_source(loaded, images, "float16") as source:
        write_dataset(source, tmp_path / "here", **small)
    assert contents(tmp_path / "ray") == contents(tmp_path / "here") == contents(tmp_path / "half")
    assert Dataset.open(tmp_path / "here").dtype == np.float16


def evaluated(model: Path, data: Path) -> dict[str, object]:
    return answer_of("evaluate", model, "--data", data, "--way", 3, "--query", 5, "--episodes", 20, "--baselines")


def test_model_trained_on_features_evaluates_images_with_its_encoder(
    data: Path, features: Path, model: Path, tmp_path: Path
) -> None:
    on_rows, on_images = (evaluated(model, where) for where in (features, data))
    assert on_rows["accuracy"] == pytest.approx(on_images["accuracy"], abs=0.02)
    baselines = {row["baseline"]: row["accuracy"] for row in on_rows["baselines"]}  # type: ignore[attr-defined]
    assert len(baselines) == 9
    unscaled = torch.from_numpy(np.asarray(Dataset.open(features).rows("test")[:], dtype=np.float32))
    task = {"way": 3, "shot": 1, "query": 5, "episodes": 20}
    direct = nearest_class_mean(unscaled, Dataset.open(features).labels("test"), **task)
    assert baselines["nearest class mean, features unscaled"] == pytest.approx(direct.mean)
    images, names = Dataset.open(data), Dataset.open(data).class_names("test")
    for number in range(3):
        rows = np.flatnonzero(images.labels("test") == number)[:3]
        for row in rows[:2]:
            path = tmp_path / "support" / names[number] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.images("test")[row][0]).save(path)
        (tmp_path / "query").mkdir(exist_ok=True)
        Image.fromarray(images.images("test")[rows[2]][0]).save(tmp_path / "query" / f"{number}.png")
    words = ["classify", str(model), "--support", str(tmp_path / "support"), "--query", str(tmp_path / "query")]
    answer = answer_of(*words)
    assert [sum(row[name] for name in answer["classes"]) for row in answer["queries"]] == pytest.approx([1.0] * 3)
    figures = {path.name for path in (model / "figures").glob("*.png")}
    assert figures == {"curves.png", "latents.png"}


def test_record_names_the_dataset_and_the_training_of_the_encoder(
    data: Path, features: Path, model: Path, encoder: Path, tmp_path: Path
) -> None:
    task = ["--way", "3", "--query", "5", "--episodes", "4", "--json"]
    records = []
    for uri in (features, data):
        file = tmp_path / f"{uri.name}.json"
        assert main(["evaluate", str(model), "--data", str(uri), *task, "--record", str(file)]) == 0
        records.append(json.loads(file.read_text()))
    on_features, on_images = records
    images = Dataset.open(data)
    assert on_features["dataset"] == on_images["dataset"]
    assert on_features["dataset"] == {"name": "glyphs", "options": images.manifest["options"]}
    assert on_features["checkpoint"] == {"chosen_by": "the last step", "validation_labels": False}
    settings = json.loads((encoder / "settings.json").read_text())
    trained = on_features["encoder"]["trained"]
    assert trained["by"] == "a run of its own"
    assert (trained["steps"], trained["seed"]) == (settings["pretrain"]["steps"], settings["train"]["seed"])
    assert (trained["pretrain"], trained["data_fingerprint"]) == (settings["pretrain"], images.fingerprint)
    assert on_images["encoder"] == {"sha256": on_features["encoder"]["sha256"], "trained": None}


def test_wrong_request_is_one_error_line_and_writes_nothing(
    data: Path, features: Path, model: Path, encoder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cases = [
        ("pretrain.steps is 4, but", on_features(features, out, **{"pretrain.steps": 4})),
        ("model.encoder is 'conv5'", on_features(features, out, **{"model.encoder": "conv5"})),
        ('set model.reconstruct = "features"', on_features(features, out, **{"model.reconstruct": "pixels"})),
        ("needs a trained encoder", on_features(data, out)),
        ("an encoder is trained on images", command("pretrain", "omniglot-cpu", **{"data.uri": features})),
        ("pretrain.steps is 0", command("pretrain", "omniglot-5way", **{"data.uri": data})),
        (
            "contains features; use the dataset of the images",
            ["features", str(encoder), "--data", str(features), "--out", str(out)],
        ),
        ("no such classification network", ["features", "torchvision:nothing", "--data", str(data), "--out", str(out)]),
        (
            "--weights x: only for an encoder by name",
            ["features", str(encoder), "--data", str(data), "--out", str(out), "--weights", "x"],
        ),
        ("no such model", ["features", str(tmp_path / "none"), "--data", str(data), "--out", str(out)]),
    ]
    for message, words in cases:
        assert message in refusal_of(*words)
        assert not out.exists(), message


def test_features_of_another_encoder_are_refused(data: Path, features: Path, model: Path, tmp_path: Path) -> None:
    other = command(
        "pretrain", "omniglot-cpu", "--json", **SETTINGS | {"data.uri": data, "run.out": tmp_path / "other"}
    )
    assert main([*other, "--set", "train.seed=1", "--set", "run.figures=false"]) == 0
    words = ["features", str(tmp_path / "other"), "--data", str(data), "--out", str(tmp_path / "theirs")]
    assert main(words) == 0
    words = ["evaluate", model, "--data", tmp_path / "theirs", "--episodes", "2"]
    assert "its features were made by encoder" in refusal_of(*words)
    altered = shutil.copytree(features, tmp_path / "altered")
    weights = altered / "encoder" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert "(sha256 differs)" in refusal_of(*on_features(altered, tmp_path / "run"))
    assert [problem.path for problem in verify_dataset(altered)] == ["encoder/model.safetensors"]
    manifest = json.loads((features / "dataset.json").read_text())
    for key, value in (("feature_size", 31), ("dtype", "float16")):
        (altered / "dataset.json").write_text(json.dumps(manifest | {key: value}))
        shutil.copy(features / "encoder" / "model.safetensors", weights)
        assert "in the manifest" in refusal_of(*on_features(altered, tmp_path / "run"))
    for key, value in (("feature_size", -1), ("dtype", "object"), ("image_shape", [1]), ("kind", "sounds")):
        (altered / "dataset.json").write_text(json.dumps(manifest | {key: value}))
        assert "write the dataset again" in refusal_of(*on_features(altered, tmp_path / "run"))
    hostile = manifest | {"attachments": {"../../evil": {"sha256": "0" * 64, "bytes": 1}}}
    (altered / "dataset.json").write_text(json.dumps(hostile))
    assert '= "../../evil": string should match pattern' in refusal_of(*on_features(altered, tmp_path / "run"))


def test_non_finite_features_are_refused_and_the_dataset_can_be_finished(data: Path, tmp_path: Path) -> None:
    images = Dataset.open(data)

    def source(value: float):
        def encode(x: np.ndarray) -> np.ndarray:
            h = np.ones((len(x), 4), np.float32)
            h[:, 2] = value
            return h

        return open_features(images, encode, feature_size=4, encoder={"sha256": "0" * 64}, dtype="float16")

    remedies = {
        float("nan"): "the encoder is broken",
        float("inf"): "the encoder is broken",
        1e6: "use --dtype float32",
    }
    for value, remedy in remedies.items():
        with pytest.raises(DataError, match=rf"feature 2 of image \d+ of 'train' is .*{remedy}"):
            write_dataset(source(value), tmp_path / "out")
        assert not list((tmp_path / "out").rglob("*.tar*"))
    write_dataset(source(2.0), tmp_path / "out")
    assert (Dataset.open(tmp_path / "out").rows("test") == [1, 1, 2, 1]).all()


def test_model_with_nan_weights_is_refused(data: Path, model: Path, tmp_path: Path) -> None:
    """The argmax of NaN is the first class, so a broken model would have an accuracy of 20% in 5-way episodes."""
    state = load_state(model / "checkpoint.pt")
    weights = state["model"]
    name = next(name for name, value in weights.items() if name.startswith("encoder") and value.ndim == 4)
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_state(tmp_path / "broken.pt", {key: value for key, value in state.items() if key != "version"})
    task = ["--data", str(data), "--way", "5", "--shot", "1", "--query", "5", "--episodes", "2"]
    assert "features that are not finite" in refusal_of("evaluate", tmp_path / "broken.pt", *task)
    for name in ("support/a", "support/b", "query"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (28, 28), len(name)).save(tmp_path / name / "0.png")
    images = ["--support", str(tmp_path / "support"), "--query", str(tmp_path / "query")]
    assert "NaN instead of probabilities" in refusal_of("classify", tmp_path / "broken.pt", *images)
    # Hidden files and folders of other programs are neither classes nor queries.
    (tmp_path / "support" / ".cache").mkdir()
    (tmp_path / "query" / "folder.png").mkdir()
    (tmp_path / "query" / "._0.png").write_bytes(b"not an image")
    answer = answer_of("classify", model, *images)
    assert answer["classes"] == ["a", "b"]
    assert [row["query"] for row in answer["queries"]] == ["0.png"]


def test_too_many_shots_are_refused_before_encoding(data: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metagmvae.evaluation.fewshot.encoding.encode_split", lambda *_: pytest.fail("encoded"))
    words = ["evaluate", str(model), "--data", str(data), "--way", "5", "--shot", "50"]
    assert "shot 50 and query 15 need 65 images per class" in refusal_of(*words)


def test_damaged_checkpoint_is_one_error_line(data: Path, encoder: Path, tmp_path: Path) -> None:
    state = {key: value for key, value in load_state(encoder / "checkpoint.pt").items() if key != "version"}
    words = ["features", str(tmp_path / "x.pt"), "--data", str(data), "--out", str(tmp_path / "out")]
    for damage in ({"settings": 5}, {"settings": "{}"}, {"settings": "{}", "best": {"5w1s": {}}}):
        save_state(tmp_path / "x.pt", state | damage)
        assert "x.pt" in refusal_of(*words)
    torch.save({"version": 2, "model": Path("x")}, tmp_path / "x.pt")
    assert "refused, it contains more than tensors and plain values" in refusal_of(*words)
    assert not (tmp_path / "out").exists()


def run_command(words: list[str]) -> None:
    """In a new process, because warnings are errors here and Ray Train emits deprecation warnings."""
    subprocess.run([sys.executable, "-m", "metagmvae", *words], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.ray
def test_encoder_is_trained_on_ray_by_two_workers(data: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"data.uri": data, "run.out": tmp_path / "run", "run.engine": "ray", "run.workers": 2}
    words = command("pretrain", "omniglot-cpu", "--json", **settings | {"pretrain.steps": 6})
    run_command(words)
    loaded = load_model(tmp_path / "run")
    assert type(loaded.model).__name__ == "EncoderModel"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in lines] == [2, 4, 6]
    assert {"validation/5w1s", "validation/linear"} <= lines[-1].keys()


def test_dry_run_checks_everything_and_writes_nothing(data, tmp_path):
    run = tmp_path / "encoder"
    settings = {"data.uri": data, "run.out": run, "pretrain.steps": 1, "pretrain.batch": 8, "validation.every": 0}
    words = set_words(settings | {"tracking.enabled": "false", "run.figures": "false"})
    assert main(["pretrain", "omniglot-cpu", *words]) == 0
    out = tmp_path / "features"
    answer = answer_of("features", run, "--data", data, "--out", out, "--dry-run")
    assert answer["rows"].endswith(" float16")
    assert answer["samples"]["train"] == 600
    assert not out.exists()
    out.write_text("a file")
    assert main(["features", str(run), "--data", str(data), "--out", str(out), "--dry-run"]) == 2


def test_ceiling(data: Path, encoder: Path, tmp_path: Path):
    record = tmp_path / "ceiling.json"
    words = ["ceiling", encoder, "--data", data, "--ways", 3, 5, "--shots", 1, 2, "--query", 3, "--episodes", 20]
    answer = answer_of(*words, "--record", record)
    assert [(row["way"], row["shot"]) for row in answer["rows"]] == [(3, 1), (3, 2), (5, 1), (5, 2)]
    assert answer["classes"] == 6
    assert answer["rotation_pairs"] == 0  # glyphs are not rotated
    assert answer["alike_classes"] == sum(map(len, answer["groups"]))
    for row in answer["rows"]:
        assert 0 <= row["all_images_labelled"] <= 1
        assert row["oracle"] == pytest.approx(row["expected"], abs=0.2)
    recorded = json.loads(record.read_text())
    assert recorded["rows"] == answer["rows"]
    assert recorded["environment"]["command"]
    assert recorded["data_fingerprint"] == Dataset.open(data).fingerprint
    assert "way 7 exceeds the 6 classes" in refusal_of(*words[:4], "--ways", 7)
