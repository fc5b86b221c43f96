"""Encoders by name: layers of Table 6, torchvision's networks without their last layer, digests of encoders."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torchvision
from torch import nn

from metagmvae.training.models.encoders import (
    EncoderError,
    EncoderModel,
    build_encoder,
    build_projector,
    encoder_digest,
)


def test_conv5_has_the_sizes_of_table_6() -> None:
    encoder = build_encoder("conv5", (3, 84, 84), 64).eval()
    x, sizes = torch.rand(2, 3, 84, 84), []
    for block in encoder.blocks:  # type: ignore[union-attr]
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 42, 42), (64, 21, 21), (64, 10, 10), (64, 5, 5), (64, 2, 2)]
    assert encoder.feature_dim == 256
    literal = [(nn.Conv2d(3 if n == 0 else 64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)) for n in range(5)]
    x = y = torch.rand(2, 3, 84, 84)
    with torch.no_grad():
        for (conv, norm), block in zip(literal, encoder.blocks, strict=True):  # type: ignore[arg-type]
            conv.load_state_dict(block.conv.state_dict())
            y = nn.functional.max_pool2d(torch.relu(norm.eval()(conv(y))), 2)
        assert torch.allclose(encoder(x), y.flatten(1), atol=1e-5)


def test_images_of_another_size_are_resized() -> None:
    encoder = build_encoder("conv4", (3, 84, 84), 8, image_size=28).eval()
    assert encoder.feature_dim == 8 * 2 * 2
    x = torch.rand(3, 3, 84, 84)
    small = nn.functional.interpolate(x, (28, 28), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.equal(encoder(x), encoder(small))
        assert torch.equal(encoder(small), encoder.net(small))  # type: ignore[operator]


@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("mobilenet_v3_small", 1024), ("vgg11", 4096)])
def test_torchvision_networks_return_the_input_of_their_last_layer(name: str, features: int) -> None:
    encoder = build_encoder(name, (1, 64, 64), 64).eval()
    assert encoder.feature_dim == features
    with torch.no_grad():
        h = encoder(torch.rand(2, 1, 64, 64))
    assert h.shape == (2, features)
    assert torch.isfinite(h).all()


def test_unusable_encoders_give_a_one_line_error() -> None:
    for name, shape, text in [
        ("resnet99", (3, 84, 84), "no such encoder; did you mean resnet50 or resnet34 or resnet18? encoders by name:"),
        ("con5", (3, 84, 84), "no such encoder; did you mean conv5? encoders by name: training/README.md"),
        ("zzz", (3, 84, 84), "no such encoder; encoders by name: training/README.md"),
        ("torchvision:resnet99", (3, 84, 84), "no such classification network; did you mean resnet50 or"),
        ("alexnet", (3, 28, 28), "does not accept images of (3, 28, 28)"),
        ("conv5", (3, 28, 28), "too small for 5 poolings"),
        ("squeezenet1_0", (3, 84, 84), "has no last linear layer"),
    ]:
        with pytest.raises(EncoderError) as caught:
            build_encoder(name, shape, 64)
        assert text in str(caught.value)
        assert str(caught.value).startswith(f"model.encoder ({name})")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


def test_digest_depends_on_weights_statistics_and_final_relu() -> None:
    first, second = (build_encoder("conv4", (1, 28, 28), 4) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert encoder_digest(first) == encoder_digest(second.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    assert len(encoder_digest(first)) == len(hashlib.sha256().hexdigest())
    with torch.no_grad():
        next(second.parameters())[0, 0, 0, 0] += 1e-6
    assert encoder_digest(first) != encoder_digest(second)
    second.load_state_dict(first.state_dict())
    second.blocks[0].norm.running_mean[0] = 0.5  # type: ignore[union-attr,index]
    assert encoder_digest(first) != encoder_digest(second)
    second = build_encoder("conv4", (1, 28, 28), 4, final_relu=False)
    second.load_state_dict(first.state_dict())
    assert encoder_digest(first) != encoder_digest(second)


@pytest.mark.parametrize(("name", "size"), [("conv4", 28), ("conv5", 84)])
def test_imagenet_normalisation_stands_in_front_of_the_first_convolution(name: str, size: int) -> None:
    """As torchvision's Normalize on the images, in training mode too, where normalisation is folded into the first
    convolution. It adds no weights, so the weights of either encoder load into the other."""
    encoder = build_encoder(name, (3, size, size), 4, normalise="imagenet")
    plain = build_encoder(name, (3, size, size), 4)
    plain.load_state_dict(encoder.state_dict())
    x = torch.rand(5, 3, size, size)
    normalised = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(x)
    for mode in (True, False):
        assert torch.allclose(encoder.train(mode)(x), plain.train(mode)(normalised), atol=1e-5)
    assert not torch.allclose(encoder(x), plain(x), atol=1e-2)
    assert encoder_digest(encoder) != encoder_digest(plain)


def test_imagenet_normalisation_needs_colours() -> None:
    with pytest.raises(EncoderError, match=r'model.normalise \("imagenet"\) needs three channels'):
        build_encoder("conv4", (1, 28, 28), 4, normalise="imagenet")


def test_digests_of_stored_encoders_stay_valid() -> None:
    """Feature data sets name their encoder by its digest."""
    encoder = build_encoder("conv4", (1, 28, 28), 2)
    for p in encoder.parameters():
        nn.init.constant_(p, 0.5)
    assert encoder_digest(encoder).startswith("6eaf416daa40")
    assert all(name.startswith("net.") for name in build_encoder("resnet18", (3, 64, 64), 0).state_dict())


def test_encoder_model_does_not_scale_features() -> None:
    model = EncoderModel(build_encoder("conv4", (1, 28, 28), 4), (1, 28, 28)).eval()
    x = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.encode_images(model.scale_images(x)), model.encoder(x.float() / 255))


def test_projector_has_the_layers_of_simclr() -> None:
    head = build_projector(8, (6, 4))
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert head(torch.rand(2, 8)).shape == (2, 4)
    x = torch.rand(2, 8)
    assert build_projector(8, ())(x) is x


@pytest.mark.parametrize("name", ["conv4", "conv5"])
def test_without_the_final_relu_features_have_both_signs(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 1, 32, 32)
    assert build_encoder(name, (1, 32, 32), 4)(x).amin() >= 0
    assert build_encoder(name, (1, 32, 32), 4, final_relu=False)(x).amin() < 0
