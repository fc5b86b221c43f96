"""Conv4 and its mirror: Tables 3 and 4 layer by layer, the folded batch normalisation, odd image sizes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.models.conv import ConvBlock, ConvDecoder, ConvEncoder, FeatureDecoder, pooled_sizes
from metagmvae.training.models.feature_scaling import FeatureScale, FeatureWhitening, power_transform


def plain(block: ConvBlock) -> nn.Sequential:
    """A block as Table 3 writes it: conv, BatchNorm, ReLU, max pooling."""
    return nn.Sequential(
        copy.deepcopy(block.conv),
        copy.deepcopy(block.norm),
        nn.ReLU() if block.relu else nn.Identity(),
        nn.MaxPool2d(2, 2, ceil_mode=True),
    )


def table_3(encoder: ConvEncoder) -> nn.Sequential:
    return nn.Sequential(*(plain(block) for block in encoder.blocks), nn.Flatten())


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Affine factors away from 1 and 0, some negative: pooling before or after them must not matter."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator, dtype=layer.weight.dtype)
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator, dtype=layer.bias.dtype)
    return module


def test_sizes_are_those_of_table_3() -> None:
    assert pooled_sizes(28) == [28, 14, 7, 4, 2]
    x = torch.rand(3, 1, 28, 28)
    encoder = ConvEncoder((1, 28, 28), 64)
    shapes = []
    for block in encoder.blocks:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 14, 14), (64, 7, 7), (64, 4, 4), (64, 2, 2)]
    assert encoder.feature_dim == 256


def test_decoder_has_the_layers_of_table_4() -> None:
    decoder = ConvDecoder((1, 28, 28), 64, 64, 256)
    assert [(m.in_features, m.out_features) for m in decoder.mlp if isinstance(m, nn.Linear)] == [
        (64, 256),
        (256, 256),
        (256, 256),
    ]
    assert [type(m) for m in decoder.mlp] == [nn.Linear, nn.ELU] * 3
    convolutions = [m for m in decoder.deconv if isinstance(m, nn.ConvTranspose2d)]
    assert [m.kernel_size for m in convolutions] == [(4, 4), (3, 3), (4, 4), (4, 4)]
    assert {(m.stride, m.padding) for m in convolutions} == {((2, 2), (1, 1))}
    maps = decoder.mlp(torch.randn(2, 64)).unflatten(1, decoder.first)
    shapes = [tuple(maps.shape[1:])]
    for layer in decoder.deconv:
        maps = layer(maps)
        if isinstance(layer, nn.ConvTranspose2d):
            shapes.append(tuple(maps.shape[1:]))
    assert shapes == [(64, 2, 2), (64, 4, 4), (64, 7, 7), (64, 14, 14), (1, 28, 28)]
    assert not any(isinstance(m, nn.Sigmoid) for m in decoder.modules())  # logits: the sigmoid is in the loss


@pytest.mark.parametrize("channels", [3, 4, 8])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("final_relu", [True, False])
def test_folded_encoder_is_table_3_with_its_gradients_and_running_statistics(
    channels: int, train: bool, final_relu: bool
) -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder((1, 12, 10), channels, final_relu=final_relu).double()
    assert [block.relu for block in encoder.blocks] == [True, True, True, final_relu]
    randomised(encoder)
    literal = table_3(encoder)
    encoder.train(train)
    literal.train(train)
    for _ in range(3):
        x = torch.rand(6, 1, 12, 10, dtype=torch.float64) + 0.5
        ours, theirs = encoder(x), literal(x)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
        ours.square().sum().backward()
        theirs.square().sum().backward()
    for ours_p, theirs_p in zip(encoder.parameters(), literal.parameters(), strict=True):
        assert ours_p.grad is not None
        assert theirs_p.grad is not None
        assert torch.allclose(ours_p.grad, theirs_p.grad, rtol=1e-9, atol=1e-9)
    for ours_b, theirs_b in zip(encoder.buffers(), literal.buffers(), strict=True):
        assert torch.allclose(ours_b, theirs_b, rtol=0, atol=1e-10)


def test_features_are_flattened_channel_by_channel() -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder((1, 28, 28), 3).double().eval()
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    literal = table_3(encoder).eval()
    assert torch.allclose(encoder(x), literal(x), rtol=0, atol=1e-12)
    other = encoder.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(other, literal(x), rtol=0, atol=1e-12)


def test_folded_block_in_float32_keeps_to_float64() -> None:
    """Bright images far from zero mean, where a variance as a difference of large numbers would be lost."""
    torch.manual_seed(0)
    block = ConvBlock(1, 8)
    exact = copy.deepcopy(block).double()
    x = 0.9 + 0.001 * torch.randn(16, 1, 28, 28)
    assert torch.allclose(block(x).double(), plain(exact)(x.double()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("inputs", [1, 3, 8])
def test_an_input_that_needs_a_gradient_gets_the_whole_one(inputs: int) -> None:
    torch.manual_seed(1)
    block = ConvBlock(inputs, 4).double()
    randomised(block)
    x = torch.randn(2, inputs, 5, 5, dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor) -> Tensor:
        return block(x)

    assert torch.autograd.gradcheck(apply, (x,))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 84, 84), (3, 17, 33), (1, 5, 9), (4, 16, 16), (1, 2, 2)])
def test_any_image_size_comes_back_at_its_own_size(shape: tuple[int, int, int]) -> None:
    encoder, decoder = ConvEncoder(shape, 4).eval(), ConvDecoder(shape, 4, 3, 8).eval()
    assert encoder(torch.rand(2, *shape)).shape == (2, encoder.feature_dim)
    assert decoder(torch.randn(2, 3)).shape == (2, *shape)


def test_channels_last_changes_nothing_but_the_order_of_summation() -> None:
    torch.manual_seed(2)
    encoder = ConvEncoder((1, 28, 28), 8).eval()
    x = torch.rand(4, 1, 28, 28)
    usual = encoder(x)
    other = encoder.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(usual, other, rtol=0, atol=1e-5)


def test_images_do_not_see_each_other_with_frozen_statistics() -> None:
    encoder = ConvEncoder((1, 12, 12), 4).double().eval()
    x = torch.rand(5, 1, 12, 12, dtype=torch.float64)
    alone = torch.cat([encoder(x[i : i + 1]) for i in range(5)])
    assert torch.allclose(encoder(x), alone, rtol=0, atol=1e-13)


def test_one_image_in_training_mode_does_not_divide_by_zero() -> None:
    block = ConvBlock(1, 2)
    block(torch.rand(1, 1, 1, 1))
    assert all(torch.isfinite(buffer.float()).all() for buffer in block.buffers())


def test_half_precisions_are_lifted_and_the_others_kept() -> None:
    lifted = [at_least_float32(torch.zeros(1, dtype=d)).dtype for d in (torch.bfloat16, torch.float32, torch.float64)]
    assert lifted == [torch.float32, torch.float32, torch.float64]


def test_batch_statistics_stay_float32_under_autocast() -> None:
    torch.manual_seed(3)
    block = ConvBlock(1, 8)
    plain_block = plain(block)
    x = 0.9 + 0.001 * torch.randn(16, 1, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    plain_block(x)
    assert block.norm.running_mean is not None
    running = plain_block[1]
    assert isinstance(running, nn.BatchNorm2d)
    assert running.running_mean is not None
    assert torch.allclose(block.norm.running_mean, running.running_mean, rtol=0, atol=1e-5)


def test_feature_scale_centres_divides_and_sets_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + 10
    h[:, 2] = 3.0  # a dimension that never varies
    scale = FeatureScale(6).double()
    scale.set_statistics(h.mean(dim=0), h.std(dim=0))
    scaled = scale(h)
    deviation = h.numpy().std(axis=0, ddof=1)
    deviation[2] = 1.0
    centred = (h.numpy() - h.numpy().mean(axis=0)) / deviation
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True) * np.sqrt(6)
    assert np.allclose(scaled.numpy(), expected, rtol=0, atol=1e-12)
    assert torch.allclose(scaled.square().sum(dim=1), torch.full((50,), 6.0).double())
    assert set(scale.state_dict()) == {"mean", "deviation"}  # they travel with the model


def test_feature_whitening_is_square_root_unit_length_half_whitening() -> None:
    rng = np.random.default_rng(0)
    h = rng.gamma(0.5, size=(400, 6)) @ rng.normal(size=(6, 6))
    h[:, 2] = 0.0  # a dimension that never varies
    scale = FeatureWhitening(6).double()
    evened = power_transform(torch.from_numpy(h))
    scale.set_statistics(evened.mean(dim=0), torch.cov(evened.T))

    rows = []
    for row in h:
        root = np.array([np.sign(v) * np.sqrt(abs(v)) for v in row])
        rows.append(root / np.sqrt((root**2).sum()))
    u = np.stack(rows)
    # By singular values of the data, not by the covariance.
    _, singular, axes = np.linalg.svd(u - u.mean(axis=0))
    deviation = singular / np.sqrt(len(u) - 1)
    whitening = axes.T @ np.diag(1 / np.sqrt(deviation + 1e-3 * deviation.max())) @ axes
    expected = (u - u.mean(axis=0)) @ whitening
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True) * np.sqrt(6)

    scaled = scale(torch.from_numpy(h))
    assert np.allclose(scaled.numpy(), expected, rtol=0, atol=1e-6)
    assert torch.allclose(scaled.square().sum(dim=1), torch.full((400,), 6.0).double())
    assert set(scale.state_dict()) == {"mean", "whitening"}  # they travel with the model


def test_half_whitening_leaves_the_root_of_each_deviation() -> None:
    rng = np.random.default_rng(1)
    u = rng.normal(size=(5000, 4)) @ np.diag([1.0, 0.5, 0.1, 0.02])
    scale = FeatureWhitening(4).double()
    scale.set_statistics(torch.zeros(4), torch.cov(torch.from_numpy(u).T))
    after = (torch.from_numpy(u) @ scale.whitening).std(dim=0)
    expected = np.sqrt(u.std(axis=0, ddof=1))
    assert np.allclose(after.numpy(), expected, rtol=0.05)


def test_features_that_never_vary_are_left_finite() -> None:
    scale = FeatureWhitening(3)
    scale.set_statistics(torch.full((3,), 3**-0.5), torch.zeros(3, 3, dtype=torch.float64))
    assert torch.isfinite(scale(torch.ones(2, 3))).all()


def test_feature_decoder_has_the_layers_of_table_8() -> None:
    decoder = FeatureDecoder(256, 64)
    layers = [(m.in_features, m.out_features) for m in decoder.mlp if isinstance(m, nn.Linear)]
    assert layers == [(64, 512), (512, 512), (512, 256)]
    assert [type(m) for m in decoder.mlp] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert decoder(torch.randn(3, 64)).shape == (3, 256)
