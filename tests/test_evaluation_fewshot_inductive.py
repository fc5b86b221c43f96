"""Inductive prediction fits its classes to the support alone."""

from __future__ import annotations

import numpy as np
import reference
import torch

from metagmvae.configs.schema import AdaptSettings
from metagmvae.training.objectives.class_posterior import fit_log_posteriors

K, S, P, N, D = 3, 2, 4, 5, 2
ADAPT = AdaptSettings(iterations=4, samples=N)


def test_classes_are_the_means_and_variances_of_the_support_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(1, K, S * N, D, generator=generator, dtype=torch.float64)
    query = torch.randn(1, P, N, D, generator=generator, dtype=torch.float64)
    mixture, log_p = fit_log_posteriors(ADAPT, support, query, fit_on_queries=False)
    points = support[0].numpy()
    assert np.allclose(mixture.mean_EKD[0].numpy(), points.mean(axis=1), atol=1e-12)
    assert np.allclose(mixture.variance_EKD[0].numpy(), points.var(axis=1), atol=1e-12)
    expected = reference.final_posterior(query[0].numpy(), points.mean(axis=1), points.var(axis=1))
    assert np.allclose(log_p[0].exp().numpy(), expected, atol=1e-12)


def test_transductive_classes_depend_on_the_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(1, K, S * N, D, generator=generator, dtype=torch.float64)
    query = torch.randn(1, P, N, D, generator=generator, dtype=torch.float64)
    mixture, log_p = fit_log_posteriors(ADAPT, support, query)
    points = query[0].flatten(0, 1).numpy()
    means, variances = reference.semi_supervised_em(support[0].numpy(), points, ADAPT.iterations)
    assert np.allclose(mixture.mean_EKD[0].numpy(), means, atol=1e-10)
    expected = reference.final_posterior(query[0].numpy(), means, variances)
    assert np.allclose(log_p[0].exp().numpy(), expected, atol=1e-10)
