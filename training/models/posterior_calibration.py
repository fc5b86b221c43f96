"""The record of how the probabilities of a model were calibrated. It travels with the model.

Temperatures are fitted by `evaluation.uncertainty`. A temperature T of the posterior replaces the probabilities p(k)
by p(k)^(1/T), divided by their sum, which changes no prediction (Guo et al., ICML 2017).
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


class FittedTemperature(BaseModel):
    """The temperature of the posterior for one kind of episodes, and the fit that it comes from."""

    model_config = ConfigDict(frozen=True, strict=True)

    mode: Literal["transductive", "inductive"]
    way: PositiveInt
    shot: PositiveInt
    temperature: Temperature
    queries: PositiveInt
    """Queries that it was fitted on."""
    nll: Finite
    """Mean negative log-likelihood of the true class of these queries, in nats, with the temperature."""
    nll_uncalibrated: Finite
    """The same at temperature 1."""
    ece: Fraction
    """Expected calibration error of these queries with the temperature."""
    ece_uncalibrated: Fraction


class FittedBackground(FittedTemperature):
    """The level of the background component that takes queries of no labelled class, and its temperature."""

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
    """The head of an encoder alone that the temperatures hold for."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    """Key of `evaluation.encoders.heads.HEADS`."""
    tasks: Annotated[tuple[HeadSettings, ...], Strict(False)] = ()

    def settings(self, way: int, shot: float) -> dict[str, float | int | str]:
        """Return the settings for the nearest task, as `PosteriorCalibration.temperature`; empty: the defaults."""
        nearest = min(self.tasks, key=lambda task: _distance(task, way, shot), default=None)
        return {} if nearest is None else nearest.settings


Fit = TypeVar("Fit", bound=FittedTemperature)


def _distance(fit: FittedTemperature | HeadSettings, way: int, shot: float) -> float:
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
    """The settings of EM that the temperatures hold for."""
    temperatures: Annotated[tuple[FittedTemperature, ...], Strict(False)]
    backgrounds: Annotated[tuple[FittedBackground, ...], Strict(False)] = ()
    head: FittedHead | None = None
    """Of an encoder alone; None for a model that classifies."""

    def temperature(self, adapt: AdaptSettings, mode: str, way: int, shot: float) -> float:
        """Return the temperature of the fit nearest to a task; 1 for other settings of EM or another mode.

        The nearest fit is that with the smallest |log shot/S| + |log way/K|.

        Args:
            adapt: the settings of EM in use; those of iterations and samples may differ.
            mode: `transductive` or `inductive`.
            way: number of classes.
            shot: labelled images per class; their mean where they differ.
        """
        fit = self._nearest(self.temperatures, adapt, mode, way, shot)
        return 1.0 if fit is None else fit.temperature

    def background(self, adapt: AdaptSettings, mode: str, way: int, shot: float) -> FittedBackground | None:
        """Return the fit of the background nearest to a task, as `temperature` does; None if there is none."""
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
