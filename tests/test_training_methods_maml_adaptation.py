"""Adaptation of MAML to the support of test episodes: the literal transcription, one fit for each support, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from literal_maml import (
    ADAPT,
    KINDS,
    K,
    Q,
    S,
    answer,
    leaves,
    literal_fit,
    literal_logits,
    network,
    tasks,
)
from torch import Tensor

from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.pipelines.records import DataError
from metagmvae.training.methods.maml import MAML
from metagmvae.training.methods.scratch import Scratch


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


def test_episodes_of_a_batch() -> None:
    """An image network computes each episode alone, wherever it is."""
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert network().episodes_per_batch(ADAPT, 80, device) == 1
        assert network(network="mlp").episodes_per_batch(ADAPT, 80, device) == 64


@pytest.mark.parametrize("kind", [MAML, Scratch])
@pytest.mark.parametrize("wanted", [True, False])
def test_an_episode_is_computed_in_channels_last_if_training_is(kind: type[MAML], wanted: bool) -> None:
    """The parameters of `fit` come from a stack and those of `Scratch` are new: both are channels-first."""
    model = network(kind)
    model.channels_last = wanted
    formats: list[bool] = []
    for block in list(model.body.blocks)[:2]:  # maps of one pixel have both formats
        block.register_forward_hook(
            lambda _, __, maps: formats.append(maps.is_contiguous(memory_format=torch.channels_last))
        )
    support, query = tasks(model)
    answer(model, support, torch.tensor([0, 0, 1, 1, 2, 2]), query.flatten(1, 2), "transductive")
    assert set(formats) == {wanted}
