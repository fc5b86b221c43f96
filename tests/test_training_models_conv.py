"""Convolutional encoders and decoders: layers of Tables 3, 4 and 8, folded batch normalisation, odd image sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.models.conv import (
    ConvBlock,
    ConvDecoder,
    ConvEncoder,
    FeatureDecoder,
    max_pool,
    pooled_sizes,
)


def unfolded(block: ConvBlock) -> nn.Sequential:
    """A block in the order of Table 3: conv, BatchNorm, ReLU, max pooling."""
    return nn.Sequential(
        copy.deepcopy(block.conv),
        copy.deepcopy(block.norm),
        nn.ReLU() if block.relu else nn.Identity(),
        nn.MaxPool2d(2, 2, ceil_mode=True),
    )


def table_3(encoder: ConvEncoder) -> nn.Sequential:
    return nn.Sequential(*(unfolded(block) for block in encoder.blocks), nn.Flatten())


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random scales and shifts of batch normalisation, some negative: the order of pooling and ReLU must not matter."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator, dtype=layer.weight.dtype)
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator, dtype=layer.bias.dtype)
    return module


@pytest.mark.parametrize("round_up", [True, False])
@pytest.mark.parametrize("size", [(4, 6), (4, 5), (7, 6), (3, 3)])
def test_pooling_for_inference_equals_that_for_training_bit_for_bit(size: tuple[int, int], round_up: bool) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0] = float("nan")
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        expected = nn.MaxPool2d(2, ceil_mode=round_up)(images)
        with torch.inference_mode():
            pooled = max_pool(images, round_up)
        torch.testing.assert_close(pooled, expected, rtol=0, atol=0, equal_nan=True)
        assert pooled.stride() == expected.stride()


def test_feature_maps_have_the_sizes_of_table_3() -> None:
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
    assert not any(isinstance(m, nn.Sigmoid) for m in decoder.modules())  # the sigmoid is part of the loss


@pytest.mark.parametrize("channels", [3, 4, 8])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("final_relu", [True, False])
def test_folded_encoder_equals_table_3_with_gradients_and_running_statistics(
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
    channels_last = encoder.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(channels_last, literal(x), rtol=0, atol=1e-12)


def test_folded_block_in_float32_is_close_to_float64() -> None:
    """Bright images with little contrast, for which E[x^2] - E[x]^2 would lose all digits of the variance."""
    torch.manual_seed(0)
    block = ConvBlock(1, 8)
    exact = copy.deepcopy(block).double()
    x = 0.9 + 0.001 * torch.randn(16, 1, 28, 28)
    assert torch.allclose(block(x).double(), unfolded(exact)(x.double()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("inputs", [1, 3, 8])
def test_gradient_of_the_input_is_complete(inputs: int) -> None:
    torch.manual_seed(1)
    block = ConvBlock(inputs, 4).double()
    randomised(block)
    x = torch.randn(2, inputs, 5, 5, dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor) -> Tensor:
        return block(x)

    assert torch.autograd.gradcheck(apply, (x,))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 84, 84), (3, 17, 33), (1, 5, 9), (4, 16, 16), (1, 2, 2)])
def test_decoder_returns_the_image_size_of_the_encoder(shape: tuple[int, int, int]) -> None:
    encoder, decoder = ConvEncoder(shape, 4).eval(), ConvDecoder(shape, 4, 3, 8).eval()
    assert encoder(torch.rand(2, *shape)).shape == (2, encoder.feature_dim)
    assert decoder(torch.randn(2, 3)).shape == (2, *shape)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 84, 84), (3, 17, 33)])
def test_decoder_without_mlp_and_batch_normalisation(shape: tuple[int, int, int]) -> None:
    """Images do not depend on each other; features of Conv4 are the first map, other latents go through one layer."""
    encoder = ConvEncoder(shape, 4)
    for latent, kind in ((encoder.feature_dim, nn.Identity), (5, nn.Linear)):
        decoder = ConvDecoder(shape, 4, latent, width=0, batch_norm=False).double()
        assert type(decoder.mlp) is kind
        assert not any(isinstance(module, nn.BatchNorm2d) for module in decoder.modules())
        z = torch.randn(3, latent, dtype=torch.float64)
        assert decoder(z).shape == (3, *shape)
        assert torch.allclose(decoder(z), torch.cat([decoder(z[i : i + 1]) for i in range(3)]), rtol=0, atol=1e-12)


def test_channels_last_gives_the_same_features() -> None:
    torch.manual_seed(2)
    encoder = ConvEncoder((1, 28, 28), 8).eval()
    x = torch.rand(4, 1, 28, 28)
    default = encoder(x)
    channels_last = encoder.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(default, channels_last, rtol=0, atol=1e-5)


def test_images_are_independent_in_evaluation_mode() -> None:
    encoder = ConvEncoder((1, 12, 12), 4).double().eval()
    x = torch.rand(5, 1, 12, 12, dtype=torch.float64)
    separate = torch.cat([encoder(x[i : i + 1]) for i in range(5)])
    assert torch.allclose(encoder(x), separate, rtol=0, atol=1e-13)


def test_one_pixel_in_training_mode_gives_finite_statistics() -> None:
    block = ConvBlock(1, 2)
    block(torch.rand(1, 1, 1, 1))
    assert all(torch.isfinite(buffer.float()).all() for buffer in block.buffers())


def test_at_least_float32_converts_half_precision_only() -> None:
    lifted = [at_least_float32(torch.zeros(1, dtype=d)).dtype for d in (torch.bfloat16, torch.float32, torch.float64)]
    assert lifted == [torch.float32, torch.float32, torch.float64]


def test_batch_statistics_stay_float32_under_autocast() -> None:
    torch.manual_seed(3)
    block = ConvBlock(1, 8)
    unfolded_block = unfolded(block)
    x = 0.9 + 0.001 * torch.randn(16, 1, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    unfolded_block(x)
    assert block.norm.running_mean is not None
    running = unfolded_block[1]
    assert isinstance(running, nn.BatchNorm2d)
    assert running.running_mean is not None
    assert torch.allclose(block.norm.running_mean, running.running_mean, rtol=0, atol=1e-5)


def test_feature_decoder_has_the_layers_of_table_8() -> None:
    decoder = FeatureDecoder(256, 64)
    layers = [(m.in_features, m.out_features) for m in decoder.mlp if isinstance(m, nn.Linear)]
    assert layers == [(64, 512), (512, 512), (512, 256)]
    assert [type(m) for m in decoder.mlp] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert decoder(torch.randn(3, 64)).shape == (3, 256)
