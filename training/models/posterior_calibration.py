"""The record of how the probabilities of a model were calibrated. It travels with the model.

The maps are fitted by `evaluation.uncertainty`. A map of temperature T and uniform weight u replaces the probabilities
p(k) of K classes by (1 - u) p(k)^(1/T) / sum_j p(j)^(1/T) + u / K, which changes no prediction. At u = 0 this is
temperature scaling (Guo et al., ICML 2017). The uniform distribution is a component of ensemble temperature scaling
(Zhang et al., ICML 2020); it bounds the confidence where some confident predictions are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, Strict

from metagmvae.configs.limits import Temperature
from metagmvae.configs.schema import AdaptSettings
from metagmvae.pipelines.files import check_document, read_json, write_json
from metagmvae.training.models.encoders import EncoderModel, encoder_digest

CALIBRATION = "calibration.json"
"""File in a run folder: the calibration of each model of the run."""
REMEDY = "delete the file and run `metagmvae calibrate` again"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class CalibrationMap(BaseModel):
    """A map of the probabilities of a model that keeps the order of the classes; see the module."""

    model_config = ConfigDict(frozen=True, strict=True)

    temperature: Temperature = 1.0
    """T: above 1 the probabilities become less certain, below 1 more certain."""
    uniform: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """u: weight of the uniform distribution over the classes. Fits of older versions have none."""

    @property
    def is_identity(self) -> bool:
        """Whether it leaves the probabilities as they are."""
        return self.temperature == 1 and self.uniform == 0


UNCALIBRATED = CalibrationMap()
"""Leaves the probabilities as they are."""


class FittedMap(CalibrationMap):
    """The map for one kind of episodes, and the fit that it comes from."""

    mode: Literal["transductive", "inductive"]
    way: PositiveInt
    shot: PositiveInt
    temperature: Temperature
    queries: PositiveInt
    """Queries that it was fitted on."""
    nll: Finite
    """Mean negative log-likelihood of the true class of these queries, in nats, with the map."""
    nll_uncalibrated: Finite
    """The same without."""
    ece: Fraction
    """Expected calibration error of these queries with the map."""
    ece_uncalibrated: Fraction


class FittedBackground(FittedMap):
    """The level of the background component that takes queries of no labelled class, and its map."""

    background: Finite
    """Log density, as in `training.objectives.mixture.fit_semi_supervised`."""
    open_classes: PositiveInt
    """Classes of each episode that have queries and no labelled images."""
    accuracy: Fraction
    """Of these queries, where a query of no labelled class is right if it is assigned to the background."""


class HeadSettings(BaseModel):
    """The settings of the head of an encoder alone for one kind of episodes, chosen on them by accuracy."""

    model_config = ConfigDict(frozen=True, strict=True)

    way: PositiveInt
    shot: PositiveInt
    settings: dict[str, float | int | str]


class FittedHead(BaseModel):
    """The head of an encoder alone that the maps hold for."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    """Key of `evaluation.encoders.heads.HEADS`."""
    tasks: Annotated[tuple[HeadSettings, ...], Strict(False)] = ()

    def settings(self, way: int, shot: float) -> dict[str, float | int | str]:
        """Return the settings for the nearest task, as `PosteriorCalibration.nearest_map`; empty: the defaults."""
        nearest = min(self.tasks, key=lambda task: _distance(task, way, shot), default=None)
        return {} if nearest is None else nearest.settings


Fit = TypeVar("Fit", bound=FittedMap)


def _distance(fit: FittedMap | HeadSettings, way: int, shot: float) -> float:
    return abs(math.log(shot / fit.shot)) + abs(math.log(way / fit.way))


class PosteriorCalibration(BaseModel):
    """All fits of one model on one data set."""

    model_config = ConfigDict(frozen=True, strict=True)

    fitted_on: Literal["labelled classes", "augmented images"]
    """Episodes of labelled classes of the split; or episodes in which each image is a class of its own, and its
    augmented views are the labelled images and the queries."""
    split: str
    data_fingerprint: str
    adapt: AdaptSettings
    """The settings of EM that the maps hold for."""
    temperatures: Annotated[tuple[FittedMap, ...], Strict(False)]
    """The maps. They have the name of what older versions fitted, so that these read new files."""
    backgrounds: Annotated[tuple[FittedBackground, ...], Strict(False)] = ()
    head: FittedHead | None = None
    """Of an encoder alone; None for a model that classifies."""

    def nearest_map(self, adapt: AdaptSettings, mode: str, way: int, shot: float) -> CalibrationMap:
        """Return the fit nearest to a task; `UNCALIBRATED` for other settings of EM or another mode.

        The nearest fit is that with the smallest |log shot/S| + |log way/K|.

        Args:
            adapt: the settings of EM in use; those of iterations and samples may differ.
            mode: `transductive` or `inductive`.
            way: number of classes.
            shot: labelled images per class; their mean where they differ.
        """
        fit = self._nearest(self.temperatures, adapt, mode, way, shot)
        return UNCALIBRATED if fit is None else fit

    def background(self, adapt: AdaptSettings, mode: str, way: int, shot: float) -> FittedBackground | None:
        """Return the fit of the background nearest to a task, as `nearest_map` does; None if there is none."""
        return self._nearest(self.backgrounds, adapt, mode, way, shot)

    def _nearest(self, fits: Iterable[Fit], adapt: AdaptSettings, mode: str, way: int, shot: float) -> Fit | None:
        free = {"iterations", "samples"}
        if adapt.model_dump(exclude=free) != self.adapt.model_dump(exclude=free):
            return None
        usable = [fit for fit in fits if fit.mode == mode]
        return min(usable, key=lambda fit: _distance(fit, way, shot), default=None)


class _RunCalibration(BaseModel):
    """The content of `calibration.json`: a run may keep another best model for each number of shots."""

    model_config = ConfigDict(strict=True)

    models: dict[str, PosteriorCalibration]
    """By the sha256 of the weights, so that it is never applied to other weights."""


def read_calibration(run_dir: Path, model: EncoderModel) -> PosteriorCalibration | None:
    """Return the calibration of a model of a run; None if these weights have none.

    Raises:
        DataError: the file is damaged.
    """
    path = run_dir / CALIBRATION
    if not path.exists():
        return None
    content = check_document(_RunCalibration, read_json(path), path, REMEDY)
    return content.models.get(encoder_digest(model))


def write_calibration(run_dir: Path, models: Iterable[tuple[EncoderModel, PosteriorCalibration]]) -> None:
    """Write the calibration of each model of a run atomically; it replaces the file."""
    content: dict[str, Any] = {encoder_digest(model): record.model_dump(mode="json") for model, record in models}
    write_json(run_dir / CALIBRATION, {"models": content})
