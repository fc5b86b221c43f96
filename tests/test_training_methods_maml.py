"""MAML against a literal transcription of the inner loop by torch.autograd, and against finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_tasks import SHAPE
from torch import Tensor

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import AdaptSettings, ModelSettings
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.pipelines.records import DataError
from metagmvae.training.methods.maml import MAML
from metagmvae.training.methods.scratch import Scratch

ADAPT = AdaptSettings()
K, S, Q = 3, 2, 3


def network(kind: type[MAML] = MAML, **method: Any) -> MAML:
    """A small model in float64; on a constant map of zeros a ReLU would be at its kink, so the maps have a bias."""
    torch.manual_seed(0)
    options = {"name": "maml", "tasks": "labels", "way": K, "inner_steps": 2, "inner_rate": 0.1, "test_steps": 3}
    model = kind(ModelSettings(channels=3), MethodSettings(**options | method), SHAPE).double()
    for name, value in model.named_parameters():
        if name.endswith("norm.bias"):
            torch.nn.init.uniform_(value, 0.1, 0.5)
    if model.on_features:
        model.scale.set_statistics(torch.zeros(model.feature_dim), torch.full((model.feature_dim,), 0.5))
    return model.eval()


def tasks(model: MAML, b: int = 2, shots: int = S) -> tuple[Tensor, Tensor]:
    """Support (b, K, S, ...) and queries (b, K, Q, ...)."""
    generator = torch.Generator().manual_seed(1)
    shape = (model.feature_dim,) if model.on_features else SHAPE
    values = torch.rand(b, K, shots + Q, *shape, generator=generator, dtype=torch.float64)
    return values[:, :, :shots], values[:, :, shots:]


def literal_logits(theta: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network in elementary operations, with the statistics of the batch: Table 3 and a linear classifier."""
    if "own_body.0.weight" in theta:
        hidden = (x @ theta["own_body.0.weight"].T + theta["own_body.0.bias"]).clamp_min(0)
        h = hidden @ theta["own_body.2.weight"].T + theta["own_body.2.bias"]
    else:
        for level in range(4):
            block = f"encoder.blocks.{level}"
            x = F.conv2d(x, theta[f"{block}.conv.weight"], padding=1)
            mean = x.mean(dim=(0, 2, 3), keepdim=True)
            variance = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
            weight, bias = (theta[f"{block}.norm.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
            x = F.relu((x - mean) / (variance + 1e-5).sqrt() * weight + bias)
            x = F.max_pool2d(x, 2, ceil_mode=True)
        h = x.flatten(1)
    return h @ theta["classifier.weight"].T + theta["classifier.bias"]


def literal_fit(
    theta: dict[str, Tensor], images: Tensor, labels: list[int], steps: int, rate: float, first_order: bool
) -> dict[str, Tensor]:
    """Steps of gradient descent on the mean cross-entropy of the labelled images."""
    ways = max(labels) + 1
    for _ in range(steps):
        logits = literal_logits(theta, images)[:, :ways]
        total = torch.zeros((), dtype=torch.float64)
        for t, label in enumerate(labels):
            total = total - (logits[t, label] - torch.logsumexp(logits[t], dim=0))
        loss = total / len(labels)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
        theta = {name: value - rate * g for (name, value), g in zip(theta.items(), gradients, strict=True)}
    return theta


def leaves(model: MAML) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in model.initial_parameters().items()}


def literal_loss(model: MAML, theta: dict[str, Tensor], support: Tensor, query: Tensor) -> tuple[Tensor, float]:
    """Loss and accuracy of Eq. 1, task by task and query by query."""
    settings = model.settings
    total, correct = torch.zeros((), dtype=torch.float64), 0
    for task in range(len(support)):
        labels = [k for k in range(K) for _ in range(support.shape[2])]
        options = (settings.inner_steps, settings.inner_rate, settings.first_order)
        fitted = literal_fit(theta, support[task].flatten(0, 1), labels, *options)
        logits = literal_logits(fitted, query[task].flatten(0, 1))
        for p in range(K * Q):
            total = total - (logits[p, p // Q] - torch.logsumexp(logits[p], dim=0))
            correct += int(logits[p].argmax() == p // Q)
    queries = len(support) * K * Q
    return total / queries, correct / queries


def gradients(model: MAML, support: Tensor, query: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.task_loss(support, query)[0].backward()
    return {name: p.grad.clone() for name, p in model.initial_parameters().items() if p.grad is not None}


KINDS: dict[str, dict[str, Any]] = {
    "second order": {},
    "first order": {"first_order": True},
    "one step": {"inner_steps": 1},
    "features": {"network": "mlp"},
    "first order on features": {"network": "mlp", "first_order": True},
}


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


def answer(model: MAML, support: Tensor, labels: Tensor, query_EP: Tensor, mode: str) -> Tensor:
    """`log_posteriors` in inference mode, as evaluation calls it."""
    with torch.inference_mode():
        return model.log_posteriors(
            ADAPT,
            (support.flatten(1, 2) if support.ndim > query_EP.ndim else support) + 0,
            labels + 0,
            query_EP + 0,
            mode=mode,  # type: ignore[arg-type]
            seed_by_episode=range(len(support)),
        )


@pytest.mark.parametrize("mode", ["transductive", "inductive"])
@pytest.mark.parametrize("name", ["second order", "features"])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [2, 0, 1, 0, 1, 1], [0, 1, 1, 0, 1, 0]])
def test_adaptation_at_test_equals_the_literal_transcription(name: str, labels: list[int], mode: str) -> None:
    """Unequal shots, and fewer classes than outputs: then the first outputs are used."""
    model = network(**KINDS[name])
    support, query = tasks(model)
    found = answer(model, support, torch.tensor(labels), query.flatten(1, 2), mode)
    ways = max(labels) + 1
    for e in range(2):
        images, queries = support[e].flatten(0, 1), query[e].flatten(0, 1)
        fitted = literal_fit(leaves(model), images, labels, 3, 0.1, True)
        logits = literal_logits(fitted, queries)
        for p in range(K * Q):
            if mode == "inductive":
                logits[p] = literal_logits(fitted, torch.cat([images, queries[p : p + 1]]))[-1]
            expected = torch.log_softmax(logits[p, :ways], dim=0)
            assert torch.allclose(found[e, p], expected.detach(), rtol=1e-8), (e, p)
    assert found.dtype == torch.float64
    assert found.shape == (2, K * Q, ways)


def test_evaluation_leaves_the_model_as_it_is_and_does_not_depend_on_the_batching() -> None:
    for method in ({}, {"network": "mlp"}):
        model = network(**method)
        support, query = tasks(model, b=3)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        labels = torch.arange(K).repeat_interleave(S)
        found = answer(model, support, labels, query.flatten(1, 2), "transductive")
        for e in range(3):
            alone = answer(model, support[e : e + 1], labels, query[e : e + 1].flatten(1, 2), "transductive")
            assert torch.allclose(alone[0], found[e], rtol=1e-10)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_an_inductive_answer_depends_on_no_other_query_and_a_transductive_one_does() -> None:
    model = network()
    support, query = tasks(model, b=1)
    labels, query_EP = torch.arange(K).repeat_interleave(S), query.flatten(1, 2)
    for mode in ("inductive", "transductive"):
        both, fewer = (answer(model, support, labels, part, mode) for part in (query_EP, query_EP[:, :4]))
        assert torch.equal(both[:, :4], fewer) == (mode == "inductive")


@pytest.mark.parametrize("kind", [MAML, Scratch])
@pytest.mark.parametrize("method", [{}, {"network": "mlp"}], ids=["images", "features"])
def test_a_support_is_fitted_once_and_inductive_queries_are_classified_as_if_alone(
    kind: type[MAML], method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a task with unequal shots; bit for bit, with all queries in one call or each in its own."""
    model = network(kind, **method)
    support, query = (part[0].flatten(0, 1) for part in tasks(model, b=1))
    labels, loops = np.array([2, 0, 1, 1, 0, 1]), []
    fit = model.fit
    monkeypatch.setattr(model, "fit", lambda *arguments: loops.append(1) or fit(*arguments))

    def predict(net: MAML, query: Tensor, **changes: Any) -> Tensor:
        task = {"h_TF": support, "label_T": labels, "mode": "inductive", "seed": 3} | changes
        return predict_queries(net, ADAPT, h_PF=query, **task)

    together = predict(model, query)
    assert len(loops) == 1
    alone = [predict(network(kind, **method), each[None])[0] for each in query]
    assert torch.equal(torch.stack(alone), together)
    # A stream of queries is one support.
    assert torch.equal(torch.cat([predict(model, each[None]) for each in query]), together)
    assert len(loops) == 1
    # Another support, other labels, another seed and other weights are others.
    others = ({"h_TF": support.flip(0)}, {"label_T": np.repeat([0, 1, 2], 2)}, {"seed": 4})
    for number, changes in enumerate(others, start=2):
        assert torch.equal(predict(model, query, **changes), predict(network(kind, **method), query, **changes))
        assert len(loops) == number
    other = network(kind, **method)
    with torch.no_grad():
        for net in (model, other):
            net.classifier.weight.mul_(2)
    assert torch.equal(predict(model, query, **changes), predict(other, query, **changes))
    assert len(loops) == 5


def test_the_same_support_with_other_labels_is_fitted_again() -> None:
    model = network()
    support, query = tasks(model, b=1)
    for labels in ([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 0]):
        found, expected = (
            answer(net, support, torch.tensor(labels), query.flatten(1, 2), "inductive") for net in (model, network())
        )
        assert torch.equal(found, expected)


def test_more_classes_than_outputs_are_refused_in_one_line() -> None:
    model = network(way=2)
    support, query = tasks(model)
    with pytest.raises(DataError, match=r"up to 2 classes .*method.way.*has 3; use") as error:
        answer(model, support, torch.arange(K).repeat_interleave(S), query.flatten(1, 2), "transductive")
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_an_error() -> None:
    model = network()
    support, query = tasks(model)
    torch.nn.init.constant_(model.classifier.bias, math.nan)
    with pytest.raises(DataError, match="NaN instead of probabilities"):
        answer(model, support, torch.arange(K).repeat_interleave(S), query.flatten(1, 2), "transductive")


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


def test_episodes_of_a_batch() -> None:
    """An image network computes each episode alone, wherever it is."""
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert network().episodes_per_batch(ADAPT, 80, device) == 1
        assert network(network="mlp").episodes_per_batch(ADAPT, 80, device) == 64
