"""What is done with the model of each method: evaluate, calibrate, classify, register, serve, compare, promote.

That it is resumed, packaged and served alone shows `test_presets_end_to_end.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow_template
import numpy as np
import pytest
from called_commands import answer_of, refusal_of
from command_words import TINY, set_words
from PIL import Image

from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.runs.run_folder import METRICS
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.methods_by_name import METHODS
from metagmvae.training.models.meta_learner import MetaLearner
from metagmvae.training.trainer.package import load_model

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


def test_the_whole_road(road: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user does, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    mlflow_template.new_store(tmp_path / "runs" / "mlflow")
    name = str(ROADS[road]["method.name"])
    answer_of(*train_words(road, data, tmp_path / "first"))
    answer_of(*train_words(road, data, tmp_path / "second", **{"train.seed": 1, "tracking.enabled": "false"}))
    loaded = load_model(tmp_path / "first")
    assert isinstance(loaded.model, MetaLearner)
    lines = [json.loads(line) for line in (tmp_path / "first" / METRICS).read_text().splitlines()]
    assert {"validation/5w1s", "validation/5w5s"} <= lines[-1].keys()
    assert (tmp_path / "first" / "figures" / "curves.png").exists()

    few = ["--data", data, "--episodes", 4, "--query", 3]
    transductive = answer_of(
        "evaluate", tmp_path / "first", *few, "--baselines", "--record", tmp_path / "one-5way-1shot.json"
    )
    assert {row["baseline"] for row in transductive["paired"]} >= {"nearest class mean", "logistic regression"}
    inductive = answer_of("evaluate", tmp_path / "first", *few, "--mode", "inductive", "--shot", 5)
    assert 0 < inductive["accuracy"] <= 1

    calibrated = answer_of("calibrate", tmp_path / "first", "--data", data, "--episodes", 3, "--shot", 1)
    assert {row["mode"] for row in calibrated["temperatures"]} == set(loaded.model.modes)
    if not loaded.model.has_background:
        words = ["evaluate", tmp_path / "first", *few, "--way", 3, "--open", 2]
        assert "queries of no labelled class" in refusal_of(*words)

    row = classified(tmp_path, data)
    assert row["one"] + row["two"] == pytest.approx(1)
    served(tmp_path, data)
    for version in answer_of("models", "few-shot")["models"]:
        assert (version["kind"], version["method"]) == ("few-shot classifier", name)
    compared = answer_of("compare", tmp_path / "first", tmp_path / "second", *few)
    assert len(compared["rows"]) == 2
    more = ["--data", data, "--episodes", 30, "--query", 3, "--allow-equal", "--margin", 0.99]
    promoted = answer_of("promote", tmp_path / "second", "--name", "few-shot", *more)
    assert promoted
    assert "**`one`**" in answer_of("table", "one", "--results", tmp_path)["table"]


def classified(folder: Path, data: Path) -> dict[str, Any]:
    """The answer of `classify` for one image of the test split."""
    images = Dataset.open(data).images("test")
    for number, label in enumerate(("one", "two")):
        (folder / "support" / label).mkdir(parents=True)
        for shot in range(2):
            Image.fromarray(images[2 * number + shot][0]).save(folder / "support" / label / f"{shot}.png")
    (folder / "query").mkdir()
    Image.fromarray(images[9][0]).save(folder / "query" / "q.png")
    (row,) = answer_of("classify", folder / "first", "--support", folder / "support", "--query", folder / "query")[
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
