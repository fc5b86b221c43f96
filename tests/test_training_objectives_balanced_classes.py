"""Weights that balance the classes: equal totals, a literal Sinkhorn iteration, and what they change in EM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metagmvae.configs.schema import AdaptSettings
from metagmvae.training.objectives.balanced_classes import FAR, TOLERANCE, balancing_weights
from metagmvae.training.objectives.class_posterior import fit_log_posteriors

LOGITS = torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def balanced(logits_EPK, background=None, start_EK=None):
    weights_EK = balancing_weights(background, logits_EPK, start_EK)
    return torch.softmax(logits_EPK + weights_EK[:, None], dim=2)


def test_every_class_gets_the_same_number_of_points():
    totals_EK = balanced(LOGITS).sum(dim=1)
    assert (torch.softmax(LOGITS, dim=2).sum(dim=1) - 10).abs().max() > 1, "the logits alone are not balanced"
    torch.testing.assert_close(totals_EK, torch.full_like(totals_EK, 10.0), rtol=TOLERANCE, atol=0)


def test_result_is_that_of_sinkhorns_iteration():
    """Rows and columns of the kernel are scaled in turn until both marginals hold."""
    plan = np.exp(LOGITS[0].numpy())
    for _ in range(2000):
        plan = plan / plan.sum(axis=1, keepdims=True)
        plan = plan * (len(plan) / 4) / plan.sum(axis=0, keepdims=True)
    plan = plan / plan.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(balanced(LOGITS)[0].numpy(), plan, atol=2e-2)


@pytest.mark.parametrize("scale", [1, 10, 100])
@pytest.mark.parametrize("background", [None, 2.0])
def test_weights_equal_those_of_a_softmax_in_every_iteration(scale, background):
    """At large scales the weights move far, so that the responsibilities are computed anew."""
    logits_EPK = scale * LOGITS
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for e in range(3):
        for _ in range(100):
            extra = [] if background is None else [background]
            padded = [[*row, *extra] for row in (logits_EPK[e] + expected[e]).tolist()]
            totals = torch.softmax(torch.tensor(padded, dtype=torch.float64), dim=1)[:, :4].sum(dim=0)
            share = totals.clamp_min(torch.finfo(torch.float64).tiny) / totals.mean()
            if ((share - 1).abs() <= TOLERANCE).all():
                break
            expected[e] -= share.log()
    torch.testing.assert_close(balancing_weights(background, logits_EPK), expected, rtol=1e-9, atol=1e-9)
    if scale == 100:
        assert expected.abs().max() > FAR


@pytest.mark.parametrize("scale", [1, 100])
def test_episodes_do_not_depend_on_each_other(scale):
    """Bit for bit, also where the responsibilities are computed anew."""
    together = balanced(scale * LOGITS)
    alone = torch.cat([balanced(scale * logits[None]) for logits in LOGITS])
    assert torch.equal(together, alone)


def test_it_continues_from_given_weights():
    once = balancing_weights(None, LOGITS)
    assert torch.equal(balancing_weights(None, LOGITS, once, iterations=1), once)


def test_points_of_the_background_count_for_no_class():
    weights_EK = balancing_weights(2.0, LOGITS)
    padded = torch.nn.functional.pad(LOGITS + weights_EK[:, None], (0, 1), value=2.0)
    totals_EK = torch.softmax(padded, dim=2)[..., :4].sum(dim=1)
    assert totals_EK.sum(dim=1).max() < 40
    torch.testing.assert_close(totals_EK, totals_EK.mean(dim=1, keepdim=True).expand(-1, 4), rtol=TOLERANCE, atol=0)


def test_extreme_logits_stay_finite():
    assert torch.isfinite(balanced(LOGITS * 1e4)).all()
    assert torch.isfinite(balanced((LOGITS * 1e4).float())).all()
    without_points = LOGITS.float() - torch.tensor([0.0, 0.0, 0.0, 1e5])
    assert torch.isfinite(balanced(without_points)).all()


def episode(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes, of which two overlap; 20 queries of each class, one sample."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.0, 6.0]], dtype=torch.float64)
    draw = means[None, :, None] + torch.randn(1, 3, 21, 2, generator=generator, dtype=torch.float64)
    return draw[:, :, :1], draw[:, :, 1:].reshape(1, 60, 1, 2)


def probabilities(proportions: str, seed: int, **options) -> torch.Tensor:
    adapt = AdaptSettings(proportions=proportions, e_step="identity", final_covariance="identity", samples=1)
    return fit_log_posteriors(adapt, *episode(seed), **options)[1].exp()[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_final_probabilities_are_balanced(seed):
    totals_K = probabilities("balanced", seed).sum(dim=0)
    torch.testing.assert_close(totals_K, torch.full_like(totals_K, 20.0), rtol=TOLERANCE, atol=0)


def test_balanced_queries_are_classified_better():
    truth = torch.arange(3).repeat_interleave(20)
    accuracies = {
        proportions: np.mean(
            [(probabilities(proportions, seed).argmax(dim=1) == truth).double().mean().item() for seed in range(40)]
        )
        for proportions in ("equal", "balanced")
    }
    assert accuracies["balanced"] > accuracies["equal"]


def test_inductive_mode_does_not_balance():
    alone = probabilities("balanced", 0, fit_on_queries=False)
    assert torch.equal(alone, probabilities("equal", 0, fit_on_queries=False))
