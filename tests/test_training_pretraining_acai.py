"""ACAI against Eq. 1 and 2 of Berthelot et al.: values, and which network each term trains."""

from __future__ import annotations

import pytest
import torch
from pretraining_objectives import gradients, random_images, small_settings, small_step
from torch import Tensor

from metagmvae.training.pretraining.acai import AcaiStep


def eq_1_and_2(step: AcaiStep, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(critic's loss, autoencoder's loss), image by image; mixtures of the i-th with the i-th from the end."""
    modules = step.auxiliary
    critic_loss = autoencoder_loss = torch.zeros((), dtype=x.dtype)
    n = len(x)

    def f(image: Tensor) -> Tensor:
        return modules.projector(step.encoder(image[None]))

    def g(h: Tensor) -> Tensor:
        return modules.decoder(h)[0]

    def d(image: Tensor) -> Tensor:
        return modules.critic(image[None])[0]

    for i in range(n):
        mixture = g(alpha[i] * f(x[i]) + (1 - alpha[i]) * f(x[n - 1 - i]))
        reconstruction = g(f(x[i]))
        critic_loss = critic_loss + (d(mixture) - alpha[i]) ** 2 / n
        critic_loss = critic_loss + d(0.2 * x[i] + 0.8 * reconstruction) ** 2 / n
        pixels = [(a - b) ** 2 for a, b in zip(x[i].flatten(), reconstruction.flatten(), strict=True)]
        autoencoder_loss = autoencoder_loss + sum(pixels) / len(pixels) / n
        autoencoder_loss = autoencoder_loss + 0.5 * d(mixture) ** 2 / n
    return critic_loss, autoencoder_loss


@pytest.fixture(scope="module", params=[(), (6, 3)])
def step(request: pytest.FixtureRequest) -> AcaiStep:
    made = small_step(AcaiStep, small_settings("acai", projector=request.param))
    assert isinstance(made, AcaiStep)
    return made.eval()  # fixed statistics of the batch normalisation: images can be taken one by one


def batch() -> tuple[Tensor, Tensor]:
    x = torch.tensor(random_images(5)).double() / 255
    return x, torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2


def test_loss_is_the_sum_of_both_equations(step: AcaiStep) -> None:
    critic, autoencoder = eq_1_and_2(step, *batch())
    loss, metrics = step.compute(*batch())
    assert float(loss.detach()) == pytest.approx(float((critic + autoencoder).detach()), rel=1e-10)
    assert float(metrics["critic_loss"]) == pytest.approx(float(critic.detach()), rel=1e-10)
    both = metrics["squared_error"] + 0.5 * metrics["adversarial_loss"]
    assert float(both) == pytest.approx(float(autoencoder.detach()), rel=1e-10)


def test_each_network_gets_the_gradient_of_its_own_loss(step: AcaiStep) -> None:
    critic_loss, autoencoder_loss = eq_1_and_2(step, *batch())
    ours = gradients(step.compute(*batch())[0], step)
    critic, autoencoder = gradients(critic_loss, step), gradients(autoencoder_loss, step)
    assert any(name.startswith("auxiliary.critic.") for name in ours)
    for name, gradient in ours.items():
        expected = critic if name.startswith("auxiliary.critic.") else autoencoder
        assert torch.allclose(gradient, expected[name], rtol=1e-8, atol=1e-12), name
        assert gradient.abs().sum() > 0, name


def test_alpha_is_uniform_up_to_one_half() -> None:
    step = small_step(AcaiStep, small_settings("acai"), dtype=torch.float32)
    alpha = torch.cat([step.prepare(random_images(100), number)[1] for number in range(20)])
    assert alpha.min() >= 0
    assert 0.49 < alpha.max() <= 0.5
    assert float(alpha.mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("shape", "image_size"), [((1, 28, 28), 0), ((3, 30, 20), 0), ((3, 84, 84), 64), ((3, 50, 50), 84)]
)
def test_images_of_any_size(shape: tuple[int, int, int], image_size: int) -> None:
    settings = small_settings("acai", model={"image_size": image_size})
    step = small_step(AcaiStep, settings, shape, dtype=torch.float32)
    x, alpha = step.prepare(random_images(4, shape), 1)
    assert tuple(x.shape[1:]) == ((shape[0], image_size, image_size) if image_size else shape)
    loss, _ = step.compute(x, alpha)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in step.parameters())
