"""Classification with the head of an encoder alone: which options suit it, and what the answer records."""

from __future__ import annotations

from typing import Any

from metagmvae.evaluation.fewshot.evaluate_episodes import Tuning
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.meta_learner import MetaLearner
from metagmvae.training.trainer.package import LoadedModel


def check_head_options(loaded: LoadedModel, head: str | None, has_data: bool, unknown: bool) -> None:
    """Check the options that are only for an encoder alone, or only for a Meta-GMVAE.

    Raises:
        DataError: the model is of the other kind.
    """
    name, is_encoder = loaded.settings.name, not isinstance(loaded.model, MetaLearner)
    if head is not None and not is_encoder:
        raise DataError(f"--head {head}: is for an encoder alone, and {name} is a Meta-GMVAE; omit it")
    if has_data and not is_encoder:
        raise DataError(f"--data: chooses the settings of the head of an encoder, and {name} is a Meta-GMVAE; omit it")
    if unknown and is_encoder:
        raise DataError(f"--unknown: {name} is an encoder alone, whose heads have no such class; use --threshold")


def head_record(loaded: LoadedModel, head: tuple[str, Tuning] | None) -> dict[str, Any]:
    """Return `head` of the answer: encoder, head, settings and how they were chosen; empty for a Meta-GMVAE."""
    if head is None:
        return {}
    name, tuning = head
    chosen = {"chosen_on": dict(tuning.protocol)} if tuning.trials else {"note": tuning.note} if tuning.note else {}
    encoder = loaded.settings.model.encoder
    settings = {"settings": dict(tuning.settings)} if tuning.settings else {}
    return {"head": {"encoder": encoder, "name": name, **settings, **chosen}}
