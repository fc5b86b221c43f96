"""MAML against a literal transcription of the inner loop by torch.autograd, and against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from literal_maml import (
    KINDS,
    K,
    S,
    answer,
    gradients,
    leaves,
    literal_loss,
    network,
    tasks,
)
from torch import Tensor

from metagmvae.training.methods.maml import MAML


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_meta_gradient_equal_the_literal_transcription(name: str) -> None:
    model = network(**KINDS[name])
    support, query = tasks(model)
    theta = leaves(model)
    expected, accuracy = literal_loss(model, theta, support, query)
    expected.backward()
    loss, metrics = model.task_loss(support, query)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert metrics["accuracy"].item() == pytest.approx(accuracy)
    found = gradients(model, support, query)
    assert found.keys() == theta.keys()
    for key, value in theta.items():
        assert value.grad is not None
        assert torch.allclose(found[key], value.grad, rtol=1e-7, atol=1e-9), key


def numeric(model: MAML, name: str, index: int, support: Tensor, query: Tensor) -> float:
    """Central difference of the loss with respect to one weight."""
    values = []
    with torch.no_grad():
        weight = model.initial_parameters()[name].view(-1)
        before = weight[index].item()
        for step in (1e-6, -1e-6):
            weight[index] = before + step
            values.append(model.task_loss(support, query)[0].item())
        weight[index] = before
    return (values[0] - values[1]) / 2e-6


def test_second_order_gradient_equals_finite_differences_and_the_first_order_one_does_not() -> None:
    exact, first = network(inner_rate=0.5), network(inner_rate=0.5, first_order=True)
    support, query = tasks(exact)
    found, approximate = gradients(exact, support, query), gradients(first, support, query)
    for name, gradient in found.items():
        index = int(gradient.abs().argmax())
        expected = numeric(exact, name, index, support, query)
        assert gradient.view(-1)[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-7), name
    assert not torch.allclose(found["classifier.weight"], approximate["classifier.weight"], rtol=0.05)


@pytest.mark.parametrize("first_order", [False, True])
def test_all_tasks_in_one_call_equal_one_after_the_other(first_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(network="mlp", first_order=first_order)
    support, query = tasks(model)
    labels = torch.arange(K).repeat_interleave(S)
    together = gradients(model, support, query)
    answered = answer(model, support, labels, query.flatten(1, 2), "transductive")
    monkeypatch.setattr(model, "on_features", False)
    for name, value in gradients(model, support, query).items():
        assert torch.allclose(value, together[name], rtol=1e-9, atol=1e-12), name
    apart = answer(model, support, labels, query.flatten(1, 2), "transductive")
    assert torch.allclose(apart, answered, rtol=1e-10)


def test_batch_normalisation_has_no_running_statistics_in_the_body_only() -> None:
    assert not dict(network().named_buffers())
    clusters = network(tasks="clusters")
    assert {name.split(".")[0] for name, _ in clusters.named_buffers()} == {"encoder"}
    assert set(clusters.initial_parameters()) == {
        name for name, _ in clusters.named_parameters() if not name.startswith("encoder.")
    }


def test_bfloat16_gives_nearly_the_same_gradient() -> None:
    """With one small step; several amplify the rounding."""
    model = network(inner_steps=1, inner_rate=0.01).float()
    support, query = (part.float() for part in tasks(model))
    exact = gradients(model, support, query)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(model, support, query)
    one, other = (torch.cat([g.flatten() for g in part.values()]) for part in (exact, rough))
    assert F.cosine_similarity(one, other, dim=0) > 0.9
