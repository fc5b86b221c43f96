"""The loss of ProtoCLR against a literal transcription of Algorithm 1 (Medina et al. 2020), value and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_model import batch, model, settings
from torch import nn

from metagmvae.configs.schema import PretrainSettings
from metagmvae.training.objectives.prototypes import prototype_loss
from metagmvae.training.pretraining.contrastive import ContrastiveStep

N, Q, F = 5, 3, 4


def algorithm_1(images: np.ndarray, views: np.ndarray, temperature: float = 1.0) -> float:
    """Loops of the paper: images (n, F), views (Q, n, F); mean over i and q of l(i, q)."""
    total = 0.0
    for q in range(len(views)):
        for i in range(len(images)):
            similarity = [-sum((views[q, i] - images[k]) ** 2) / temperature for k in range(len(images))]
            total += -np.log(np.exp(similarity[i]) / sum(np.exp(similarity)))
    return total / (len(images) * len(views))


def features(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(N, F, generator=generator, dtype=torch.float64)
    return images, images + 0.7 * torch.randn(Q, N, F, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_value_equals_algorithm_1(temperature: float) -> None:
    images, views = features()
    loss = float(prototype_loss(images, views.flatten(0, 1), temperature / F))
    assert loss == pytest.approx(algorithm_1(images.numpy(), views.numpy(), temperature), rel=1e-12)


def test_gradient_equals_finite_differences() -> None:
    images, views = features(1)
    assert torch.autograd.gradcheck(
        lambda a, b: prototype_loss(a, b, 0.2), (images.requires_grad_(), views.flatten(0, 1))
    )


def test_half_precision_is_computed_in_float32() -> None:
    images, views = features(2)
    loss = prototype_loss(images.bfloat16(), views.flatten(0, 1).bfloat16(), 1 / F)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(algorithm_1(images.numpy(), views.numpy()), rel=0.05)


def test_two_ranks_equal_one_process() -> None:
    """The mean over ranks of the loss against all images is the loss of the whole batch."""
    images, views = features(3)
    whole = float(prototype_loss(images[:4], views[:, :4].flatten(0, 1), 1.0))
    halves = [
        float(prototype_loss(images[part], views[:, part].flatten(0, 1), 1.0, gather=lambda _: images[:4], rank=rank))
        for rank, part in enumerate((slice(0, 2), slice(2, 4)))
    ]
    assert np.mean(halves) == pytest.approx(whole, rel=1e-12)


def test_step_encodes_the_images_and_q_views_of_each() -> None:
    net = model(torch.float32).eval()
    pretrain = PretrainSettings(objective="prototypes", query_views=2, temperature=0.5 / net.feature_dim)
    step = ContrastiveStep(net, nn.Identity(), settings(), pretrain).eval()
    step.view = lambda x, generator: x + torch.rand(len(x), 1, 1, 1, generator=generator)
    images = batch().images[0]
    (inputs,) = step.prepare(images, 3)
    n = len(images)
    x = torch.tensor(images).float() / 255
    assert torch.equal(inputs[:n], x)
    assert len(inputs) == 3 * n
    assert not torch.equal(inputs[n : 2 * n], inputs[2 * n :])
    h = net.encoder(inputs).detach().double().numpy()
    expected = algorithm_1(h[:n], h[n:].reshape(2, n, -1), 0.5)
    assert float(step(images, 3)[0].detach()) == pytest.approx(expected, rel=1e-4)


def test_images_of_another_size_than_the_views_are_resized() -> None:
    net = model(torch.float32)
    step = ContrastiveStep(net, nn.Identity(), settings(), PretrainSettings(objective="prototypes", query_views=1))
    step.view = lambda x, generator: x[..., :4, :4]
    (inputs,) = step.prepare(batch().images[0], 1)
    assert inputs.shape[-2:] == (4, 4)
    assert torch.allclose(inputs[0].mean(), torch.tensor(batch().images[0][0] / 255).float().mean(), atol=0.05)
