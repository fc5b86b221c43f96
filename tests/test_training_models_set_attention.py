"""Set attention against its literal transcription; permutation equivariance; independence of sets."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import reference
import torch

from metagmvae.training.models.set_attention import SetAttention, SetAttentionBlock, elu

BLOCKS: list[Literal["transformer", "set-attention"]] = ["transformer", "set-attention"]
SCALES: list[Literal["head", "model"]] = ["head", "model"]
ACTIVATIONS: list[Literal["elu", "relu"]] = ["elu", "relu"]


def weights(block: SetAttentionBlock) -> dict[str, np.ndarray]:
    """The parameters of a block under the names of the transcription."""
    named = {}
    parts = zip(("query", "key", "value"), block.project.weight.chunk(3), block.project.bias.chunk(3), strict=True)
    for name, weight, bias in parts:
        named |= {f"{name}.weight": weight, f"{name}.bias": bias}
    for name in ("inner", "output", "outer"):
        layer = getattr(block, name)
        if layer is not None:
            named |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    return {name: value.detach().numpy() for name, value in named.items()}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("width", "heads", "points"), [(4, 1, 3), (6, 3, 5), (8, 2, 1)])
def test_block_equals_the_transcription(
    block: Literal["transformer", "set-attention"],
    scale: Literal["head", "model"],
    activation: Literal["elu", "relu"],
    width: int,
    heads: int,
    points: int,
) -> None:
    torch.manual_seed(0)
    layer = SetAttentionBlock(width, heads, scale, block, activation).double()
    x = torch.randn(2, points, width, dtype=torch.float64)
    literal = reference.transformer_block if block == "transformer" else reference.set_attention_block
    for b in range(2):
        expected = literal(x[b].numpy(), weights(layer), heads, scale, activation)
        assert np.allclose(layer(x)[b].detach().numpy(), expected, rtol=0, atol=1e-12)


def test_scales_of_paper_and_published_code() -> None:
    """At the paper's sizes: 1/8 = 1/sqrt(256 / 4) in the paper, 1/16 = 1/sqrt(256) in the published code."""
    assert SetAttentionBlock(256, 4, "head").scale == 1 / 8
    assert SetAttentionBlock(256, 4, "model").scale == 1 / 16


def test_published_block_has_no_output_projection_and_one_inner_layer() -> None:
    names = {name.split(".")[0] for name, _ in SetAttentionBlock(8, 2, block="set-attention").named_parameters()}
    assert names == {"project", "inner"}
    names = {name.split(".")[0] for name, _ in SetAttentionBlock(8, 2).named_parameters()}
    assert names == {"project", "inner", "output", "outer"}


def test_elu_for_inference_equals_its_definition() -> None:
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-1e-9, 1e-9, -0.0])])
    expected = np.where(x.numpy() > 0, x.double().numpy(), np.expm1(x.double().numpy()))
    with torch.inference_mode():
        assert np.abs(elu(x).double().numpy() - expected).max() < 1e-7
        assert torch.equal(elu(x.bfloat16()), torch.nn.functional.elu(x.bfloat16()))  # exp(x) - 1 would be too coarse
        assert elu(torch.tensor([torch.nan])).isnan()
    assert torch.equal(elu(x), torch.nn.functional.elu(x))


def test_layers_are_applied_in_order_and_zero_layers_are_the_identity() -> None:
    x = torch.randn(2, 5, 8)
    assert torch.equal(SetAttention(8, 2, 0)(x), x)
    assert not list(SetAttention(8, 2, 0).parameters())
    two = SetAttention(8, 2, 2)
    assert torch.equal(two(x), two.blocks[1](two.blocks[0](x)))


@pytest.mark.parametrize("block", BLOCKS)
def test_set_attention_is_permutation_equivariant(block: Literal["transformer", "set-attention"]) -> None:
    torch.manual_seed(1)
    encoder = SetAttention(16, 4, 2, block=block).double()
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    for _ in range(5):
        order = torch.randperm(11)
        assert torch.allclose(encoder(x[:, order]), encoder(x)[:, order], rtol=0, atol=1e-13)


@pytest.mark.parametrize("block", BLOCKS)
def test_sets_are_independent(block: Literal["transformer", "set-attention"]) -> None:
    torch.manual_seed(2)
    encoder = SetAttention(16, 4, 2, block=block).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    together = encoder(x)
    for b in range(3):
        assert torch.allclose(together[b], encoder(x[b : b + 1])[0], rtol=0, atol=1e-13)
    (gradient,) = torch.autograd.grad(together[1].sum(), x)
    assert torch.equal(gradient[0], torch.zeros(7, 16).double())
    assert torch.equal(gradient[2], torch.zeros(7, 16).double())
    # Within a set every point depends on every other one.
    (gradient,) = torch.autograd.grad(encoder(x)[1, 0].sum(), x)
    assert (gradient[1].abs().sum(dim=1) > 0).all()


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(3)
    encoder = SetAttention(4, 2, 2).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(encoder, (x,))
