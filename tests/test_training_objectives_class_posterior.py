"""Supports in any order and with unequal shots: the same answer as sorted and padded by class, and as the loops."""

from __future__ import annotations

from typing import Literal

import pytest
import reference
import torch

from metagmvae.configs.schema import AdaptSettings, ModelSettings
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.objectives.class_posterior import classify_latents, fit_log_posteriors, rows_by_class
from metagmvae.training.objectives.mixture import class_log_posterior, fit_semi_supervised

ADAPT = AdaptSettings(samples=3, iterations=4)
UNEQUAL = torch.tensor([2, 0, 1, 0, 2, 0])
EQUAL = torch.tensor([1, 2, 0, 2, 0, 1])


def latents(seed: int, points: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, points, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_rows_of_each_class() -> None:
    rows_KS, real_KS = rows_by_class(UNEQUAL)
    found = [sorted(rows[real].tolist()) for rows, real in zip(rows_KS, real_KS, strict=True)]
    assert found == [[1, 3, 5], [2], [0, 4]]
    assert real_KS.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    rows_KS, real_KS = rows_by_class(EQUAL)
    assert rows_KS.tolist() == [[2, 4], [0, 5], [1, 3]]
    assert real_KS.all()


@pytest.mark.parametrize("fit_on_queries", [True, False])
def test_unequal_shots_equal_the_literal_em(fit_on_queries: bool) -> None:
    """Eq. 10 and 11 in plain loops, on the labelled latents of each class, of which there are 9, 3 and 6."""
    z_ETND, z_EPND = latents(0, 6), latents(1, 4)
    found = classify_latents(ADAPT, z_ETND, UNEQUAL, z_EPND, fit_on_queries=fit_on_queries).exp()
    for e in range(2):
        support = [z_ETND[e, k == UNEQUAL].flatten(0, 1).numpy() for k in range(3)]
        query = z_EPND[e].flatten(0, 1).numpy()
        means, variances = reference.semi_supervised_em(
            support, query if fit_on_queries else query[:0], ADAPT.iterations
        )
        expected = reference.final_posterior(z_EPND[e].numpy(), means, variances)
        assert found[e].numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("background", [None, -3.0])
def test_a_support_in_another_order_equals_the_sorted_one(background: float | None) -> None:
    for label_T in (EQUAL, UNEQUAL):
        z_ETND, z_EPND = latents(2, 6), latents(3, 4)
        order = torch.argsort(label_T, stable=True)
        options = {"fit_on_queries": True, "background": background}
        found = classify_latents(ADAPT, z_ETND, label_T, z_EPND, **options)
        expected = classify_latents(ADAPT, z_ETND[:, order], label_T[order], z_EPND, **options)
        assert found.shape == (2, 4, 3 if background is None else 4)
        assert torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize(("e_step", "final"), [("identity", "diagonal"), ("diagonal", "identity")])
def test_settings_reach_em_and_the_posterior(e_step: Literal["identity", "diagonal"], final: str) -> None:
    """EM counts the samples of an image as points, so the prior of the proportions is multiplied by their number."""
    options = {"e_step": e_step, "final_covariance": final, "temperature": 3.0}
    adapt = AdaptSettings(samples=3, iterations=4, proportions="estimated", proportions_prior=2.0, **options)
    support, query = latents(7, 6).unflatten(1, (3, 2)).flatten(2, 3), latents(8, 4)
    mixture, log_p_EPK = fit_log_posteriors(adapt, support, query)
    points = query.flatten(1, 2)
    expected = fit_semi_supervised(support, points, iterations=4, e_step=e_step, temperature=3.0, prior_count=6.0)
    for found, value in zip(mixture, expected, strict=True):
        assert torch.allclose(found, value)
    posterior = class_log_posterior(expected, points, final, 3.0).exp()  # type: ignore[arg-type]
    assert torch.allclose(log_p_EPK.exp(), posterior.unflatten(1, (4, 3)).mean(dim=2))


def test_equal_shots_equal_the_latents_by_class() -> None:
    z_ETND, z_EPND = latents(4, 6), latents(5, 4)
    by_class = torch.stack([z_ETND[:, k == EQUAL].flatten(1, 2) for k in range(3)], dim=1)
    expected = fit_log_posteriors(ADAPT, by_class, z_EPND)[1]
    assert torch.allclose(classify_latents(ADAPT, z_ETND, EQUAL, z_EPND, fit_on_queries=True), expected, atol=1e-12)


@pytest.mark.parametrize("mode", ["transductive", "inductive"])
@pytest.mark.parametrize("label_T", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_a_model_answers_for_a_support_in_any_order(mode: str, label_T: torch.Tensor) -> None:
    """Inductive: the same answer. Transductive: with the same noise of each point, which follows the order."""
    torch.manual_seed(0)
    model = MetaGMVAE(ModelSettings(latent=2, channels=4, width=8, heads=2, layers=1), (1, 8, 8)).double().eval()
    rng = torch.Generator().manual_seed(6)
    support, query = (20 * torch.randn(1, n, 4, generator=rng, dtype=torch.float64) for n in (6, 4))
    order = torch.argsort(label_T, stable=True)
    adapt = AdaptSettings(samples=64 if mode == "inductive" else 4000, iterations=4)
    options = {"mode": mode, "seed_by_episode": [0]}
    with torch.no_grad():
        found = model.log_posteriors(adapt, support, label_T, query, **options).exp()  # type: ignore[arg-type]
        expected = model.log_posteriors(adapt, support[:, order], label_T[order], query, **options).exp()  # type: ignore[arg-type]
    assert torch.allclose(found, expected, atol=1e-9 if mode == "inductive" else 0.03)
    assert (found - 1 / 3).abs().max() > 0.1
