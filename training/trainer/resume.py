"""Checks of a checkpoint that a run is resumed from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metagmvae.configs.load import SettingsError, differences, settings_from_json
from metagmvae.configs.schema import Settings
from metagmvae.pipelines.files import first_line
from metagmvae.training.trainer.checkpoint import CheckpointError
from metagmvae.training.trainer.context import TrainState

REMEDY = "start a new run in another folder (run.out), or restore the checkpoint"


def stored_kind(settings: Settings, kind: str) -> str:
    """What a checkpoint and the record of a run call it: the method, or `encoder`."""
    return "encoder" if kind == "encoder" else settings.method.name


def check_same_run(
    state: TrainState, settings: Settings, data_fingerprint: str, kind: str, path: str | Path = "checkpoint"
) -> None:
    """Check that a checkpoint belongs to the run with these settings and data.

    Raises:
        CheckpointError: it belongs to another run.
    """
    try:
        changed = differences(settings, settings_from_json(state["settings"]))
    except SettingsError as error:
        raise CheckpointError(f"{path}: {error}; {REMEDY}") from error
    if changed:
        raise CheckpointError(f"{path}: written by a run with other settings ({'; '.join(changed)}); {REMEDY}")
    if state["data_fingerprint"] != data_fingerprint:
        raise CheckpointError(f"{path}: written by a run on other data ({state['data_fingerprint'][:12]}…); {REMEDY}")
    expected = stored_kind(settings, kind)
    if state["kind"] != expected or (kind == "encoder" and state["stage"] != "pretrain"):
        raise CheckpointError(f"{path}: is of {state['kind']}, stage {state['stage']}, not of {expected}; {REMEDY}")
    steps = settings.pretrain.steps if state["stage"] == "pretrain" else settings.train.steps
    if state["step"] > steps:
        raise CheckpointError(f"{path}: is of step {state['step']:,}, but {state['stage']} has {steps:,}; {REMEDY}")


@contextmanager
def restoring() -> Iterator[None]:
    """Convert the errors of torch while a state is restored.

    Raises:
        CheckpointError: the state does not fit the model or the optimiser.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint: does not fit the model or optimiser ({first_line(error)}); {REMEDY}"
        ) from error
