"""Checkpoints: one file with all that a run needs to go on, written atomically, read without pickled code."""

from __future__ import annotations

import os
import random
import tempfile
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch

CHECKPOINT = "checkpoint.pt"
"""Name of the checkpoint in a run folder."""
VERSION = 2
POSITION = {"stage", "step", "optimizer", "schedule", "rng", "elapsed"}
KEYS = POSITION | {"version", "kind", "projector", "settings", "image_shape", "data_fingerprint", "model", "best"}


READ_ERRORS = (
    RuntimeError,
    BadZipFile,
    zlib.error,
    EOFError,
    LookupError,
    ValueError,
    OSError,
)


class CheckpointError(ValueError):
    """The file is not a checkpoint of ours, or not one of this version."""


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the name always holds either the old file or the new one, whole.

    Raises:
        OSError: the folder cannot be written; the old file stays, no temporary file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU; nothing but tensors and plain values can come out of it.

    Raises:
        CheckpointError: the file is missing, truncated, not ours, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file; name one that `metagmvae train` wrote")
    try:
        # torch does not check the sums that it writes: a flipped bit would come back as another weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch's own words advise to switch the guard off.
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain values; it was not written by metagmvae"
        ) from error
    except READ_ERRORS as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({reason}); it is truncated or was not written by metagmvae"
        ) from error
    if not isinstance(state, dict) or "version" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of metagmvae (no version in it)")
    if state["version"] != VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {state['version']}, and this metagmvae reads version {VERSION}: "
            "use the version of metagmvae that wrote it, or train again"
        )
    missing = sorted(KEYS - state.keys())
    if missing:
        raise CheckpointError(f"{path}: not a whole checkpoint, it lacks {', '.join(missing)}")
    return state


def random_state() -> dict[str, Any]:
    """Global random states. Training draws from (seed, step) alone; these keep a user's own hooks in step."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": list(words), "gauss": gauss},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global random generators to a state that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
