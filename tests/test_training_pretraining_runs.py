"""Complete runs of each objective: falling losses, exact resume, two ranks, and meta-training after them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pretraining_objectives import gradients, small_settings, small_step
from rank_processes import run_on_two_ranks

from metagmvae.configs.load import LATER_KEYS
from metagmvae.configs.schema import PretrainSettings, Settings
from metagmvae.pipelines.sources.glyphs import draw_glyph
from metagmvae.training.device import distributed
from metagmvae.training.pretraining.objectives_by_name import OBJECTIVES
from metagmvae.training.pretraining.psco import PscoStep
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.stages import train

SHAPE = (1, 28, 28)
PRETRAIN: dict[str, dict[str, Any]] = {
    "nt-xent": {"projector": (16, 8)},
    "prototypes": {"query_views": 2},
    "acai": {"projector": (16,)},
    "bigan": {"projector": (8,), "beta1": 0.5},
    "deepcluster": {"clusters": 6},
    "psco": {"projector": (32, 16), "queue": 40, "shots": 2, "momentum": 0.9},
}
FALLING = {"acai": "squared_error", "bigan": "discriminator_loss"}
"""What must fall where the loss is that of two sides; else the loss."""


def settings(objective: str, steps: int = 12, meta_steps: int = 0, learning_rate: float = 3e-3) -> Settings:
    common = {"objective": objective, "steps": steps, "batch": 16, "schedule": "constant"}
    sections = {
        "model": {"channels": 8, "width": 16, "latent": 4, "heads": 2, "layers": 1},
        "pretrain": common | {"learning_rate": learning_rate} | PRETRAIN[objective],
        "train": {
            "steps": meta_steps,
            "set_size": 8,
            "samples": 2,
            "components": 2,
            "log_every": 1,
            "checkpoint_every": 5,
        },
        "validation": {"every": 0},
    }
    return Settings.model_validate(sections)


def glyphs(classes: int = 8, each: int = 5) -> np.ndarray:
    """uint8 (classes * each, 1, 28, 28)."""
    return np.stack([draw_glyph(0, "train", number, drawing) for number in range(classes) for drawing in range(each)])


class MemoryContext(RunContext):
    """Keeps metric lines and the last checkpoint; raises before it records the line of step `killed_at`."""

    device = torch.device("cpu")

    def __init__(self, path: Path, killed_at: int = 0) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.path, self.killed_at = path, killed_at
        self.lines: list[MetricLine] = []

    def load(self) -> TrainState | None:
        return load_state(self.path) if self.path.exists() else None

    def report(self, line: MetricLine | None, state: TrainState | None) -> None:
        if line is not None and line["step"] == self.killed_at:
            raise InterruptedError
        if line is not None:
            self.lines.append(line)
        if state is not None:
            save_state(self.path, state)


def run(context: MemoryContext, options: Settings, kind: Any = "encoder") -> TrainState:
    return train(options, glyphs(), SHAPE, "data", context, kind=kind)


def assert_same(left: Any, right: Any, path: str = "") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path


def test_every_objective_is_described_in_the_settings_and_has_a_run_here() -> None:
    description = PretrainSettings.model_fields["objective"].description or ""
    assert set(re.findall("`([a-z-]+)`", description)) == set(OBJECTIVES) == set(PRETRAIN)


@pytest.fixture(scope="module")
def many_glyphs() -> np.ndarray:
    return glyphs(classes=40, each=20)


@pytest.mark.parametrize("objective", PRETRAIN)
def test_loss_falls_on_glyphs(objective: str, many_glyphs: np.ndarray, tmp_path: Path) -> None:
    """40 steps, within the first epoch."""
    context = MemoryContext(tmp_path / "checkpoint.pt")
    options = settings(objective, 40, learning_rate=3e-3 if objective in FALLING else 1e-2)
    train(options, many_glyphs, SHAPE, "data", context, kind="encoder")
    values = [float(line[FALLING.get(objective, "loss")]) for line in context.lines]
    assert len(values) == 40
    assert np.mean(values[-10:]) < 0.97 * np.mean(values[:10])


@pytest.mark.parametrize("objective", PRETRAIN)
def test_killed_and_resumed_run_equals_the_uninterrupted_one(objective: str, tmp_path: Path) -> None:
    """An epoch has two steps; the last checkpoint is that of step 5, the first step of an epoch."""
    whole = MemoryContext(tmp_path / "whole.pt")
    torch.manual_seed(1)
    run(whole, settings(objective))
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        run(MemoryContext(tmp_path / "killed.pt", killed_at=8), settings(objective))
    assert load_state(tmp_path / "killed.pt")["step"] == 5
    torch.manual_seed(2)
    resumed = MemoryContext(tmp_path / "killed.pt")
    run(resumed, settings(objective))
    left, right = load_state(whole.path), load_state(resumed.path)
    assert set(left["projector"]) == set(right["projector"])
    for part in ("model", "projector", "optimizer", "schedule", "stage", "step"):
        assert_same(left[part], right[part], part)
    times = {"images_per_s", "elapsed_s", "waiting_share"}
    for a, b in zip(whole.lines[5:], resumed.lines, strict=True):
        assert {k: v for k, v in a.items() if k not in times} == {k: v for k, v in b.items() if k not in times}


@pytest.mark.parametrize("objective", ["acai", "bigan", "deepcluster", "psco"])
def test_meta_training_follows(objective: str, tmp_path: Path) -> None:
    context = MemoryContext(tmp_path / "checkpoint.pt")
    state = run(context, settings(objective, steps=2, meta_steps=2), kind="learner")
    assert [line["stage"] for line in context.lines] == ["pretrain", "pretrain", "meta", "meta"]
    assert (state["stage"], state["step"]) == ("meta", 2)


def test_new_classifier_of_deepcluster_starts_anew_in_the_optimiser(tmp_path: Path) -> None:
    """After step 11, the first of an epoch, Adam has taken one step for the classifier and 11 for the encoder."""
    state = run(MemoryContext(tmp_path / "checkpoint.pt"), settings("deepcluster", steps=11))
    steps = [int(entry["step"]) for entry in state["optimizer"]["state"].values()]
    assert steps == [11] * (len(steps) - 2) + [1, 1]


def test_defaults_of_the_new_settings_are_no_part_of_fingerprints() -> None:
    later = {(section, key): default for section, key, default in LATER_KEYS}
    for key in ("clusters", "shots", "queue", "momentum", "beta1", "objective"):
        assert later["pretrain", key] == PretrainSettings.model_fields[key].default


# --- two ranks --------------------------------------------------------------------------------------------


def rank_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        result: dict[str, Any] = {"psco step": psco_eval(rank)}
        for objective in ("bigan", "deepcluster", "psco"):
            killed, whole = (Path(folder) / f"{objective} {name}.pt" for name in ("killed", "whole"))
            with contextlib.suppress(InterruptedError):
                run(MemoryContext(killed, killed_at=7), settings(objective, steps=8))
            distributed.barrier()
            for name, path in (("resumed", killed), ("whole", whole)):
                state = run(MemoryContext(path), settings(objective, steps=8))
                tensors = {"model": state["model"], "projector": state["projector"]}
                result[f"{objective} {name}"] = {
                    f"{part}.{key}": value.clone() for part, values in tensors.items() for key, value in values.items()
                }
        torch.save(result, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def psco_eval(rank: int | None) -> dict[str, Any]:
    """Mean loss and gradient of a batch with fixed statistics, and the queue; on a rank's half, or in one process."""
    step = small_step(PscoStep, small_settings("psco", projector=(8, 4), queue=20, shots=2)).eval()
    generator = torch.Generator().manual_seed(0)
    views = [torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    if rank is not None:
        views = [view[3 * rank : 3 * rank + 3] for view in views]
    loss, _ = step.compute(*views)
    mean = distributed.mean_over_ranks(loss)
    averaged = {name: distributed.mean_over_ranks(value) for name, value in gradients(loss, step).items()}
    return {"loss": mean, "queue": step.auxiliary.queue, "gradients": averaged}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_two_ranks(rank_worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("objective", ["bigan", "deepcluster", "psco"])
def test_two_ranks_agree_and_resume_exactly(objective: str, ranks: list[dict[str, Any]]) -> None:
    """Weights, clusters and queue. Running statistics are those of the last batch of a rank; rank 0's are stored."""
    first, second = (rank[f"{objective} whole"] for rank in ranks)
    assert_same(first, ranks[0][f"{objective} resumed"])
    for name, value in first.items():
        if not name.endswith(("running_mean", "running_var")):
            assert torch.equal(value, second[name]), name


def test_psco_on_two_ranks_equals_one_process(ranks: list[dict[str, Any]]) -> None:
    expected = psco_eval(None)
    for rank in ranks:
        assert torch.allclose(rank["psco step"]["loss"], expected["loss"], rtol=1e-10)
        assert torch.allclose(rank["psco step"]["queue"], expected["queue"])
        for name, gradient in expected["gradients"].items():
            assert torch.allclose(rank["psco step"]["gradients"][name], gradient, rtol=1e-6, atol=1e-10), name
