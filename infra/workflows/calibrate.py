"""`metagmvae calibrate`, and the calibration at the end of a training: fits, and stores the result with the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.encoders.head_model import with_head
from metagmvae.evaluation.uncertainty.fit_calibration import CalibrationPlan, fit_calibration
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encoders import encoder_digest
from metagmvae.training.models.posterior_calibration import CALIBRATION, PosteriorCalibration, write_calibration
from metagmvae.training.trainer.package import CARD, LoadedModel, calibrate_package, load_model, save_package

LOG = logging.getLogger(__name__)


def calibrate_path(
    path: Path,
    dataset: Dataset,
    plan: CalibrationPlan,
    *,
    split: str | None = None,
    head: str | None = None,
    progress: ProgressBar = no_progress,
) -> dict[str, Any]:
    """Fit the calibration of a run, checkpoint or model package, and store it there.

    A run that keeps another best model for each number of shots has each of them calibrated. For an encoder alone, the
    settings of `head` (`with_head`) are chosen too.

    Returns:
        `calibration`: the file that was written, and the keys of `calibration_summary`.

    Raises:
        DataError: there is no model, or the data does not fit it.
    """
    models = list(_models(path, plan))
    records = [
        fit_calibration(with_head(m, head), dataset, plan, device=default_device(), split=split, progress=progress)
        for m in models
    ]
    if (path / CARD).is_file():
        calibrate_package(path, records[0])
        file = path / CARD
    else:
        folder = path if path.is_dir() else path.parent
        write_calibration(folder, zip((loaded.model for loaded in models), records, strict=True))
        file = folder / CALIBRATION
    return {"calibration": str(file)} | calibration_summary(records)


def calibrate_to_package(
    loaded: LoadedModel,
    dataset: Dataset,
    plan: CalibrationPlan,
    out: Path,
    *,
    split: str | None = None,
    head: str | None = None,
    progress: ProgressBar = no_progress,
) -> dict[str, Any]:
    """Fit the calibration of a model, and write the model with it as a new package; see `calibrate_path`."""
    if out.exists():
        raise DataError(f"{out}: already exists; choose a new folder for the model package")
    options: dict[str, Any] = {"device": default_device(), "split": split, "progress": progress}
    record = fit_calibration(with_head(loaded, head), dataset, plan, **options)
    save_package(out, replace(loaded, calibration=record))
    return {"calibration": str(out / CARD)} | calibration_summary([record])


def calibrate_run(run_dir: Path, settings: Settings, dataset: Dataset) -> None:
    """Fit the temperatures of a trained run as its settings say (`validation.calibration_episodes`; 0: none).

    Where the data have no labelled validation classes and cannot be augmented either, a line is logged.
    """
    validation = settings.validation
    if not validation.calibration_episodes:
        return
    plan = CalibrationPlan(
        (validation.way,),
        validation.shots,
        validation.query,
        validation.calibration_episodes,
        validation.seed,
        background=False,
    )
    try:
        calibrate_path(run_dir, dataset, plan)
    except DataError as error:
        LOG.warning("%s: the probabilities were not calibrated: %s", run_dir, error)


def _models(path: Path, plan: CalibrationPlan) -> Iterator[LoadedModel]:
    """The different models that the shots of the plan select from a run; a package or other run has one."""
    seen = set()
    for shot in (None, *plan.shots):
        loaded = load_model(path, shot=shot)
        digest = encoder_digest(loaded.model)
        if digest not in seen:
            seen.add(digest)
            yield loaded


def calibration_summary(records: list[PosteriorCalibration]) -> dict[str, Any]:
    """Return `fitted_on`, the split, and one row for each temperature and each background level, as plain values."""
    first = records[0]
    names = {} if len(records) == 1 else {id(record): number for number, record in enumerate(records, start=1)}

    def rows(fits: str) -> list[dict[str, Any]]:
        return [
            ({"model": names[id(record)]} if names else {}) | fit.model_dump(mode="json")
            for record in records
            for fit in getattr(record, fits)
        ]

    answer: dict[str, Any] = {"fitted_on": first.fitted_on, "split": first.split}
    if first.head is not None:
        answer["head"] = first.head.model_dump(mode="json")
    answer["temperatures"] = rows("temperatures")
    return answer | ({"backgrounds": rows("backgrounds")} if first.backgrounds else {})
