"""Training from scratch: a new network of each episode, by its seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from literal_maml import literal_fit, literal_logits
from small_tasks import SHAPE
from torch import Tensor

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import AdaptSettings, ModelSettings
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.methods.maml import MAML
from metagmvae.training.methods.scratch import Scratch

MODEL = ModelSettings(channels=3)
LABELS = [0, 0, 1, 1, 2, 2, 3, 3]
"""Of four classes; the model itself has an output for each of two."""


def network(**method: Any) -> Scratch:
    torch.manual_seed(0)
    options = {"name": "scratch", "way": 2, "inner_rate": 0.1, "test_steps": 3}
    return Scratch(MODEL, MethodSettings(**options | method), SHAPE).eval()


def episodes(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, len(LABELS) + 5, *SHAPE, generator=generator)
    return x[:, : len(LABELS)], x[:, len(LABELS) :]


def answer(model: Scratch, support: Tensor, query: Tensor, seeds: list[int], mode: str = "transductive") -> Tensor:
    with torch.inference_mode():
        return model.log_posteriors(
            AdaptSettings(),
            support + 0,
            torch.tensor(LABELS),
            query + 0,
            mode=mode,  # type: ignore[arg-type]
            seed_by_episode=seeds,
        )


@pytest.mark.parametrize("mode", ["transductive", "inductive"])
def test_each_episode_equals_the_literal_training_of_a_new_network(mode: str) -> None:
    """In float64 from the same new weights; for more classes than the model itself has outputs."""
    support, query = episodes()
    found = answer(network().double(), support.double(), query.double(), [5, 6, 7], mode)
    for e, seed in enumerate([5, 6, 7]):
        torch.manual_seed(keyed_generator(torch.device("cpu"), "scratch", seed).initial_seed())
        new = MAML(MODEL, MethodSettings(name="maml", tasks="labels", way=4), SHAPE).double()
        theta = {name: value.detach().requires_grad_() for name, value in new.named_parameters()}
        images, queries = support[e].double(), query[e].double()
        fitted = literal_fit(theta, images, LABELS, 3, 0.1, True)
        logits = literal_logits(fitted, queries)
        if mode == "inductive":
            logits = torch.cat([literal_logits(fitted, torch.cat([images, q[None]]))[-1:] for q in queries])
        assert torch.allclose(found[e], torch.log_softmax(logits, dim=1).detach(), rtol=1e-8)


def test_the_answer_depends_on_the_seed_of_the_episode_alone() -> None:
    """Neither on the weights of the model, nor on the other episodes, nor on the global random state."""
    model = network()
    support, query = episodes()
    found = answer(model, support, query, [5, 6, 7])
    state = torch.random.get_rng_state()
    again = answer(Scratch(MODEL, model.settings, SHAPE), support[1:], query[1:], [6, 7])
    assert torch.equal(again, found[1:])
    torch.random.set_rng_state(state)
    answer(model, support, query, [5, 6, 7])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.allclose(answer(model, support[:1], query[:1], [8]), found[:1], atol=1e-3)


def test_it_learns_the_support() -> None:
    model = network(test_steps=60, inner_rate=0.5)
    support, _ = episodes(2)
    found = answer(model, support, support, [5, 6])
    assert (found.argmax(dim=2) == torch.tensor(LABELS)).double().mean() > 0.9


def test_on_features_all_episodes_in_one_call_equal_each_alone() -> None:
    model = network(network="mlp")
    support, query = (torch.rand(3, count, model.feature_dim) for count in (len(LABELS), 5))
    found = answer(model, support, query, [5, 6, 7])
    for e in range(3):
        alone = answer(model, support[e : e + 1], query[e : e + 1], [5 + e])
        assert torch.allclose(alone[0], found[e], atol=1e-5)
    assert not torch.allclose(found[0], answer(model, support[:1], query[:1], [9])[0], atol=1e-3)


def test_it_has_one_network_whatever_the_tasks() -> None:
    for tasks in ("clusters", "labels"):
        model = network(tasks=tasks)
        assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"encoder", "classifier"}
