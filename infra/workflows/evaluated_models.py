"""The models that `metagmvae evaluate` measures: one, or the best one for each number of shots of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metagmvae.configs.load import SettingsError, settings_from_json, to_json
from metagmvae.evaluation.fewshot.encoder_package import with_average
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.meta_learner import MetaLearner
from metagmvae.training.trainer.package import LoadedModel


def models_by_shot(
    ref: str, shots: Sequence[int], overrides: Sequence[str] = (), **encoder: Any
) -> list[tuple[LoadedModel, list[int]]]:
    """Load the model for each number of shots; equal models once, with all their shots.

    Args:
        ref: as in `resolve_model`.
        shots: labelled images per class.
        overrides: `key=value` of settings of the adaptation, and of `model.average`.
        encoder: as in `resolve_model`.

    Raises:
        DataError: a number of shots occurs twice; or as `resolve_model`.
        SettingsError: a changed setting is of another section, or its value is wrong.
    """
    if len(set(shots)) < len(shots):
        raise DataError(f"--shot {' '.join(map(str, shots))}: a number occurs twice; give each once")
    if not Path(ref).exists():  # a registered version or an encoder: one model for all
        return [(_load(ref, shots[0], overrides, encoder), list(shots))]
    models: list[tuple[LoadedModel, list[int]]] = []
    for shot in shots:
        loaded = _load(ref, shot, overrides, encoder)
        same = [group for known, group in models if known.info == loaded.info]
        if same:
            same[0].append(shot)
        else:
            models.append((loaded, [shot]))
    return models


def _load(ref: str, shot: int, overrides: Sequence[str], encoder: dict[str, Any]) -> LoadedModel:
    loaded = resolve_model(ref, shot=shot, **encoder)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key != "model.average" and not key.startswith("adapt."):
            raise SettingsError(
                f"--set {override}: a trained model only takes other settings of adapt.…, and model.average"
            )
        if key != "model.average" and not isinstance(loaded.model, MetaLearner):
            raise SettingsError(f"--set {override}: {ref} is an encoder alone; choose its --head")
    if not overrides:
        return loaded
    settings = settings_from_json(to_json(loaded.settings), overrides)
    if settings.model.average != loaded.settings.model.average:
        loaded = with_average(loaded, settings.model.average)
    return replace(loaded, settings=settings)
