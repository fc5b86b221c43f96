"""Checkpoints: one file with the complete state of a run, written atomically, read without running pickled code."""

from __future__ import annotations

import random
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from metagmvae.pipelines.files import check_document, first_line, replaced_file
from metagmvae.pipelines.output_target import output_mode
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.checkpoint_checks import CheckpointSchema, check_archive, check_values

CHECKPOINT = "checkpoint.pt"
"""Name of the checkpoint in a run folder."""
VERSION = 2
KEYS = {
    *("version", "kind", "settings", "image_shape", "data_fingerprint", "best", "elapsed"),
    *("stage", "step", "model", "projector", "optimizer", "schedule", "rng"),
}


class CheckpointError(ValueError):
    """The file is not a readable checkpoint of this version."""


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically, as `replaced_file`.

    Raises:
        OSError: as in `replaced_file`.
    """
    with replaced_file(Path(path), output_mode(path)) as file:
        try:
            torch.save({"version": VERSION, **state}, file)
        except RuntimeError as error:  # PyTorch's writer of zip files raises its own error on a full disk
            if isinstance(error.__context__, OSError):
                raise OSError(error.__context__.errno, error.__context__.strerror) from error
            raise


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain values are unpickled, never code.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, of another version, or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file; name one that `metagmvae train` wrote")
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_values(state)
    except DataError as error:  # the file cannot be read
        raise CheckpointError(str(error)) from error
    except UnpicklingError as error:
        # torch's own message recommends weights_only=False, which would run code from the file.
        raise CheckpointError(
            f"{path}: refused, it contains more than tensors and plain values; it was not written by metagmvae"
        ) from error
    except Exception as error:  # torch.load and zipfile raise many types on damaged files
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({first_line(error)}); it is truncated or was not written by metagmvae"
        ) from error
    if not isinstance(state, dict) or "version" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of metagmvae (it has no version)")
    version = state["version"]
    if type(version) is not int or version != VERSION:
        shown = version if isinstance(version, (int, str, type(None))) else type(version).__name__
        raise CheckpointError(
            f"{path}: checkpoint version {shown}, but this metagmvae reads version {VERSION}: "
            "use the version of metagmvae that wrote it, or train again"
        )
    missing = sorted(key for key in KEYS if key not in state)
    if missing:
        raise CheckpointError(f"{path}: incomplete checkpoint, it lacks {', '.join(missing)}")
    try:
        check_document(CheckpointSchema, state, path, "it was not written by metagmvae; use another checkpoint")
    except DataError as error:
        raise CheckpointError(str(error)) from error
    return state


def random_state() -> dict[str, Any]:
    """States of the global generators. Training itself uses keyed generators only; these are for a user's own hooks."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": list(words), "gauss": gauss},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global generators to a state from `random_state`."""
    torch.set_rng_state(state["torch"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
