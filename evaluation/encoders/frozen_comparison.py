"""Whether meta-training beats the frozen encoder alone: paired differences on the same episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metagmvae.evaluation.encoders.evaluate_encoders import evaluate_heads, evaluate_model
from metagmvae.evaluation.encoders.heads import DEFAULT_HEAD
from metagmvae.evaluation.fewshot.encoder_package import load_dataset_encoder
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.paired import paired_difference
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.meta_learner import PredictionMode
from metagmvae.training.trainer.package import LoadedModel


def compare_with_frozen(
    trained: LoadedModel,
    dataset: Dataset,
    tasks: Sequence[Mapping[str, Any]],
    *,
    frozen: LoadedModel | None = None,
    heads: Sequence[str] = (DEFAULT_HEAD,),
    split: str = "test",
    mode: PredictionMode = "transductive",
    progress: ProgressBar = no_progress,
) -> list[dict[str, Any]]:
    """Return one row for each task and head: the trained model minus the frozen encoder with this head.

    Args:
        trained: a Meta-GMVAE.
        dataset, split, mode, progress: as in `evaluate_model`.
        tasks: as in `evaluate_tasks`, with at least 2 episodes.
        frozen: an encoder alone, for example by `named_encoder`; None: the one that made the features of the dataset.
        heads: keys of `evaluation.encoders.heads.HEADS`; settings are chosen on the validation classes.

    Returns:
        `encoder`, `head`, `head_mode`, `head_settings`, and the keys of `PairedDifference.summary`: `challenger` is the
        accuracy of the trained model, `champion` that of the encoder; `verdict` is about the trained model.

    Raises:
        DataError: `frozen` is None and the dataset holds images; or as in `evaluate_model`.
    """
    if frozen is None:
        if dataset.kind != "features":
            raise DataError(f"{dataset.uri}: holds images; name the encoder to compare with")
        frozen = load_dataset_encoder(dataset)
    ours = evaluate_model(trained, dataset, tasks, split=split, mode=mode, progress=progress)
    return results_minus_frozen(ours, frozen, dataset, heads=heads, split=split, progress=progress)


def results_minus_frozen(
    ours: Sequence[EpisodeResults],
    frozen: LoadedModel,
    dataset: Dataset,
    *,
    heads: Sequence[str] = (DEFAULT_HEAD,),
    split: str = "test",
    progress: ProgressBar = no_progress,
) -> list[dict[str, Any]]:
    """Return the rows of `compare_with_frozen` for a trained model whose results on balanced episodes are known.

    Other arguments and errors are those of `compare_with_frozen`.
    """
    keys = ("way", "shot", "query", "seed")
    tasks = [
        {key: getattr(our, key) for key in keys}
        | {"episodes": len(our.accuracies), "mix_groups": our.groups == "mixed"}
        for our in ours
    ]
    rows = []
    for head, results in evaluate_heads(frozen, dataset, tasks, heads, split=split, progress=progress).items():
        for our, their in zip(ours, results, strict=True):
            names = {"encoder": frozen.settings.model.encoder, "head": head, "head_mode": their.mode}
            settings = dict(their.tuning.settings) if their.tuning is not None else {}
            difference = paired_difference(our, their, any_mode=True).summary()
            rows.append(names | {"head_settings": settings} | difference)
    return rows
