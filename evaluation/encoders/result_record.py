"""What a result file records beside the accuracy: dataset, settings, training and machine that made it."""

from __future__ import annotations

from typing import Any

from metagmvae.configs.load import fingerprint
from metagmvae.evaluation.encoders.evaluate_encoders import head_records
from metagmvae.evaluation.fewshot.baseline_tuning import baselines_summary
from metagmvae.evaluation.fewshot.encoder_package import encoder_origin
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.provenance import dataset_origin, provenance
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.package import LoadedModel

SECTIONS = {"method", "model", "adapt", "pretrain", "train"}
"""Settings that are recorded: those that affect accuracy."""


def result_origin(loaded: LoadedModel, dataset: Dataset) -> dict[str, Any]:
    """Return dataset, settings, fingerprints, versions and training of the encoder that a result was made with."""
    selected_by = loaded.info.get("selected_by")
    return {
        "dataset": dataset_origin(dataset.manifest, dataset.fingerprint),
        "settings": loaded.settings.model_dump(mode="json", include=SECTIONS),
        "settings_fingerprint": fingerprint(loaded.settings),
        "trained": loaded.info,
        "checkpoint": {"chosen_by": selected_by or "the last step", "validation_labels": bool(selected_by)},
        "encoder": encoder_origin(loaded, dataset),
        "source_fingerprint": dataset.manifest["source_fingerprint"],
        "environment": provenance(),
    }


def result_record(
    loaded: LoadedModel, dataset: Dataset, split: str, model: str, result: EpisodeResults
) -> dict[str, Any]:
    """Return the content of the result file of one task, as `metagmvae evaluate --record` writes it.

    `model` is the reference of the model.
    """
    about = {"split": split, "data": dataset.uri, "data_fingerprint": dataset.fingerprint, "model": model}
    tables = head_records(loaded, [result]) | baselines_summary([result])
    return result.summary() | about | tables | result_origin(loaded, dataset)
