"""Prototypical networks against a literal transcription of Eq. 1 and 2 of Snell et al., and finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_tasks import SHAPE
from torch import Tensor

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import AdaptSettings, ModelSettings
from metagmvae.pipelines.records import DataError
from metagmvae.training.methods.protonets import ProtoNets, prototype_logits
from metagmvae.training.models.encoders import EncoderModel

MODEL = ModelSettings(channels=3)
ADAPT = AdaptSettings()


def network(**method: Any) -> ProtoNets:
    torch.manual_seed(0)
    model = ProtoNets(MODEL, MethodSettings(**{"name": "protonets", "tasks": "labels"} | method), SHAPE)
    if model.on_features:
        model.scale.set_statistics(torch.zeros(model.feature_dim), torch.full((model.feature_dim,), 0.5))
    return model.eval()


def literal(support: np.ndarray, labels: list[int], query: np.ndarray) -> np.ndarray:
    """log p(y = k | x) of each query, number by number: Eq. 1 for the prototypes, Eq. 2 for the softmax."""
    answer = np.zeros((len(query), max(labels) + 1))
    for p in range(len(query)):
        exponents = []
        for k in range(max(labels) + 1):
            members = [support[t] for t in range(len(labels)) if labels[t] == k]
            squared = 0.0
            for d in range(query.shape[1]):
                prototype = sum(member[d] for member in members) / len(members)
                squared += (query[p, d] - prototype) ** 2
            exponents.append(-squared)
        total = math.log(sum(math.exp(e - max(exponents)) for e in exponents)) + max(exponents)
        answer[p] = [e - total for e in exponents]
    return answer


def log_posteriors(model: ProtoNets, support: Tensor, labels: list[int], query: Tensor, mode: str) -> Tensor:
    with torch.no_grad():
        return model.log_posteriors(
            ADAPT,
            support,
            torch.tensor(labels),
            query,
            mode=mode,  # type: ignore[arg-type]
            seed_by_episode=range(len(support)),
        )


@pytest.mark.parametrize("mode", ["transductive", "inductive"])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [2, 0, 1, 0, 0, 2]], ids=["equal", "unsorted, unequal"])
def test_log_posteriors_equal_the_transcription(labels: list[int], mode: str) -> None:
    rng = torch.Generator().manual_seed(1)
    support, query = torch.randn(2, 6, 5, generator=rng), torch.randn(2, 4, 5, generator=rng)
    found = log_posteriors(network(), support, labels, query, mode)
    assert found.dtype == torch.float64
    assert found.shape == (2, 4, 3)
    for e in range(2):
        expected = literal(support[e].double().numpy(), labels, query[e].double().numpy())
        assert found[e].numpy() == pytest.approx(expected, abs=1e-5)


def test_loss_and_accuracy_of_tasks_equal_the_transcription() -> None:
    model = network().double()
    rng = torch.Generator().manual_seed(2)
    support, query = (torch.rand(2, 3, n, *SHAPE, generator=rng, dtype=torch.float64) for n in (2, 4))
    losses, right = [], []
    with torch.no_grad():
        loss, metrics = model.task_loss(support, query)
        for b in range(2):
            embedded = [model.body(x[b].flatten(0, 1)).numpy() for x in (support, query)]
            log_p = literal(embedded[0], [0, 0, 1, 1, 2, 2], embedded[1])
            for p in range(12):
                losses.append(-log_p[p, p // 4])
                right.append(log_p[p].argmax() == p // 4)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-9)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1


@pytest.mark.parametrize("train", [False, True])
def test_gradient_equals_finite_differences(train: bool) -> None:
    model = network().double().train(train)
    for layer in model.modules():  # a constant map at zero would be at the kink of its ReLU
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.bias, 0.1, 0.5)
            layer.momentum = 0.0
    rng = torch.Generator().manual_seed(3)
    support, query = (torch.rand(2, 3, n, *SHAPE, generator=rng, dtype=torch.float64) for n in (2, 2))
    model.task_loss(support, query)[0].backward()
    weights = list(model.parameters())
    assert all(p.grad is not None for p in weights)
    start = [p.detach().clone() for p in weights]
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in weights]

        def value(h: float, direction: list[Tensor] = direction) -> float:
            with torch.no_grad():
                for p, at, along in zip(weights, start, direction, strict=True):
                    p.copy_(at + h * along)
                return float(model.task_loss(support, query)[0])

        numeric = (value(1e-6) - value(-1e-6)) / 2e-6
        analytic = sum(float((p.grad * along).sum()) for p, along in zip(weights, direction, strict=True))
        assert analytic == pytest.approx(numeric, rel=2e-5)


def test_distances_are_exact_and_have_a_gradient_at_zero() -> None:
    """Large embeddings that hardly differ, as an expansion of the square cannot tell apart in float32."""
    prototypes = torch.tensor([[[1000.0, 1000.0], [1000.25, 1000.0]]], requires_grad=True)
    logits = prototype_logits(prototypes, torch.tensor([[[1000.0, 1000.5], [1000.0, 1000.0]]]))
    assert logits[0].tolist() == pytest.approx(np.array([[-0.25, -0.3125], [0.0, -0.0625]]), rel=1e-6)
    logits.sum().backward()
    assert prototypes.grad is not None
    assert prototypes.grad.isfinite().all()


X = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(4))


def test_the_body_is_the_encoder_a_network_of_its_own_or_a_perceptron() -> None:
    """What `encode_images` returns, and whether it can be computed from stored features."""
    with torch.no_grad():
        encoder = network()
        assert encoder.body is encoder.encoder
        assert torch.equal(encoder.encode_images(X), encoder.encoder(X))
        own = network(tasks="clusters")
        assert own.body is not own.encoder
        assert torch.equal(own.encode_images(X), own.body(X))
        assert not torch.equal(own.body(X), own.encoder(X))
        mlp = network(network="mlp")
        assert torch.equal(mlp.encode_images(X), mlp.body(mlp.scale(mlp.encoder(X))))
        assert (mlp.body_dim, encoder.body_dim) == (mlp.encode_images(X).shape[1], encoder.feature_dim) == (256, 3)
        for model in (encoder, mlp):
            raw = EncoderModel(model.encoder, SHAPE).encode_images(X)
            assert model.reads_features
            assert torch.equal(model.scale_features(raw), model.encode_images(X))
    assert not own.reads_features


def test_features_of_the_size_of_the_perceptron_go_through_it_once() -> None:
    """Conv4 gives 256 features of 28 x 28 images, so that the perceptron could be applied twice."""
    torch.manual_seed(0)
    method = MethodSettings(name="protonets", network="mlp")
    model = ProtoNets(ModelSettings(), method, (1, 28, 28)).eval()
    calls = []
    assert model.own_body is not None
    model.own_body.register_forward_hook(lambda *_: calls.append(1))
    model.encode_images(torch.rand(2, 1, 28, 28))
    assert model.feature_dim == 256
    assert len(calls) == 1


def test_the_trained_part() -> None:
    for method, trained in (({}, "encoder."), ({"tasks": "clusters"}, "own_body."), ({"network": "mlp"}, "own_body.")):
        model = network(**method)
        model.freeze()
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert names
        assert all(name.startswith(trained) for name in names)


def test_values_that_are_not_numbers_are_one_line() -> None:
    support, query = torch.zeros(1, 2, 5), torch.zeros(1, 3, 5)
    query[0, 1, 2] = float("nan")
    with pytest.raises(DataError, match="the model gives NaN instead of probabilities"):
        log_posteriors(network(), support, [0, 1], query, "inductive")


def test_episodes_of_a_batch_fit_memory() -> None:
    model = network()
    assert model.episodes_per_batch(ADAPT, 10**9, torch.device("cpu")) == 1
    assert model.episodes_per_batch(ADAPT, 400, torch.device("cpu")) == 2**26 // (400 * 3)
