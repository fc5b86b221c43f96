"""`evaluate --shot S` evaluates the model that the run selected for S shots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from called_commands import answer_of, refusal_of

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.fewshot import evaluate_tasks as tasks_module
from metagmvae.evaluation.fewshot.encoding import encode_split
from metagmvae.evaluation.fewshot.evaluate_tasks import evaluate_tasks
from metagmvae.infra.cli import main
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.trainer.checkpoint import save_state
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.package import load_model
from metagmvae.training.trainer.stages import train

ACCURACIES = {"5w1s": (0.9, 0.1, 0.2), "5w5s": (0.1, 0.8, 0.3)}
"""At validations 1 to 3: model 1 is the best at one shot, model 2 at five shots, model 3 the last one."""


class FileContext(RunContext):
    """Saves checkpoints in a file."""

    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> TrainState | None:
        return None

    def report(self, line: MetricLine, state: TrainState | None) -> None:
        if state is not None:
            save_state(self.path, state)


def trained(path: Path, dataset: Dataset, selection: str) -> Path:
    """A checkpoint after three steps, with the validation results of ACCURACIES."""
    sections = {
        "model": {"channels": 4, "width": 8, "heads": 2, "latent": 3},
        "adapt": {"samples": 4},
        "train": {"steps": 3, "set_size": 10, "samples": 2, "learning_rate": 0.1, "selection": selection},
        "validation": {"every": 1},
    }
    count = iter(range(3))

    def validate(model: EncoderModel) -> dict[str, dict[str, float]]:
        number = next(count)
        return {task: {"accuracy": values[number], "ci95": 0.1} for task, values in ACCURACIES.items()}

    images = np.asarray(dataset.images("train")[np.arange(100)])
    train(Settings.model_validate(sections), images, (1, 28, 28), "data", FileContext(path), validate)
    return path


@pytest.mark.parametrize(("selection", "models"), [("last", 1), ("best-first-shot", 1), ("best", 2)])
def test_several_shots_are_those_of_one_call_each_and_a_model_encodes_once(
    selection: str,
    models: int,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trained(tmp_path / "checkpoint.pt", dataset, selection)
    encoded = []

    def count(*arguments: Any) -> Any:
        encoded.append(arguments)
        return encode_split(*arguments)

    monkeypatch.setattr(tasks_module, "encode_split", count)

    def answer(*words: str) -> dict[str, Any]:
        common = ["--query", "5", "--episodes", "20"]
        return dict(answer_of("evaluate", model, "--data", dataset.uri, *common, *words))

    several = answer("--ways", "3", "2", "--shot", "5", "1")
    assert len(encoded) == models
    assert [(row["way"], row["shot"]) for row in several["rows"]] == [(3, 5), (3, 1), (2, 5), (2, 1)]
    assert {(row["way"], row["shot"]) for row in several["reliability"]} == {(3, 5), (3, 1), (2, 5), (2, 1)}
    for row in several["rows"]:
        one = answer("--way", str(row["way"]), "--shot", str(row["shot"]))
        assert {key: one[key] for key in row.keys() - {"seconds"}} == {k: row[k] for k in row.keys() - {"seconds"}}
    assert answer("--way", "3", "--shot", "1").keys() >= {
        "accuracy",
        "ci95",
        "way",
        "shot",
        "query",
        "episodes",
        "seed",
    }

    record = ["evaluate", str(model), "--data", dataset.uri, "--shot", "1", "5", "--record", str(tmp_path / "r.json")]
    assert main([*record, "--way", "3", "--query", "5", "--episodes", "20"]) == (2 if models > 1 else 0)
    assert (tmp_path / "r.json").exists() == (models == 1)
    for words, reason in (
        (["--shot", "1", "1"], "--shot 1 1: a number occurs twice"),
        (["--shot", "1", "5", "--open", "1"], "--open: cannot be combined with several numbers in --shot"),
    ):
        assert reason in refusal_of(*record[:4], *words)


@pytest.mark.parametrize(
    ("selection", "shot", "step", "selected_by"),
    [
        ("best", 1, 1, "validation/5w1s"),
        ("best", 5, 2, "validation/5w5s"),
        ("best-first-shot", 5, 1, "validation/5w1s"),
        ("last", 5, 3, None),
    ],
)
def test_evaluate_uses_the_model_selected_for_its_shot(
    selection: str, shot: int, step: int, selected_by: str | None, dataset: Dataset, tmp_path: Path
) -> None:
    model, record = trained(tmp_path / "checkpoint.pt", dataset, selection), tmp_path / "record.json"
    task = {"way": 3, "shot": shot, "query": 5, "episodes": 20, "seed": 0}
    words = [word for key, value in task.items() for word in (f"--{key}", str(value))]
    command = ["evaluate", str(model), "--data", dataset.uri, *words, "--record", str(record), "--json"]
    assert main(command) == 0
    answer = json.loads(record.read_text())
    assert (answer["trained"]["step"], answer["trained"].get("selected_by")) == (step, selected_by)
    (expected,) = evaluate_tasks(load_model(model, shot=shot), dataset, [task])
    assert answer["accuracy"] == expected.mean
