"""Few-shot accuracy of a loaded model on a data set: part of the public Python API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from metagmvae.evaluation.fewshot.baselines import BASELINES, UNSCALED_BASELINES
from metagmvae.evaluation.fewshot.encoding import encode_split, scale_features
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults, evaluate_features
from metagmvae.evaluation.fewshot.predict import PredictionMode
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.package import LoadedModel, require_meta_gmvae

TASK_DEFAULTS = {"query": 15, "episodes": 1000, "seed": 0}


def evaluate_tasks(
    loaded: LoadedModel,
    dataset: Dataset,
    tasks: Sequence[Mapping[str, int]] = ({"way": 5, "shot": 1},),
    *,
    split: str = "test",
    mode: PredictionMode = "transductive",
    baselines: bool = False,
    name: str | None = None,
    progress: ProgressBar = no_progress,
) -> list[EpisodeResults]:
    """Evaluate a model on seeded few-shot episodes of a data set; the result of each task, in order.

    The images of the split are encoded once for all tasks, on a GPU if there is one. Equal tasks are equal episodes
    for every model, so that results can be compared in pairs (`evaluation.fewshot.paired`).

    >>> import metagmvae
    >>> model = metagmvae.load_model("runs/glyphs")
    >>> data = metagmvae.Dataset.open("data/glyphs")
    >>> tasks = [{"way": 5, "shot": 1, "episodes": 20}, {"way": 3, "shot": 5, "episodes": 20}]
    >>> for result in metagmvae.evaluate_tasks(model, data, tasks, baselines=True):
    ...     print(f"{result.way}-way {result.shot}-shot: {100 * result.mean:.2f} ± {100 * result.ci95:.2f} %")
    ...     print(f"nearest class mean: {100 * result.baselines['nearest class mean'].mean:.2f} %")
    5-way 1-shot: ... %
    nearest class mean: ... %
    3-way 5-shot: ... %
    nearest class mean: ... %

    Args:
        loaded: a Meta-GMVAE, for example from `metagmvae.load_model`; it is moved to the device.
        dataset: images, or features made by the encoder of the model.
        tasks: mappings with `way`, `shot` and, if wanted, `query` (queries per class, 15), `episodes` (1,000) and
            `seed` (0).
        split: whose classes the episodes are drawn from.
        mode: `transductive` or `inductive`, as in `predict_episodes`.
        baselines: also evaluate the baselines on the same features and episodes, each in its own mode; they are in
            `baselines` of each result.
        name: of the model in error messages; None: its name in the settings.
        progress: opens a progress bar for each task.

    Raises:
        DataError: the model is encoder-only, another encoder made the features, the split has too few classes or
            images for a task, or the features are not finite.
    """
    name = loaded.settings.name if name is None else name
    device = default_device()
    model, labels = require_meta_gmvae(loaded, name).to(device), dataset.labels(split)
    full_tasks = [TASK_DEFAULTS | dict(task) for task in tasks]
    for task in full_tasks:  # before the images are encoded, which takes long
        EpisodeSampler(labels, **{key: task[key] for key in ("way", "shot", "query", "seed")})
    raw_nF = encode_split(EncoderModel(model.encoder, model.image_shape), dataset, split, device)
    h_nF = scale_features(model, raw_nF)
    if not torch.isfinite(h_nF).all():
        # The argmax of NaN is the first class, which would pass for a prediction.
        raise DataError(f"{name}: its encoder gives features that are not finite; use another checkpoint")
    results = []
    for task in full_tasks:
        with progress(f"{task['way']}-way {task['shot']}-shot episodes") as on_progress:
            result = evaluate_features(
                model, loaded.settings.adapt, h_nF, labels, mode=mode, on_progress=on_progress, **task
            )
        results.append(
            replace(result, baselines=_evaluate_baselines(model, raw_nF, h_nF, labels, task)) if baselines else result
        )
    return results


def _evaluate_baselines(
    model: MetaGMVAE, raw_nF: Tensor, h_nF: Tensor, labels: np.ndarray, task: Mapping[str, int]
) -> dict[str, EpisodeResults]:
    """Evaluate all baselines on scaled features, and some of them on raw features if the model scales its features."""
    runs: list[tuple[str, Callable[..., EpisodeResults], Tensor]] = [(*item, h_nF) for item in BASELINES.items()]
    if not isinstance(model.scale, torch.nn.Identity):
        runs += [(f"{name}, features unscaled", BASELINES[name], raw_nF) for name in UNSCALED_BASELINES]
    return {name: evaluate(x_nF, labels, **task) for name, evaluate, x_nF in runs}
