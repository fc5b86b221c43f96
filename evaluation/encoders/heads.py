"""Few-shot classifiers on the features of an encoder alone: its heads. They are baselines of `evaluation.fewshot`."""

from __future__ import annotations

from metagmvae.evaluation.fewshot.baseline_tuning import TunedBaseline
from metagmvae.evaluation.fewshot.baselines import BASELINES, em
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.meta_learner import PredictionMode

DEFAULT_HEAD = "nearest-mean"


_NAMES = {
    "nearest-mean": "nearest class mean",
    "logistic-regression": "logistic regression",
    "soft-k-means": "soft k-means",
    "optimal-transport": "optimal transport",
    "laplacian": "Laplacian",
}
_KINDS = ("scaled",)
HEADS: dict[str, TunedBaseline] = {
    **{head: TunedBaseline(name, BASELINES[name], _KINDS, BASELINES[name].grid) for head, name in _NAMES.items()},
    "em": TunedBaseline("EM on features", em, _KINDS, em.grid),
}
"""Heads by the value of `--head`. Their settings are chosen on validation classes, by the rule of the baselines."""
MODES: dict[str, PredictionMode] = {
    **{head: BASELINES[name].mode for head, name in _NAMES.items()},
    "em": em.mode,
}
"""Whether a head classifies each query alone."""


def check_head(head: str, mode: PredictionMode) -> str:
    """Return the head if it can answer in this mode; an inductive head gives the same answers in both.

    Raises:
        DataError: it classifies the queries together.
    """
    if mode == "inductive" and MODES[head] != mode:
        raise DataError(
            f"--mode inductive: the head {head} classifies queries together; give --head nearest-mean or "
            "logistic-regression"
        )
    return head
