"""Fits what makes the probabilities of a model mean something: their map, and the level of the background component.

Both are fitted on episodes of validation classes, or of augmented images where there are no labelled classes.

Notation: n images or queries, F features, K ways, S shots.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.encoders.head_model import HeadModel, fit_head
from metagmvae.evaluation.fewshot.baseline_tuning import SplitFeatures
from metagmvae.evaluation.fewshot.encoding import encode_split
from metagmvae.evaluation.fewshot.evaluate_episodes import posterior_batches
from metagmvae.evaluation.fewshot.metrics import Reliability
from metagmvae.evaluation.fewshot.predict import calibrated
from metagmvae.evaluation.uncertainty.augmented_classes import augmented_features
from metagmvae.evaluation.uncertainty.background import search_background
from metagmvae.evaluation.uncertainty.temperature import fit_map, negative_log_likelihood
from metagmvae.pipelines.grouped_labels import EpisodeLabels, GroupedLabels, class_ids
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.sampling.episodes import left_out_line
from metagmvae.pipelines.sampling.group_draw import group_sizes, most_queries
from metagmvae.pipelines.sampling.query_sets import QuerySampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.models.posterior_calibration import (
    UNCALIBRATED,
    CalibrationMap,
    FittedBackground,
    FittedMap,
    PosteriorCalibration,
)
from metagmvae.training.trainer.package import LoadedModel, require_learner

LOG = logging.getLogger(__name__)
MOST_OPEN_EPISODES = 30
"""Episodes of the search for a background level: it evaluates them many times."""


@dataclass(frozen=True)
class CalibrationPlan:
    """The episodes that are fitted on."""

    ways: tuple[int, ...] = (5,)
    shots: tuple[int, ...] = (1, 5)
    query: int = 15
    episodes: int = 100
    """Of each way, shot and mode."""
    seed: int = 1
    background: bool = True
    """Also fit the level of the background component, which takes several times as long."""


@dataclass(frozen=True)
class _Data:
    """What the episodes are drawn from."""

    fitted_on: Any
    split: str
    h_nF: Tensor
    labels: EpisodeLabels


def fit_calibration(
    loaded: LoadedModel,
    dataset: Dataset,
    plan: CalibrationPlan = CalibrationPlan(),
    *,
    device: torch.device,
    split: str | None = None,
    progress: ProgressBar = no_progress,
) -> PosteriorCalibration:
    """Fit the map of each way, shot and mode, and the level of the background component.

    The settings of the head of an encoder alone are chosen first, on the same classes.

    Args:
        loaded: a model that classifies, or an encoder alone with a head (`with_head`); it is moved to the device.
        dataset: its data.
        plan: what is fitted. Ways and shots that the split cannot provide are lowered to what it can.
        device: where the model runs.
        split: whose classes are used; None: the validation split of the model's settings. Without that split, or
            without two classes in it, the training images are augmented instead (`augmented_features`).
        progress: opens a progress bar.

    Raises:
        DataError: the model does not classify, the split does not exist, or holds features where images must be
            augmented.
    """
    model, adapt = require_learner(loaded, loaded.settings.name).to(device), loaded.settings.adapt
    data = _data(loaded, dataset, plan, split, device)
    tasks = _possible_tasks(data.labels, plan)
    head = None
    if isinstance(model, HeadModel):
        features = SplitFeatures(data.split, data.labels, {"scaled": data.h_nF})
        head = fit_head(model, features, tasks, plan.seed)
        model = HeadModel(model, head)
    maps, backgrounds = [], []
    may_be_open, classes = plan.background and model.has_background, len(group_sizes(data.labels))
    for way in dict.fromkeys(way for way, _, _ in tasks if may_be_open and way >= classes):
        LOG.warning(
            "no level for `classify --unknown` was fitted with way %d: the split has %d classes, and some must have no "
            "labelled images; lower --way, or give more classes",
            way,
            classes,
        )
    steps = list(product(tasks, model.modes))
    with progress("calibration") as on_progress:
        for done, ((way, shot, query), mode) in enumerate(steps, start=1):
            task: dict[str, Any] = {"way": way, "shot": shot, "query": query, "seed": plan.seed}
            maps.append(_fit(model, adapt, data, task, mode, plan.episodes))
            if may_be_open and (fit := _fit_background(model, adapt, data, task, mode, plan.episodes)):
                backgrounds.append(fit)
            if on_progress is not None:
                on_progress(done, len(steps))
    return PosteriorCalibration(
        fitted_on=data.fitted_on,
        split=data.split,
        data_fingerprint=dataset.fingerprint,
        adapt=adapt,
        temperatures=tuple(maps),
        backgrounds=tuple(backgrounds),
        head=head,
    )


def _data(
    loaded: LoadedModel, dataset: Dataset, plan: CalibrationPlan, split: str | None, device: torch.device
) -> _Data:
    name = loaded.settings.data.validation_split if split is None else split
    if split is not None:
        dataset.split(split)
    if name in dataset.splits:
        labels = dataset.episode_labels(name)
        if loaded.settings.validation.mix_groups:
            labels = class_ids(labels)
        if len(np.unique(class_ids(labels))) >= 2:
            return _Data("labelled classes", name, encode_split(loaded.model, dataset, name, device), labels)
    if split is not None:
        raise DataError(f"{dataset.uri}: the split {split!r} has fewer than two classes of two images; choose another")
    train = loaded.settings.data.train_split
    views = max(plan.shots) + plan.query
    drawn = augmented_features(loaded, dataset, train, views=views, seed=plan.seed, device=device)
    return _Data("augmented images", train, *drawn)


def _possible_tasks(labels: EpisodeLabels, plan: CalibrationPlan) -> list[tuple[int, int, int]]:
    """Ways, shots and queries of the plan, lowered to what all classes of the split allow.

    A line is logged about each number that is lowered, and about classes of one group, which are left out.
    """
    sizes = group_sizes(labels)
    if isinstance(labels, GroupedLabels) and (alone := set(np.unique(labels.classes).tolist()) - sizes.keys()):
        LOG.warning("%s", left_out_line("calibration", 1, 1, [labels.class_names[c] for c in sorted(alone)]))
    if len(sizes) < 2:
        raise DataError("calibration needs two classes with images of two groups; give more, or choose another split")
    if min(map(sum, sizes.values())) < 2:
        raise DataError("calibration needs two images of each class, and a class has one; leave small classes out")
    most_shots = min(sum(inside) - min(inside) for inside in sizes.values())
    shots = dict.fromkeys(min(shot, most_shots) for shot in plan.shots)
    room = {shot: min(most_queries(inside, shot) for inside in sizes.values()) for shot in shots}
    limits = [("way", way, len(sizes)) for way in plan.ways]
    limits += [("shot", shot, most_shots) for shot in plan.shots]
    limits += [("query", plan.query, room[shot]) for shot in shots]
    for name, wanted, most in dict.fromkeys(limits):
        if wanted > most:
            LOG.warning("calibration with %s %d instead of %d: the classes do not allow more", name, most, wanted)
    ways = dict.fromkeys(min(way, len(sizes)) for way in plan.ways)
    return [(way, shot, min(plan.query, room[shot])) for way in ways for shot in shots]


def _fit(
    model: MetaLearner, adapt: AdaptSettings, data: _Data, task: dict[str, Any], mode: PredictionMode, episodes: int
) -> FittedMap:
    sampler = QuerySampler(data.labels, **task)
    log_p_nK, labels = _collect(posterior_batches(model, adapt, data.h_nF, sampler, episodes, mode=mode))
    return FittedMap(mode=mode, way=task["way"], shot=task["shot"], **_map_fields(log_p_nK, labels))


def _fit_background(
    model: MetaLearner, adapt: AdaptSettings, data: _Data, task: dict[str, Any], mode: PredictionMode, episodes: int
) -> FittedBackground | None:
    """Fit on episodes with as many classes without labelled images as with; None if the split has too few classes."""
    open_classes = min(task["way"], len(group_sizes(data.labels)) - task["way"])
    if open_classes < 1:
        return None
    sampler = QuerySampler(data.labels, **task, open_classes=open_classes)
    episodes = min(episodes, MOST_OPEN_EPISODES)

    def classify(background: float) -> tuple[np.ndarray, np.ndarray]:
        batches = posterior_batches(model, adapt, data.h_nF, sampler, episodes, mode=mode, background=background)
        return _collect(batches)

    background, log_p_nK, labels = search_background(classify)
    return FittedBackground(
        mode=mode,
        way=task["way"],
        shot=task["shot"],
        background=background,
        open_classes=open_classes,
        accuracy=float((log_p_nK.argmax(axis=1) == labels).mean()),
        **_map_fields(log_p_nK, labels),
    )


def _collect(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (n, K) and classes (n,) of all queries."""
    pairs = [(log_p.flatten(0, 1).cpu().numpy(), truth.flatten().cpu().numpy()) for log_p, truth in batches]
    return np.concatenate([log_p for log_p, _ in pairs]), np.concatenate([truth for _, truth in pairs])


def _map_fields(log_p_nK: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The fitted map with its effect, as fields of `FittedMap`."""
    fitted = fit_map(log_p_nK, labels)
    return {
        **fitted.model_dump(),
        "queries": len(labels),
        "nll": negative_log_likelihood(log_p_nK, labels, fitted),
        "nll_uncalibrated": negative_log_likelihood(log_p_nK, labels, UNCALIBRATED),
        "ece": _calibration_error(log_p_nK, labels, fitted),
        "ece_uncalibrated": _calibration_error(log_p_nK, labels, UNCALIBRATED),
    }


def _calibration_error(log_p_nK: np.ndarray, labels: np.ndarray, by: CalibrationMap) -> float:
    reliability = Reliability()
    reliability.add(calibrated(torch.as_tensor(log_p_nK), by).numpy(), labels)
    return reliability.calibration_error
