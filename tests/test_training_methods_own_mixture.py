"""A method with another mixture: the step uses its prior, the model its classifier in every mode."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_t

import metagmvae
from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import AdaptSettings, ModelSettings, Settings
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.methods.meta_step import MetaGMVAEMethod, MetaStep

SHAPE = (1, 8, 8)
MODEL = {"channels": 4, "latent": 3, "width": 8, "heads": 2, "layers": 1}


class Constant:
    """A prior of the same density everywhere."""

    def log_prob(self, z_EPD: torch.Tensor) -> torch.Tensor:
        return torch.full(z_EPD.shape[:2], -7.0)


class ConstantStep(MetaStep):
    def fit_prior(self, z_BPD: torch.Tensor, order_BP: torch.Tensor) -> tuple[Any, torch.Tensor]:
        assert not z_BPD.requires_grad
        assert z_BPD.shape == (2, 12 * 4, 3)
        assert sorted(order_BP[0].tolist()) == list(range(12 * 4))
        return Constant(), torch.zeros((), dtype=torch.bool)


class Last(MetaGMVAE):
    """Gives all queries to the last class."""

    def classify_latents(self, adapt: Any, z_ETND: Any, label_T: Any, z_EPND: Any, **more: Any) -> torch.Tensor:
        log_p = torch.full((*z_EPND.shape[:2], int(label_T.max()) + 1), -math.inf, dtype=torch.float64)
        log_p[..., -1] = 0
        return log_p


def test_a_step_has_the_prior_of_its_method() -> None:
    train = {"set_size": 12, "samples": 4, "components": 3, "batch": 2}
    settings = Settings.model_validate({"model": MODEL, "train": train})
    method = MetaGMVAEMethod(Last, ConstantStep)
    model = method.build(settings.model, MethodSettings(), SHAPE)
    images = np.random.default_rng(0).integers(0, 256, (2, 12, *SHAPE)).astype(np.uint8)
    _, metrics = method.step(model, settings)(SetBatch(images, np.array([0, 1]), step=0))
    assert float(metrics["prior"]) == -7
    assert method.reads_sequentially


@pytest.mark.parametrize(
    "adapt", [{}, {"inductive": "features"}, {"mode": "transductive"}], ids=["latents", "features", "transductive"]
)
def test_a_model_classifies_by_its_own_mixture_in_every_mode(adapt: dict[str, Any]) -> None:
    mode = adapt.pop("mode", "inductive")
    model = Last(ModelSettings(**MODEL), SHAPE).eval()
    support, query = torch.randn(2, 6, model.feature_dim), torch.randn(2, 5, model.feature_dim)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    settings = AdaptSettings(samples=2, iterations=2, **adapt)
    log_p = model.log_posteriors(settings, support, labels, query, mode=mode, seed_by_episode=[0, 1])
    assert torch.equal(log_p.argmax(dim=2), torch.full((2, 5), 2))
    assert torch.equal(log_p.exp().sum(dim=2), torch.ones(2, 5, dtype=torch.float64))


def test_the_mixture_of_the_guide_is_that_of_scipy_and_em_raises_its_likelihood() -> None:
    guide = (Path(metagmvae.__file__).parent / "infra" / "api" / "README.md").read_text()
    (program,) = [p for p in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL) if "class StudentMixture" in p]
    names: dict[str, Any] = {"__name__": "metagmvae_student"}
    exec(program, names)
    rng = np.random.default_rng(0)
    z, mean, weight = rng.normal(size=(40, 3)), rng.normal(size=(2, 3)), np.array([0.3, 0.7])
    mixture = names["StudentMixture"](torch.tensor(mean)[None], torch.tensor(weight).log()[None], 4.0)
    each = [np.log(w) + multivariate_t(m, np.eye(3), df=4.0).logpdf(z) for w, m in zip(weight, mean, strict=True)]
    np.testing.assert_allclose(mixture.log_prob(torch.tensor(z)[None])[0], logsumexp(each, axis=0), rtol=1e-12)
    fits = [names["fit"](torch.tensor(z)[None], torch.tensor(mean)[None], 4.0, steps) for steps in range(8)]
    likelihood = [float(fit.log_prob(torch.tensor(z)[None]).sum()) for fit in fits]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(likelihood))
    assert likelihood[-1] > likelihood[0] + 1
