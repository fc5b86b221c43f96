"""Classification with the head of an encoder alone: which options suit it, and what the answer records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from metagmvae.evaluation.encoders.head_model import WITHOUT_BACKGROUND, HeadModel, with_head
from metagmvae.evaluation.encoders.heads import HEADS, check_head
from metagmvae.evaluation.uncertainty.fit_calibration import CalibrationPlan, fit_calibration
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.trainer.package import LoadedModel


def loaded_with_head(
    loaded: LoadedModel,
    head: str | None,
    dataset: Dataset | None,
    mode: PredictionMode,
    sizes: tuple[int, int],
    *,
    unknown: bool,
) -> LoadedModel:
    """Return an encoder alone with its head, calibrated on the validation classes of a dataset if there is one.

    Args:
        loaded: an encoder alone, or any other model, which is returned as it is.
        head: key of `HEADS`; None: as `with_head`.
        dataset: chooses the settings of the head, its temperature and its level for queries of no labelled class; None:
            those that the encoder was calibrated with, or else the defaults.
        mode: how the queries are classified.
        sizes: classes of the task, and labelled images per class.
        unknown: whether a query may be of no labelled class.

    Raises:
        DataError: an option is for the other kind of model, or the head does not suit it; or as `fit_calibration`.
    """
    name = loaded.settings.name
    if isinstance(loaded.model, MetaLearner):
        if head is not None:
            raise DataError(f"--head {head}: is for an encoder alone, and {name} is not one; omit it")
        if dataset is not None:
            raise DataError(f"--data: chooses the settings of the head of an encoder, and {name} is not one; omit it")
        return loaded
    named = with_head(loaded, head)
    assert isinstance(named.model, HeadModel)
    head = check_head(named.model.head.name, mode)
    if unknown and head == WITHOUT_BACKGROUND:
        raise DataError(f"--unknown: the head {head} gives every image to one of the classes; choose another --head")
    if dataset is None:
        if unknown and (named.calibration is None or not named.calibration.backgrounds):
            raise DataError(
                f"--unknown: {name} has no level for images of none of the classes; give --data URI with validation "
                "classes, or fit it once: metagmvae calibrate MODEL --data URI --head HEAD"
            )
        return named
    way, shot = sizes
    plan = CalibrationPlan((way,), (shot,), background=unknown)
    calibration = fit_calibration(named, dataset, plan, device=default_device())
    return with_head(replace(loaded, calibration=calibration), head)


def head_record(loaded: LoadedModel, way: int, shot: float) -> dict[str, Any]:
    """Return `head` of the answer: encoder, head, settings and what they were chosen on; empty for other models."""
    if not isinstance(loaded.model, HeadModel):
        return {}
    head, calibration = loaded.model.head, loaded.calibration
    record: dict[str, Any] = {"encoder": loaded.settings.model.encoder, "name": head.name}
    if settings := head.settings(way, shot):
        record["settings"] = settings
    if calibration is not None:
        chosen_on = {"classes": calibration.fitted_on, "split": calibration.split}
        return {"head": record | {"chosen_on": chosen_on | {"data_fingerprint": calibration.data_fingerprint}}}
    if HEADS[head.name].grid:
        record["note"] = "defaults: no dataset (--data) to choose them on"
    return {"head": record}
