"""PsCo: Sinkhorn's marginals, both losses against the formulas of Jang et al., queue and momentum networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretraining_objectives import gradients, random_images, small_settings, small_step
from torch import Tensor

from metagmvae.configs.schema import PretrainSettings
from metagmvae.training.pretraining.psco import (
    PscoStep,
    moco_loss,
    pseudo_shots,
    pseudo_supervised_loss,
    sinkhorn,
    update_momentum,
)


def unit(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=-1)


def psco_step(dtype: torch.dtype = torch.float64, **pretrain: object) -> PscoStep:
    options = {"projector": (12, 6), "queue": 20, "shots": 2, "momentum": 0.9} | pretrain
    step = small_step(PscoStep, small_settings("psco", **options), dtype=dtype)
    assert isinstance(step, PscoStep)
    return step


# --- Sinkhorn ---------------------------------------------------------------------------------------------


def test_sinkhorn_equals_alternating_normalisation() -> None:
    similarity = unit(4, 6) @ unit(10, 6, seed=1).T
    mass = [[math.exp(float(s) / 0.05) for s in row] for row in similarity]
    for _ in range(3):
        columns = [sum(row[j] for row in mass) for j in range(10)]
        mass = [[row[j] / columns[j] / 10 for j in range(10)] for row in mass]
        mass = [[value / sum(row) / 4 for value in row] for row in mass]
    assert sinkhorn(similarity).numpy() == pytest.approx(4 * np.array(mass), rel=1e-10)


def test_marginals_of_sinkhorn() -> None:
    """Rows sum to 1 after any number of iterations; columns to N / Q when they have converged."""
    similarity = unit(8, 5) @ unit(24, 5, seed=1).T
    few, many = sinkhorn(similarity), sinkhorn(similarity, iterations=2_000)
    for assignment in (few, many):
        assert torch.allclose(assignment.sum(dim=1), torch.ones(8, dtype=torch.float64))
    assert torch.allclose(many.sum(dim=0), torch.full((24,), 8 / 24, dtype=torch.float64), rtol=1e-6)
    nearest = (similarity / 0.05).softmax(dim=1)
    spread = [float((assignment.sum(dim=0) - 8 / 24).abs().max()) for assignment in (nearest, few)]
    assert spread[1] < spread[0]


def test_shots_are_shared_out() -> None:
    """Two equal keys nearest to the same entry: by similarity alone the third key, less near, has it as well; with
    equal marginals each entry serves the keys that need it most."""
    similarity = torch.tensor([[0.9, 0.8, 0.0], [0.9, 0.1, 0.0], [0.9, 0.1, 0.7]])
    assert similarity.argmax(dim=1).tolist() == [0, 0, 0]
    assert pseudo_shots(similarity, 1)[:, 0].tolist() == [1, 0, 2]


def test_large_similarities_stay_finite_in_float32() -> None:
    assert sinkhorn(torch.full((3, 4), 90.0)).isfinite().all()


# --- losses -----------------------------------------------------------------------------------------------


def test_moco_loss_equals_its_formula() -> None:
    query, key, queue = unit(4, 6), unit(4, 6, seed=1), unit(9, 6, seed=2)
    total = 0.0
    for i in range(4):
        positive = math.exp(float(query[i] @ key[i]) / 0.2)
        negatives = sum(math.exp(float(query[i] @ entry) / 0.2) for entry in queue)
        total -= math.log(positive / (positive + negatives)) / 4
    assert float(moco_loss(query, key, queue, 0.2)) == pytest.approx(total, rel=1e-10)


def test_pseudo_supervised_loss_equals_its_formula() -> None:
    query, shots = unit(4, 6), unit(4, 3, 6, seed=1)
    total = 0.0
    for i in range(4):
        everything = sum(math.exp(float(query[i] @ s)) for own in shots for s in own)
        total -= sum(math.log(math.exp(float(query[i] @ s)) / everything) for s in shots[i]) / 3 / 4
    assert float(pseudo_supervised_loss(query, shots, 0)) == pytest.approx(total, rel=1e-10)


def test_pseudo_supervised_loss_of_two_ranks_equals_one_process() -> None:
    query, shots = unit(4, 6), unit(4, 3, 6, seed=1)
    halves = [float(pseudo_supervised_loss(query[first : first + 2], shots, first)) for first in (0, 2)]
    assert np.mean(halves) == pytest.approx(float(pseudo_supervised_loss(query, shots, 0)), rel=1e-12)


# --- the step ---------------------------------------------------------------------------------------------


def test_loss_of_a_step() -> None:
    """The parts in the order of the published code, in training mode."""
    step, other = psco_step(), psco_step()
    query_view, key_view = step.prepare(random_images(5), 1)
    query_view, key_view = query_view.double(), key_view.double()
    loss, metrics = step.compute(query_view, key_view)
    modules = other.auxiliary
    queue = modules.queue.clone()
    query = F.normalize(modules.predictor(modules.projector(other.encoder(query_view))))
    # Before the first update of the weights the momentum networks equal the trained ones.
    key = F.normalize(modules.projector(other.encoder(key_view))).detach()
    chosen = sinkhorn(key @ queue.T).topk(2).indices
    supervised = 0.0
    for i in range(5):
        everything = sum(torch.exp(query[i] @ queue[j]) for row in chosen for j in row)
        supervised = supervised - sum(torch.log(torch.exp(query[i] @ queue[j]) / everything) for j in chosen[i]) / 2 / 5
    expected = supervised + moco_loss(query, key, queue, 0.2)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert float(metrics["moco_loss"] + metrics["supervised_loss"]) == pytest.approx(float(loss.detach()), rel=1e-12)
    ours, theirs = gradients(loss, step), gradients(expected, other)
    assert not any("momentum" in name for name in ours)
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-6, atol=1e-10), name
    assert torch.allclose(step.auxiliary.queue[:5], key)


def test_queue_replaces_the_oldest_entries() -> None:
    step = psco_step(batch=4, queue=7)
    before = step.auxiliary.queue.clone()
    first, second = unit(4, 6, seed=8), unit(4, 6, seed=9)
    step.auxiliary.enqueue(first)
    assert torch.equal(step.auxiliary.queue, torch.cat([first, before[4:]]))
    step.auxiliary.enqueue(second)
    assert torch.equal(step.auxiliary.queue, torch.cat([second[3:], first[1:], second[:3]]))
    assert int(step.auxiliary.position) == 1


def test_momentum_networks_follow_the_trained_ones() -> None:
    step = psco_step()
    copied, original = step.auxiliary.momentum_encoder, step.encoder
    start = [p.clone() for p in copied.parameters()]
    with torch.no_grad():
        for p in original.parameters():
            p.add_(1.0)
    original(torch.rand(4, 1, 8, 8, dtype=torch.float64))  # moves the running statistics
    update_momentum(copied, original, 0.75)
    for old, new in zip(start, copied.parameters(), strict=True):
        assert torch.allclose(new, old + 0.25)
        assert not new.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(copied.buffers(), original.buffers(), strict=True))


def test_state_has_queue_position_and_momentum_weights() -> None:
    """A step from a restored state equals the step of the original."""
    step, restored = psco_step(torch.float32), psco_step(torch.float32)
    for number in (1, 2, 3):
        step(random_images(8, seed=number), number)
    restored.load_state_dict(step.state_dict())
    left, right = (float(s(random_images(8), 4)[0].detach()) for s in (step, restored))
    assert left == right
    assert int(restored.auxiliary.position) == 32 % 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": ()}, "projector"),
        ({"queue": 200}, r"batch \(256\) exceeds queue \(200\)"),
        ({"queue": 300, "shots": 301}, r"shots \(301\) exceeds queue \(300\)"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainSettings.model_validate({"objective": "psco", "projector": (8, 4)} | changes)
