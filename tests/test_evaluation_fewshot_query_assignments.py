"""Assignments of queries against plain loops, known marginals and limits."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from metagmvae.evaluation.fewshot import baselines
from metagmvae.evaluation.fewshot.query_assignments import (
    laplacian_logits,
    optimal_transport_posterior,
    sinkhorn,
    soft_k_means_cosines,
)
from metagmvae.training.objectives import balanced_classes

RNG = np.random.default_rng(1)
SUPPORT, QUERY = RNG.normal(0, 1, (3, 2, 4)), RNG.normal(0, 1, (7, 4))


def batch(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.as_tensor(array)[None] for array in arrays]


def unit(v: np.ndarray) -> np.ndarray:
    return v / math.sqrt(sum(float(a) ** 2 for a in v))


def centred() -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """Support by class and queries, centred on the mean of the episode and normalised."""
    centre = sum([*SUPPORT.reshape(-1, 4), *QUERY]) / 13
    return [[unit(x - centre) for x in rows] for rows in SUPPORT], [unit(x - centre) for x in QUERY]


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


def test_soft_k_means_against_loops() -> None:
    s, q = centred()
    means = [(rows[0] + rows[1]) / 2 for rows in s]
    for _ in range(3):
        weights = [softmax([7.0 * float(x @ unit(mean)) for mean in means]) for x in q]
        for k in range(3):
            total, count = s[k][0] + s[k][1], 2.0
            for p in range(7):
                total = total + weights[p][k] * q[p]
                count += weights[p][k]
            means[k] = total / count
    expected = [[float(x @ unit(mean)) for mean in means] for x in q]
    np.testing.assert_allclose(soft_k_means_cosines(*batch(SUPPORT, QUERY), 7.0, 3)[0], expected, rtol=1e-10)


def literal_sinkhorn(cost: np.ndarray, sharpness: float) -> np.ndarray:
    """PT-MAP's: alternately scale the rows to 1 and the columns to P / K; rows last."""
    P, K = cost.shape
    plan = np.exp(-sharpness * cost)
    for _ in range(500):
        for p in range(P):
            plan[p] /= plan[p].sum()
        for k in range(K):
            plan[:, k] *= P / K / plan[:, k].sum()
    for p in range(P):
        plan[p] /= plan[p].sum()
    return plan


def test_optimal_transport_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balanced_classes, "TOLERANCE", 1e-12)
    s, q = centred()
    prototypes = [(rows[0] + rows[1]) / 2 for rows in s]
    for _ in range(20):
        plan = literal_sinkhorn(np.array([[sum((x - c) ** 2) for c in prototypes] for x in q]), 5.0)
        for k in range(3):
            total, count = s[k][0] + s[k][1], 2.0
            for p in range(7):
                total = total + plan[p, k] * q[p]
                count += plan[p, k]
            prototypes[k] = 0.8 * prototypes[k] + 0.2 * total / count
    expected = literal_sinkhorn(np.array([[sum((x - c) ** 2) for c in prototypes] for x in q]), 5.0)
    actual = optimal_transport_posterior(*batch(SUPPORT, QUERY), 5.0)
    np.testing.assert_allclose(actual[0], expected, atol=1e-8)


@pytest.mark.parametrize("sharpness", [0.5, 10.0, 40.0])
def test_marginals_of_the_plan_are_equal(sharpness: float) -> None:
    """Also with float32 costs that are as far apart as squared distances of unit vectors can be."""
    cost_EPK = 4 * torch.as_tensor(RNG.random((6, 15, 5))).float()
    plan_EPK = sinkhorn(cost_EPK, sharpness)
    np.testing.assert_allclose(plan_EPK.sum(dim=2), 1, rtol=1e-12)
    np.testing.assert_allclose(plan_EPK.sum(dim=1), 3, rtol=2e-2)


def test_the_plan_is_the_best_one_for_its_marginals() -> None:
    """log plan = row term + column term - sharpness * cost, the optimality condition of Cuturi (2013), Lemma 2."""
    cost_EPK = torch.as_tensor(RNG.random((1, 8, 4)))
    potential = (sinkhorn(cost_EPK, 9.0).log() + 9.0 * cost_EPK)[0].numpy()
    centred_rows = potential - potential.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred_rows - centred_rows.mean(axis=0), 0, atol=1e-9)


def test_a_sharp_plan_is_the_assignment_of_the_smallest_cost() -> None:
    from scipy.optimize import linear_sum_assignment

    cost = RNG.random((6, 6))
    plan = sinkhorn(torch.as_tensor(cost)[None], 300.0)[0].numpy()
    np.testing.assert_array_equal(plan.argmax(axis=1), linear_sum_assignment(cost)[1])


def test_equal_costs_give_equal_shares() -> None:
    np.testing.assert_allclose(sinkhorn(torch.zeros(2, 6, 3), 10.0), 1 / 3)


def test_the_plan_of_an_episode_does_not_depend_on_the_others() -> None:
    easy, hard = torch.eye(4)[None] * 0.1, torch.as_tensor(RNG.random((1, 4, 4))).float() * 4
    together = sinkhorn(torch.cat([easy, hard]), 40.0)
    assert torch.equal(together[:1], sinkhorn(easy, 40.0))
    assert torch.equal(together[1:], sinkhorn(hard, 40.0))


def test_laplacian_against_loops() -> None:
    s, q = centred()
    means = [unit((rows[0] + rows[1]) / 2) for rows in s]
    unary = [[sum((x - m) ** 2) for m in means] for x in q]
    near = []
    for p in range(7):
        by_distance = sorted((sum((q[p] - q[r]) ** 2), r) for r in range(7) if r != p)
        near.append([r for _, r in by_distance[:2]])
    logits = [[-a for a in row] for row in unary]
    for _ in range(20):
        soft = [softmax(row) for row in logits]
        logits = [[0.8 * sum(soft[r][k] for r in near[p]) - unary[p][k] for k in range(3)] for p in range(7)]
    np.testing.assert_allclose(laplacian_logits(*batch(SUPPORT, QUERY), 0.8, 2)[0], logits, rtol=1e-10)


def test_laplacian_without_weight_is_the_nearest_class_mean() -> None:
    s, q = centred()
    expected = [int(np.argmax([x @ unit(rows[0] + rows[1]) for rows in s])) for x in q]
    assert laplacian_logits(*batch(SUPPORT, QUERY), 0.0, 3)[0].argmax(dim=1).tolist() == expected


def test_neighbours_pull_a_query_to_their_class() -> None:
    """A query between two classes, a little nearer to the first, whose neighbours are all of the second class."""
    support = np.array([[[1.0, 0, 0]], [[0, 1.0, 0]]])
    query = np.array([[0.55, 0.45, 1], [0.4, 0.6, 1], [0.35, 0.65, 1], [0.8, 0.2, 0], [0.5, 0.7, 0]])
    assert laplacian_logits(*batch(support, query), 0.0, 2)[0].argmax(dim=1).tolist() == [0, 1, 1, 0, 1]
    assert laplacian_logits(*batch(support, query), 2.0, 2)[0].argmax(dim=1).tolist()[:3] == [1, 1, 1]


def test_more_neighbours_than_queries_and_one_query() -> None:
    few = laplacian_logits(*batch(SUPPORT, QUERY[:3]), 0.7, 10)
    assert torch.equal(few, laplacian_logits(*batch(SUPPORT, QUERY[:3]), 0.7, 2))
    one = laplacian_logits(*batch(SUPPORT, QUERY[:1]), 0.7, 3)
    assert torch.equal(one, laplacian_logits(*batch(SUPPORT, QUERY[:1]), 0.0, 3))


def test_padding_of_unequal_shots_changes_nothing() -> None:
    support, query = batch(SUPPORT[:, :1], QUERY)
    padded, mask = torch.cat([support, torch.zeros_like(support)], dim=2), torch.tensor([[[1.0, 0.0]] * 3])
    for assign in (
        lambda s, m: soft_k_means_cosines(s, query, 7.0, 3, m),
        lambda s, m: optimal_transport_posterior(s, query, 5.0, m),
        lambda s, m: laplacian_logits(s, query, 0.7, 2, m),
    ):
        torch.testing.assert_close(assign(padded, mask), assign(support, None))


def test_balanced_queries_help_optimal_transport_and_unbalanced_ones_cost_it() -> None:
    """Its equal marginals are an assumption: with 11 queries per class it gains, with Dirichlet-drawn ones it loses."""
    labels = np.repeat(np.arange(8), 40)
    rng = np.random.default_rng(0)
    x = torch.as_tensor(rng.normal(0, 1, (8, 6))[labels] + 0.8 * rng.normal(0, 1, (320, 6))).float()
    task = {"way": 4, "shot": 1, "query": 11, "episodes": 200, "seed": 3}
    gain = baselines.optimal_transport(x, labels, **task).mean - baselines.soft_k_means(x, labels, **task).mean
    task |= {"dirichlet": 0.5}
    loss = baselines.optimal_transport(x, labels, **task).mean - baselines.soft_k_means(x, labels, **task).mean
    assert gain > 0.01
    assert loss < -0.05
