"""A model by any reference, judged on seeded episodes of a data set: the images of the split encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from metagmvae.pipelines.records import ProgressBar, no_progress

if TYPE_CHECKING:
    from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
    from metagmvae.pipelines.shards.dataset import Dataset
    from metagmvae.training.trainer.package import LoadedModel


def evaluate_tasks(
    loaded: LoadedModel,
    name: str,
    dataset: Dataset,
    split: str,
    tasks: Sequence[dict[str, Any]],
    *,
    mode: str = "transductive",
    baselines: bool = False,
    progress: ProgressBar = no_progress,
) -> Iterator[tuple[EpisodeResults, list[dict[str, Any]]]]:
    """Yield the result of each task, and rows of what stands beside it on the same features and episodes.

    Args:
        loaded: a Meta-GMVAE.
        name: what to call it in errors.
        dataset: images, or features of the model's encoder.
        split: whose classes.
        tasks: way, shot, query, episodes and seed of each. Equal tasks are equal episodes for every model.
        mode: transductive or inductive.
        baselines: also judge the baselines, in their own modes.
        progress: opens a progress bar for each task.

    Raises:
        DataError: the model is an encoder alone, the features are of another encoder, or the split has too few classes
            or images for a task, or features are not finite.
    """
    import torch

    from metagmvae.evaluation.fewshot.baselines import BASELINES, UNSCALED
    from metagmvae.evaluation.fewshot.encoding import encode_split, scale_features
    from metagmvae.evaluation.fewshot.evaluate_episodes import evaluate_features
    from metagmvae.pipelines.records import DataError
    from metagmvae.pipelines.sampling.episodes import EpisodeSampler
    from metagmvae.training.models.encoders import EncoderModel
    from metagmvae.training.trainer.package import meta_gmvae

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, labels = meta_gmvae(loaded, name).to(device), dataset.labels(split)
    for task in tasks:  # refused before every image is encoded
        EpisodeSampler(labels, **{key: task[key] for key in ("way", "shot", "query", "seed")})
    raw_nF = encode_split(EncoderModel(model.encoder, model.image_shape), dataset, split, device)
    h_nF = scale_features(model, raw_nF)
    if not torch.isfinite(h_nF).all():
        # NaN would pass for an answer: the largest of them is the first class.
        raise DataError(f"{name}: its encoder gives features that are not finite; use another checkpoint")
    compared = [(label, judge, h_nF) for label, judge in BASELINES.items()]
    if not isinstance(model.scale, torch.nn.Identity):
        compared += [(f"{label}, features unscaled", BASELINES[label], raw_nF) for label in UNSCALED]
    for task in tasks:
        with progress(f"{task['way']}-way {task['shot']}-shot episodes") as on_progress:
            options: dict[str, Any] = {"mode": mode, "on_progress": on_progress}
            result = evaluate_features(model, loaded.settings.adapt, h_nF, labels, **task, **options)
        beside = compared if baselines else ()
        yield result, [{"baseline": label, **judge(x_nF, labels, **task).summary()} for label, judge, x_nF in beside]
