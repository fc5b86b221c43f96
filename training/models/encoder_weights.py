"""Loads published or local weights into an encoder: safetensors, or PyTorch files without code (`weights_only`)."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from metagmvae.pipelines.files import first_line
from metagmvae.training.models.encoders import EncoderError

CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "params", "teacher")
"""Entries of checkpoints of other programs that hold the weights, the first one that exists."""
WRAPPERS = ("module.", "_orig_mod.", "encoder.", "backbone.", "model.", "net.")
"""Prefixes that other programs put before the names of the weights of an encoder."""
MOST_NAMED = 3
"""Keys that an error names of each kind."""


class WeightsError(EncoderError):
    """A weights file cannot be read, or does not fit the network. The message is one line."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights, by name; never unpickles objects other than tensors and plain values.

    Raises:
        WeightsError: the file is missing, is not of a known format, or holds no named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file; give a .safetensors, .pt or .pth file") from error
    except (pickle.UnpicklingError, KeyError, EOFError) as error:
        reason = "it holds objects other than tensors, or is no file of PyTorch"
        raise WeightsError(f"{path}: {reason}; save the state_dict alone, best as .safetensors") from error
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read ({first_line(error)}); give a .safetensors or .pth file") from error
    while isinstance(found, Mapping) and (inner := next((key for key in CONTAINERS if key in found), None)):
        if not isinstance(found[inner], Mapping):
            break
        found = found[inner]
    tensors = {str(key): value for key, value in found.items()} if isinstance(found, Mapping) else {}
    other = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if not tensors or other:
        what = f"{other[0]!r} is no tensor" if other else "no tensors by name"
        raise WeightsError(f"{path}: holds no state_dict ({what}); save the state_dict of the network alone")
    return tensors


def fit_weights(
    network: nn.Module, weights: Mapping[str, Tensor], head: frozenset[str], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Match weights with a network by name and shape.

    Weights outside the network are left out only if they belong to its classifier.

    Args:
        network: without its classifier.
        weights: by name, as `unwrapped` returns them.
        head: names of the weights of the classifier.
        source: of the weights, for the message.

    Returns:
        The weights of the network; and the names of those that were left out.

    Raises:
        WeightsError: a weight is missing, unexpected, or has another shape.
    """
    expected, named = network.state_dict(), weights
    left_out = [key for key in named if key not in expected and key in head]
    unexpected = [key for key in named if key not in expected and key not in head]
    missing = [key for key in expected if key not in named and not key.endswith("num_batches_tracked")]
    shapes = [
        f"{key} {tuple(named[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in named and named[key].shape != value.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "other shapes": shapes}
    if any(problems.values()):
        parts = [f"{len(keys)} {what} ({_named(keys)})" for what, keys in problems.items() if keys]
        raise WeightsError(f"{source}: does not fit the network: {'; '.join(parts)}; use weights of this network")
    return {key: named.get(key, value) for key, value in expected.items()}, left_out


def _named(keys: list[str]) -> str:
    return ", ".join(keys[:MOST_NAMED]) + (", …" if len(keys) > MOST_NAMED else "")


def unwrapped(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove prefixes of `WRAPPERS` from names, as long as that gives more names of a network.

    Args:
        weights: of a file.
        expected: the weights of the network.

    Returns:
        The weights with a prefix, by the names without it; and the names of the others, which are left out.
    """
    weights = dict(weights)
    left_out: list[str] = []

    def fitting(names: Mapping[str, Tensor]) -> int:
        return len(expected.keys() & names.keys())

    while True:
        for prefix in WRAPPERS:
            inner = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            nested = any(key.startswith(WRAPPERS) for key in inner)
            if fitting(inner) > fitting(weights) or (nested and not fitting(weights)):
                left_out += [key for key in weights if not key.startswith(prefix)]
                weights = inner
                break
        else:
            return weights, left_out
