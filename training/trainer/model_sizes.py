"""Checks that a model is as large as its weights, without building it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from metagmvae.configs.schema import ModelSettings


class _Uninitialised(TorchFunctionMode):
    """Skips operations that on the meta device would import a compiler for some seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.normal_:
            return args[0]
        if func is torch.eye:
            return torch.empty(args[0], args[0])
        return func(*args, **(kwargs or {}))


def check_sizes(
    build: Callable[..., torch.nn.Module],
    settings: ModelSettings,
    image_shape: tuple[int, int, int],
    weights: dict[str, torch.Tensor],
) -> None:
    """Compare the stated sizes of a model with its weights, before memory is allocated for it.

    Raises:
        RuntimeError: they differ; the message is that of `load_state_dict`.
    """
    try:
        with torch.device("meta"), _Uninitialised():
            model = build(settings, image_shape, seed=0)
    except NotImplementedError:  # a network of torchvision whose construction computes with its weights
        return
    model.load_state_dict(weights, assign=True)
