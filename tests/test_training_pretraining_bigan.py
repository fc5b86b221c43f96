"""BiGAN against the value function of Donahue et al.: values, and which network each term trains."""

from __future__ import annotations

import pytest
import torch
from pretraining_objectives import gradients, random_images, small_settings, small_step
from torch import Tensor

from metagmvae.training.pretraining.bigan import BiganStep


def losses(step: BiganStep, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(discriminator's loss, that of encoder and generator), pair by pair, with the sigmoids written out."""
    modules = step.auxiliary
    discriminator = deceivers = torch.zeros((), dtype=x.dtype)
    n = len(x)

    def D(image: Tensor, latent: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-modules.discriminator(image[None], latent[None])[0]))

    for i in range(n):
        encoded = modules.projector(step.encoder(x[i : i + 1]))[0]
        generated = 1 / (1 + torch.exp(-modules.generator(z[i : i + 1])[0]))
        discriminator = discriminator - torch.log(D(x[i], encoded)) / n - torch.log(1 - D(generated, z[i])) / n
        deceivers = deceivers - torch.log(1 - D(x[i], encoded)) / n - torch.log(D(generated, z[i])) / n
    return discriminator, deceivers


@pytest.fixture(scope="module", params=[(), (6, 3)])
def step(request: pytest.FixtureRequest) -> BiganStep:
    made = small_step(BiganStep, small_settings("bigan", projector=request.param))
    assert isinstance(made, BiganStep)
    return made.eval()  # fixed statistics of the batch normalisation: images can be taken one by one


def batch(step: BiganStep) -> tuple[Tensor, Tensor]:
    x = torch.tensor(random_images(5)).double() / 255
    generator = torch.Generator().manual_seed(1)
    return x, torch.rand(5, step.auxiliary.latent, generator=generator, dtype=torch.float64) * 2 - 1


def test_loss_is_the_sum_of_both_sides(step: BiganStep) -> None:
    discriminator, deceivers = losses(step, *batch(step))
    loss, metrics = step.compute(*batch(step))
    assert float(loss.detach()) == pytest.approx(float((discriminator + deceivers).detach()), rel=1e-10)
    assert float(metrics["discriminator_loss"]) == pytest.approx(float(discriminator.detach()), rel=1e-10)
    assert float(metrics["generator_loss"]) == pytest.approx(float(deceivers.detach()), rel=1e-10)


def test_each_network_gets_the_gradient_of_its_own_loss(step: BiganStep) -> None:
    ours = gradients(step.compute(*batch(step))[0], step)
    discriminator, deceivers = (gradients(loss, step) for loss in losses(step, *batch(step)))
    assert any(name.startswith("auxiliary.discriminator.") for name in ours)
    for name, gradient in ours.items():
        expected = discriminator if name.startswith("auxiliary.discriminator.") else deceivers
        assert torch.allclose(gradient, expected[name], rtol=1e-8, atol=1e-12), name
        assert gradient.abs().sum() > 0, name


def test_certain_discriminator_gives_finite_losses_and_gradients() -> None:
    """log(1 - sigmoid(200)) overflows where the sigmoid is written out."""
    step = small_step(BiganStep, small_settings("bigan"), dtype=torch.float32)
    assert isinstance(step, BiganStep)
    with torch.no_grad():
        step.auxiliary.discriminator.mlp[-1].bias.fill_(200.0)
    loss, metrics = step(random_images(4), 1)
    assert float(metrics["discriminator_loss"]) == pytest.approx(200, rel=0.01)
    assert all(g.isfinite().all() for g in gradients(loss, step).values())


def test_latents_are_uniform_and_differ_by_step() -> None:
    step = small_step(BiganStep, small_settings("bigan", projector=(5,)), dtype=torch.float32)
    z = torch.stack([step.prepare(random_images(50), number)[1] for number in range(20)])
    assert z.shape == (20, 50, 5)
    assert -1 <= z.min() < -0.99
    assert 0.99 < z.max() <= 1
    assert float(z.square().mean()) == pytest.approx(1 / 3, abs=0.02)
    assert not torch.equal(z[0], z[1])
    assert torch.equal(z[4], step.prepare(random_images(50), 4)[1])


@pytest.mark.parametrize(("shape", "image_size"), [((1, 28, 28), 0), ((3, 84, 84), 64), ((3, 50, 50), 84)])
def test_images_of_any_size(shape: tuple[int, int, int], image_size: int) -> None:
    settings = small_settings("bigan", model={"image_size": image_size})
    step = small_step(BiganStep, settings, shape, dtype=torch.float32)
    loss, _ = step(random_images(4, shape), 1)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in step.parameters())
