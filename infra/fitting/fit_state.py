"""The request, the stored state and the output folder of `metagmvae fit`."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from metagmvae.infra.fitting.fit_plan import FitPlan, format_seconds
from metagmvae.infra.fitting.fit_schedule import FitSchedule
from metagmvae.pipelines.files import check_document, exclusive_lock, read_json
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.package import CARD, load_model, save_package

LOG = logging.getLogger(__name__)
STATE, REPORT, LOCK = "fit.json", "report.html", ".fit.lock"
DATA, RUN, LABELLED, RESULTS, EXAMPLE = "data", "run", "labelled", "results", "example"


@dataclass(frozen=True)
class FitRequest:
    """The arguments of `metagmvae fit`."""

    pictures: Path
    labelled: Path | None
    out: Path
    budget_s: float
    seed: int
    unlabelled: bool
    encoder: str | None = None
    """Name of a published encoder to compare with, as `is_encoder_name` accepts it."""
    weights: Path | None = None
    """File of its weights; None: the published ones."""
    image_size: int | None = None
    """Side to which its images are resized; None: its published input size."""
    crop: bool = True
    """Whether the middle square of each image is cut out."""
    labels: Path | None = None
    """Table with the classes of the pictures; None: the folders are the classes."""
    groups: str | None = None
    """Column of the table with what keeps images together in one split, such as the patient."""


class FitState(BaseModel):
    """Content of `fit.json`: everything that a continued command needs."""

    model_config = ConfigDict(strict=True, extra="forbid")

    plan: FitPlan
    schedule: FitSchedule | None = None
    seconds: dict[str, float] = {}
    """Seconds of each part, over all interruptions."""
    commands: list[str] = []
    """The commands that do the same."""
    result: dict[str, Any] | None = None
    """The answer; None: not finished."""


def read_state(out: Path) -> FitState | None:
    """Return the state of an earlier call; None for a new or empty folder.

    Raises:
        DataError: the folder holds something else.
    """
    if (out / STATE).is_file():
        content = read_json(out / STATE)
        return check_document(FitState, content, out / STATE, "delete the folder, or choose another --out")
    if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise DataError(f"--out {out}: exists and is not of metagmvae fit; choose a new folder")
    return None


def check_same(out: Path, stored: FitPlan, plan: FitPlan) -> None:
    """Refuse to continue with other pictures or options; a new budget changes nothing that is planned already."""
    ours, theirs = (p.model_dump(exclude={"budget_s"}) for p in (plan, stored))
    changed = [key for key in ours if ours[key] != theirs[key]]
    if changed:
        raise DataError(
            f"--out {out}: has other pictures or options ({', '.join(changed)} differ); choose another --out"
        )
    if plan.budget_s != stored.budget_s:
        LOG.info(f"the steps are already set for {format_seconds(stored.budget_s)}; --budget changes them no more")


@contextmanager
def claimed_folder(out: Path) -> Iterator[None]:
    """Create and lock the output folder; undo it if the pictures turn out to be no data set.

    Raises:
        DataError: the folder cannot be created, or another process writes there.
    """
    created = next((path for path in reversed([out, *out.parents]) if not path.exists()), None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {out}: cannot be created ({error.strerror}); choose another folder") from error
    with exclusive_lock(out / LOCK, f"{out}: another metagmvae fit writes here; wait for it, or choose another --out"):
        try:
            yield
        except DataError:
            if not (out / DATA / "dataset.json").exists():
                (out / STATE).unlink(missing_ok=True)
                shutil.rmtree(out / DATA, ignore_errors=True)
                if created is not None:
                    shutil.rmtree(created, ignore_errors=True)
            raise


def copy_package(out: Path) -> None:
    """Copy the model of the run into the output folder, which makes it a model package; once."""
    if (out / CARD).exists():
        return
    temporary = out / ".package"
    shutil.rmtree(temporary, ignore_errors=True)
    files = save_package(temporary, load_model(out / RUN)).iterdir()
    for path in sorted(files, key=lambda path: path.name == CARD):  # the card is last: it makes the folder a package
        os.replace(path, out / path.name)
    temporary.rmdir()
