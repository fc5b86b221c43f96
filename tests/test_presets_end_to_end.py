"""Every preset the whole road, in miniature: train, kill, resume, package, evaluate and serve. A new one is tested too.

The limits below shrink the numbers of a preset; everything else is as it stands there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_words import set_words
from photographs import picture

from metagmvae.configs.describe import preset_text
from metagmvae.configs.load import flatten, load_settings, presets, to_json
from metagmvae.infra.cli import main
from metagmvae.infra.registry.register import save_pyfunc
from metagmvae.infra.runs.local_context import LocalContext
from metagmvae.infra.runs.run_folder import CHECKPOINT, METRICS, read_lines
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.workflows.estimator import FewShotClassifier
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.models import resnet12
from metagmvae.training.trainer.checkpoint import load_state
from metagmvae.training.trainer.package import LoadedModel, load_model, save_package

pytestmark = pytest.mark.slow
STEPS = 3
"""Steps of each stage; there are checkpoints after the second and the last."""
LIMITS = {
    "model.image_size": 32,
    "model.channels": 4,
    "model.width": 16,
    "model.latent": 4,
    "method.way": 3,
    "method.query": 2,
    "method.shot": 2,
    "method.inner_steps": 2,
    "method.test_steps": 2,
    "method.clusters": 6,
    "method.partitions": 2,
    "pretrain.steps": STEPS,
    "pretrain.batch": 8,
    "pretrain.clusters": 6,
    "pretrain.shots": 2,
    "pretrain.queue": 16,
    "pretrain.projector": 8,
    "train.steps": STEPS,
    "train.batch": 2,
    "train.set_size": 12,
    "train.samples": 4,
    "train.decode_samples": 2,
    "train.components": 3,
    "train.em_iterations": 2,
    "train.checkpoint_every": 2,
    "train.log_every": 2,
    "validation.every": STEPS,
    "validation.episodes": 2,
    "validation.way": 3,
    "validation.shots": 2,
    "validation.query": 2,
    "validation.calibration_episodes": 1,
    "adapt.samples": 4,
    "adapt.iterations": 2,
}
"""The largest value of each number, or of each number in a list."""
TASK = {"way": 3, "shot": 1, "query": 3, "episodes": 4}
LABEL = np.array([0, 1, 1, 0, -1, -1, -1])


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of glyphs: 8, 4 and 4 classes with 6 images each."""
    folder = tmp_path_factory.mktemp("glyphs") / "data"
    write_dataset(open_source("glyphs", classes=(8, 4, 4), drawings=6), folder)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of colour images of 32 x 32 pixels: as many."""
    folder = tmp_path_factory.mktemp("photographs")
    for split, labels in (("train", range(8)), ("validation", range(8, 12)), ("test", range(12, 16))):
        for label in labels:
            (folder / "images" / split / f"class{label}").mkdir(parents=True)
            for number in range(6):
                picture(6 * label + number, 32, 32).save(folder / "images" / split / f"class{label}" / f"{number}.png")
    write_dataset(open_source("folder", str(folder / "images"), size=32), folder / "data")
    return folder / "data"


@pytest.fixture(scope="session")
def features(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the photographs, by the encoder that the presets of the paper name."""
    folder = tmp_path_factory.mktemp("features")
    assert main(words("mini-imagenet-simclr-paper", photographs, folder / "encoder")) == 0
    assert main(["features", str(folder / "encoder"), "--data", str(photographs), "--out", str(folder / "data")]) == 0
    return folder / "data"


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command; returns its answer."""

    def run(*command: object) -> Any:
        capsys.readouterr()
        code = main([*map(str, command), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


def trained_by(preset: str) -> str:
    """The command in the head of a preset, `train` or `pretrain`; the demo trains."""
    commands = re.findall(r"^#.* metagmvae (train|pretrain|demo)\b", preset_text(preset), re.MULTILINE)
    return str(commands[-1]).replace("demo", "train")


def words(preset: str, data: Path, out: Path) -> list[str]:
    """The command that trains a preset in miniature, in this process and without tracking."""
    here = {"data.uri": data, "run.out": out, "run.engine": "local", "run.device": "cpu", "run.figures": "false"}
    small = {"tracking.enabled": "false"}
    for key, value in flatten(json.loads(to_json(load_settings(preset)))):
        if key in LIMITS:
            several = isinstance(value, list)
            small[key] = str([min(each, LIMITS[key]) for each in value] if several else min(value, LIMITS[key]))
    return [trained_by(preset), preset, *set_words(here | small)]


@pytest.fixture(autouse=True)
def _narrow_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-12 has no setting of its channels, and its checkpoints are of 150 MB."""
    monkeypatch.setattr(resnet12, "WIDTHS", (4, 4, 4, 8))


@pytest.fixture(params=presets())
def preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def data(preset: str, request: pytest.FixtureRequest) -> Path:
    """The dataset that a preset is for: of photographs, of their features, or of glyphs."""
    if not preset.startswith(("mini-imagenet", "photos", "vectors")):
        return Path(request.getfixturevalue("glyphs"))
    settings = load_settings(preset)
    needs_encoder = trained_by(preset) == "train" and find_method(settings.method).needs_encoder(settings)
    return Path(request.getfixturevalue("features" if needs_encoder and not settings.pretrain.steps else "photographs"))


def test_the_whole_road(preset: str, data: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    answer(*words(preset, data, whole))
    train_and_kill(preset, data, killed)
    assert recorded(killed) == recorded(whole)

    loaded = load_model(whole)
    package = save_package(tmp_path / "package", loaded)
    on = [word for key, value in TASK.items() for word in (f"--{key}", value)]
    results = [answer("evaluate", model, "--data", data, *on) for model in (whole, package)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    check_served(tmp_path / "served", package, loaded)


def train_and_kill(preset: str, data: Path, out: Path) -> None:
    """Train; each stage is killed before its last step is recorded, and resumed from the checkpoint before."""
    command, resume = words(preset, data, out), [trained_by(preset), str(out), "--resume"]
    for stop in stops(preset):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalContext, "report", killed_at(stop))
            assert main(resume if (out / CHECKPOINT).exists() else command) == 130
        if stop:
            assert read_lines(out / METRICS)[-1]["global_step"] == stop - 1
    assert main(resume if (out / CHECKPOINT).exists() else command) == 0  # without any step nothing was saved


def stops(preset: str) -> list[int]:
    """The last step of each stage, counted over all stages; 0 if there are no steps."""
    settings = load_settings(preset)
    stages = [settings.pretrain.steps, settings.train.steps if trained_by(preset) == "train" else 0]
    return list(np.cumsum([STEPS for steps in stages if steps])) or [0]


def killed_at(step: int) -> Callable[..., None]:
    """A `report` that ends the training at a step, before it records anything."""
    report = LocalContext.report

    def killed(self: LocalContext, line: Any, state: Any) -> None:
        if line is not None and line["global_step"] >= step:
            raise KeyboardInterrupt
        report(self, line, state)

    return killed


def recorded(run: Path) -> list[Any]:
    """Checkpoint and metric lines, without the times, the folder, and the random numbers of the process."""
    others = {"settings", "rng", "elapsed", "elapsed_s", "images_per_s", "waiting_share"}
    documents = [load_state(run / CHECKPOINT), *read_lines(run / METRICS)]
    return [exact({key: document[key] for key in document.keys() - others}) for document in documents]


def exact(value: Any) -> Any:
    """The same value with the bytes of its tensors."""
    if isinstance(value, dict):
        return {key: exact(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [exact(part) for part in value]
    return value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else value


def check_served(folder: Path, package: Path, loaded: LoadedModel) -> None:
    """MLflow's model answers a request, an episode of noise, with the probabilities of the trained model."""
    save_pyfunc(folder, package, loaded)
    served = import_mlflow().pyfunc.load_model(str(folder))
    images = np.random.default_rng(0).integers(0, 256, (len(LABEL), *loaded.image_shape), dtype=np.uint8)
    p_PK = served.predict({"images": images, "label": LABEL})

    classifier = FewShotClassifier(loaded, mode="transductive").fit(images[LABEL >= 0], LABEL[LABEL >= 0])
    np.testing.assert_allclose(p_PK, classifier.predict_proba(images[LABEL < 0]), atol=1e-5)
