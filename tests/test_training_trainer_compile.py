"""`train.compile`: which networks are compiled, and that a compiled training equals a plain one."""

from __future__ import annotations

from typing import Any

import pytest
import small_tasks
import torch
from torch import nn

from metagmvae.configs.schema import Settings
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.stages import train

SMALL = {"latent": 2, "channels": 4, "width": 8, "heads": 2, "layers": 1}
META = {"steps": 2, "set_size": 6, "samples": 3, "components": 2, "batch": 2, "log_every": 1}


def settings(method: dict[str, Any], compiled: bool = False) -> Settings:
    changes = {"model": SMALL, "train": META | {"compile": compiled}, "validation": {"every": 0}}
    return small_tasks.settings({"inner_rate": 0.1} | method, **changes, pretrain={"steps": 2})


KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "meta-gmvae": ({}, {"encoder", "attention", "decoder"}),
    "protonets": ({"name": "protonets", "tasks": "labels"}, {"encoder"}),
    "protonets of clusters": ({"name": "protonets", "partitions": 1}, {"encoder", "own_body"}),
    "maml of labels": ({"name": "maml", "tasks": "labels"}, set()),
    "maml of clusters": ({"name": "maml", "partitions": 1}, {"encoder"}),
}
"""Settings of the method, and the networks that are compiled. On clusters the encoder is a network of its own."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_networks_that_are_compiled(kind: str) -> None:
    method, expected = KINDS[kind]
    options = settings(method)
    model = build_model(options.model, small_tasks.SHAPE, 0, options.method)
    compiled = {id(network) for network in model.compiled_networks}
    assert {name for name, network in model.named_children() if id(network) in compiled} == expected
    assert len(compiled) == len(expected)


class Memory(RunContext):
    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self) -> None:
        self.losses: list[float] = []

    def load(self) -> None:
        return None

    def report(self, line: MetricLine | None, state: TrainState | None) -> None:
        assert line is not None
        self.losses.append(float(line["loss"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # read by the tracer itself
@pytest.mark.parametrize("kind", [kind for kind, (_, compiled) in KINDS.items() if compiled])
def test_a_compiled_training_equals_a_plain_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tracer of torch.compile and no code generation. It must not leave out a network, as it does in silence
    where one is differentiated by torch.func."""
    from torch._dynamo.utils import counters

    compile_network = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_network(self, backend="eager"))
    runs = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        context, options = Memory(), settings(KINDS[kind][0], compiled)
        labels = small_tasks.LABELS if options.method.tasks == "labels" else None
        train(options, small_tasks.images(), small_tasks.SHAPE, "data", context, labels=labels)
        runs.append(context.losses)
    assert len(runs[0]) == 4
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert counters["frames"]["ok"] >= len(KINDS[kind][1])
    assert not counters["unimplemented"]
