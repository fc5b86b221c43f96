"""The whole road of each method: train, kill, resume, package, evaluate, calibrate, classify, serve, promote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow_template
import numpy as np
import pytest
import torch
from command_words import TINY, set_words
from PIL import Image

from metagmvae.infra.cli import main
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.runs import local_context
from metagmvae.infra.runs.run_folder import CHECKPOINT, METRICS
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.methods_by_name import METHODS
from metagmvae.training.models.meta_learner import MetaLearner
from metagmvae.training.trainer.checkpoint import load_state
from metagmvae.training.trainer.package import load_model, load_package, save_package

pytestmark = [pytest.mark.slow, pytest.mark.mlflow]
TASKS = {"method.way": 5, "method.shot": 1, "method.query": 2, "method.partitions": 2, "method.clusters": 8}
STEPS = {"method.inner_steps": 2, "method.test_steps": 3}
ROADS: dict[str, dict[str, object]] = {
    **{name: {"method.name": name, "method.tasks": "labels", **TASKS, **STEPS} for name in METHODS},
    "protonets, clusters": {"method.name": "protonets", **TASKS},
    "protonets, views of features": {
        "method.name": "protonets",
        "method.tasks": "images",
        "method.network": "mlp",
        **TASKS,
    },
}
"""Settings by name: each method, and the kinds of tasks and networks. A method that is added is tested too."""
CPU = torch.device("cpu")


def train_words(road: str, data: Path, out: Path, **more: object) -> list[str]:
    settings = TINY | {"data.uri": data, "run.out": out, "tracking.enabled": "true"} | ROADS[road] | more
    name = str(ROADS[road]["method.name"])
    settings["tracking.register_as"] = "few-shot"
    if not METHODS[name].needs_steps(None):  # type: ignore[arg-type]
        settings |= {"train.steps": 0, "pretrain.steps": 0}
    return ["train", "strokes-cpu", *set_words(settings)]


@pytest.fixture(params=ROADS)
def road(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command as a user does, in a folder of its own; returns its answer, or its error if `code` is not 0."""
    monkeypatch.chdir(tmp_path)
    mlflow_template.new_store(tmp_path / "runs" / "mlflow")

    def run(*words: object, code: int = 0) -> Any:
        capsys.readouterr()
        found = main([*map(str, words), "--json"])
        out, err = capsys.readouterr()
        assert found == code, err
        return json.loads(out) if code == 0 else err

    return run


def killed_at(step: int) -> pytest.MonkeyPatch:
    """Let the training end before it records the line of a step."""
    report = local_context.LocalContext.report

    def killed(self: Any, line: Any, state: Any) -> None:
        if line is not None and line["global_step"] >= step:
            raise KeyboardInterrupt
        report(self, line, state)

    patch = pytest.MonkeyPatch()
    patch.setattr(local_context.LocalContext, "report", killed)
    return patch


def test_the_whole_road(road: str, data: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    name = str(ROADS[road]["method.name"])
    answer(*train_words(road, data, tmp_path / "first"))
    last = load_state(tmp_path / "first" / CHECKPOINT)["step"] + (0 if name == "scratch" else 4)
    patch = killed_at(last)
    answer(*train_words(road, data, tmp_path / "second"), code=130)
    patch.undo()
    if (tmp_path / "second" / CHECKPOINT).exists():
        answer("train", tmp_path / "second", "--resume")
    else:  # nothing was saved, and the folder is as before
        answer(*train_words(road, data, tmp_path / "second"))
    first, second = (load_state(tmp_path / run / CHECKPOINT) for run in ("first", "second"))
    assert first["kind"] == name
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    lines = [json.loads(line) for line in (tmp_path / "first" / METRICS).read_text().splitlines()]
    assert {"validation/5w1s", "validation/5w5s"} <= lines[-1].keys()
    assert (tmp_path / "first" / "figures" / "curves.png").exists()

    loaded = load_model(tmp_path / "first")
    package = load_package(save_package(tmp_path / "package", loaded))
    assert isinstance(package.model, MetaLearner)
    assert package.settings == loaded.settings
    assert all(torch.equal(value, package.model.state_dict()[key]) for key, value in loaded.model.state_dict().items())

    few = ["--data", data, "--episodes", 4, "--query", 3]
    transductive = answer(
        "evaluate", tmp_path / "first", *few, "--baselines", "--record", tmp_path / "one-5way-1shot.json"
    )
    packaged = answer("evaluate", tmp_path / "package", *few)
    assert packaged["accuracy"] == transductive["accuracy"]
    assert {row["baseline"] for row in transductive["paired"]} >= {"nearest class mean", "logistic regression"}
    inductive = answer("evaluate", tmp_path / "first", *few, "--mode", "inductive", "--shot", 5)
    assert 0 < inductive["accuracy"] <= 1

    calibrated = answer("calibrate", tmp_path / "first", "--data", data, "--episodes", 3, "--shot", 1)
    assert {row["mode"] for row in calibrated["temperatures"]} == set(package.model.modes)
    if not package.model.has_background:
        error = answer("evaluate", tmp_path / "first", *few, "--way", 3, "--open", 2, code=2)
        assert "queries of no labelled class" in error
        assert error.count("\n") == 1

    row = classified(answer, tmp_path, data)
    assert row["one"] + row["two"] == pytest.approx(1)
    served(tmp_path, data)
    for version in answer("models", "few-shot")["models"]:
        assert (version["kind"], version["method"]) == ("few-shot classifier", name)
    compared = answer("compare", tmp_path / "first", tmp_path / "second", *few)
    assert len(compared["rows"]) == 2
    more = ["--data", data, "--episodes", 30, "--query", 3, "--allow-equal", "--margin", 0.99]
    promoted = answer("promote", tmp_path / "second", "--name", "few-shot", *more)
    assert promoted
    assert "**`one`**" in answer("table", "one", "--results", tmp_path)["table"]


def classified(answer: Callable[..., Any], folder: Path, data: Path) -> dict[str, Any]:
    """The answer of `classify` for one image of the test split."""
    images = Dataset.open(data).images("test")
    for number, label in enumerate(("one", "two")):
        (folder / "support" / label).mkdir(parents=True)
        for shot in range(2):
            Image.fromarray(images[2 * number + shot][0]).save(folder / "support" / label / f"{shot}.png")
    (folder / "query").mkdir()
    Image.fromarray(images[9][0]).save(folder / "query" / "q.png")
    (row,) = answer("classify", folder / "first", "--support", folder / "support", "--query", folder / "query")[
        "queries"
    ]
    return dict(row)


def served(folder: Path, data: Path) -> None:
    """The registered version answers a request as MLflow's server does, in both modes."""
    mlflow = import_mlflow()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/runs/mlflow/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/few-shot@champion")
    images = Dataset.open(data).images("test")[np.arange(0, 100, 20)]
    for mode in ("transductive", "inductive"):
        p_PK = model.predict({"images": images, "label": np.array([0, 1, 0, -1, -1])}, params={"mode": mode})
        assert p_PK.shape == (2, 2)
        assert p_PK.sum(axis=1) == pytest.approx(1)
    resolved = resolve_model("models:/few-shot@champion")
    assert resolved is not None
