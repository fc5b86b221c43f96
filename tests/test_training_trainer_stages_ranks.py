"""Complete runs on two gloo ranks: both ranks agree, and without batch statistics they equal one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_processes import run_on_two_ranks

from metagmvae.configs.schema import Settings
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.context import RunContext
from metagmvae.training.trainer.stages import train

SHAPE = (1, 8, 8)


def settings() -> Settings:
    """Meta-training on frozen features: nothing that it trains uses batch normalisation."""
    sections = {
        "model": {
            "reconstruct": "features",
            "latent": 2,
            "channels": 4,
            "width": 8,
            "heads": 2,
            "layers": 1,
        },
        "pretrain": {"steps": 5, "batch": 8},
        "train": {
            "steps": 6,
            "batch": 4,
            "set_size": 6,
            "samples": 3,
            "components": 2,
            "em_iterations": 2,
            "log_every": 4,
            "checkpoint_every": 5,
        },
        "validation": {"every": 3},
    }
    return Settings.model_validate(sections)


class MemoryContext(RunContext):
    """Records lines and counts checkpoints; starts from checkpoint `start`, saves that of pre-training to `leave`."""

    device = torch.device("cpu")

    def __init__(self, start: Path | None, leave: Path | None) -> None:
        self.start, self.leave = start, leave
        distributed = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.lines: list[dict[str, Any]] = []
        self.states = 0

    def load(self) -> Any:
        return load_state(self.start) if self.start else None

    def report(self, line: Any, state: Any) -> None:
        self.lines.append(dict(line))
        self.states += state is not None
        if self.leave and state is not None and state["stage"] == "pretrain":
            save_state(self.leave, state)


def validate(model: MetaGMVAE) -> dict[str, dict[str, float]]:
    assert not dist.is_initialized() or dist.get_rank() == 0
    return {"5w1s": {"accuracy": 0.5, "ci95": 0.1}}


def trained(start: Path | None = None, leave: Path | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = (rng.random((40, *SHAPE)) < 0.3).astype(np.uint8) * 255
    context = MemoryContext(start, leave)
    state = train(settings(), images, SHAPE, "", context, validate)
    return {"model": dict(state["model"]), "lines": context.lines, "states": context.states}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        pretrained = Path(folder) / "pretrained-by-two.pt"
        result = {"complete": trained(leave=pretrained), "resumed": trained(start=pretrained)}
        result["meta"] = trained(start=Path(folder) / "pretrained.pt")
        torch.save(result, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one_process(folder: Path) -> dict[str, Any]:
    return trained(leave=folder / "pretrained.pt")


@pytest.fixture(scope="module")
def ranks(folder: Path, one_process: dict[str, Any]) -> list[dict[str, Any]]:
    return run_on_two_ranks(worker, folder)


@pytest.mark.parametrize("kind", ["complete", "resumed", "meta"])
def test_both_ranks_end_with_the_same_weights_and_lines(kind: str, ranks: list[dict[str, Any]]) -> None:
    """Running statistics too: both ranks must encode with the same ones, although their last batches differed."""
    first, second = (rank[kind] for rank in ranks)
    for name in first["model"]:
        assert torch.equal(first["model"][name], second["model"][name]), name
    shared = ("stage", "step", "global_step", "loss", "gradient_norm", "checkpoint")
    assert [[line[k] for k in shared] for line in first["lines"]] == [
        [line[k] for k in shared] for line in second["lines"]
    ]
    validated = [line["step"] for line in first["lines"] if "validation/5w1s" in line]
    assert validated == [3, 6]
    assert not any("validation/5w1s" in line for line in second["lines"])
    assert first["states"] == sum(line["checkpoint"] for line in first["lines"])
    assert second["states"] == 0


def test_two_ranks_resume_exactly(ranks: list[dict[str, Any]]) -> None:
    """A checkpoint has rank 0's running statistics, so an uninterrupted run must continue with those as well."""
    for rank in ranks:
        for name, value in rank["complete"]["model"].items():
            assert torch.equal(value, rank["resumed"]["model"][name]), name


def test_two_ranks_continue_a_run_of_one_process_like_one_process(
    ranks: list[dict[str, Any]], one_process: dict[str, Any]
) -> None:
    two = ranks[0]["meta"]
    for name, value in one_process["model"].items():
        close = torch.isclose(two["model"][name], value, rtol=1e-4, atol=1e-5)
        if name.endswith("project.bias"):
            close[8:16] = True  # the bias of keys cancels in the softmax: Adam amplifies rounding errors
        # Adam divides by the gradient's size: where that is nearly zero, rounding changes a weight.
        assert (~close).sum() <= 1e-5 * value.numel(), name
        assert torch.allclose(two["model"][name][~close], value[~close], rtol=0, atol=1e-3), name
    meta = [line for line in one_process["lines"] if line["stage"] == "meta"]
    assert [line["step"] for line in meta] == [line["step"] for line in two["lines"]]
    for a, b in zip(meta, two["lines"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
