"""The literal implementation in the benchmarks gives the same results as the fast one."""

import numpy as np
import pytest
import torch

from metagmvae.configs.schema import AdaptSettings, ModelSettings, TrainSettings
from metagmvae.evaluation.bench import reference
from metagmvae.evaluation.fewshot.predict import log_posteriors
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.methods.meta_gmvae import latent_noise, sample_latents
from metagmvae.training.methods.meta_step import MetaStep
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.objectives.distinct_points import init_indices
from metagmvae.training.trainer.builders import build_model

SHAPE = (1, 28, 28)
SMALL = ModelSettings(channels=8, width=32, latent=6)


def images(*sizes: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*sizes, *SHAPE), dtype=np.uint8)


def test_literal_step_equals_fast_step():
    settings = TrainSettings(batch=2, set_size=12, samples=4, decode_samples=4, components=3, em_iterations=4)
    batch = SetBatch(images(2, 12), np.array([5, 6]), 3)
    model = build_model(SMALL, SHAPE, 0)
    loss, _ = MetaStep(model, settings)(batch)
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    generators = [keyed_generator(torch.device("cpu"), 0, "meta", e) for e in (5, 6)]
    noise = torch.stack([torch.randn(12, 4, 6, generator=g) for g in generators])
    model.zero_grad()
    x = model.scale_images(torch.as_tensor(batch.images)).flatten(0, 1)
    mean, log_variance = model.posterior(reference.encode(model.encoder, x).unflatten(0, (2, 12)))
    rows = init_indices(sample_latents(mean, log_variance, noise).flatten(1, 2), 3, generators)
    slow = reference.step_loss(model, torch.as_tensor(batch.images), noise, rows, settings.em_iterations)
    slow.backward()
    torch.testing.assert_close(slow, loss, rtol=1e-5, atol=1e-3)
    for name, parameter in model.named_parameters():
        scale = max(float(gradient[name].abs().max()), 1.0)
        torch.testing.assert_close(parameter.grad / scale, gradient[name] / scale, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("temperature", [1.0, 7.0])
@pytest.mark.parametrize("covariance", ["diagonal", "identity"])
def test_literal_episode_equals_fast_episode(covariance, temperature):
    adapt = AdaptSettings(
        e_step=covariance, final_covariance=covariance, temperature=temperature, samples=4, iterations=3
    )
    model = build_model(SMALL, SHAPE, 0).eval()
    pixels = images(3 * 2 + 9)
    device = torch.device("cpu")
    h = encode_images(model, pixels, device)
    fast = log_posteriors(model, adapt, h[:6].reshape(1, 3, 2, -1), h[None, 6:], seed_by_episode=[4])[0].exp().float()
    noise = latent_noise(model, adapt, 15, 4, device)
    tensors = torch.as_tensor(pixels)
    with torch.inference_mode():
        slow = reference.predict_episode(model, adapt, tensors[:6].reshape(3, 2, *SHAPE), tensors[6:], noise)
    torch.testing.assert_close(slow, fast, rtol=1e-3, atol=1e-4)
