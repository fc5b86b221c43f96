"""An encoder alone with a head as a model that classifies, calibrates and is served like every other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.encoders.head_predictions import head_logits
from metagmvae.evaluation.encoders.heads import DEFAULT_HEAD, HEADS, MODES, check_head
from metagmvae.evaluation.fewshot.baseline_tuning import SplitFeatures, choose_settings
from metagmvae.evaluation.fewshot.evaluate_tasks import TASK_DEFAULTS
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.models.posterior_calibration import FittedHead, HeadSettings
from metagmvae.training.objectives.mixture import with_background
from metagmvae.training.trainer.package import LoadedModel

HEAD = "head"
"""Key of `LoadedModel.info`: the head of an encoder that has no calibration."""
WITHOUT_BACKGROUND = "optimal-transport"
"""The head that assigns every query to a labelled class, by its equal marginals."""


class HeadModel(MetaLearner):
    """The features of an encoder, classified by a head. It shares the encoder, and has no weights of its own."""

    fits_support = True

    def __init__(self, model: EncoderModel, head: FittedHead) -> None:
        super().__init__(model.encoder, model.image_shape)
        self.head = head
        self.modes = (MODES[head.name],)
        self.has_background = head.name != WITHOUT_BACKGROUND

    def log_posteriors(
        self,
        adapt: AdaptSettings,
        support_ET: Tensor,
        label_T: Tensor,
        query_EP: Tensor,
        *,
        mode: PredictionMode,
        seed_by_episode: Sequence[int],
        background: float | None = None,
    ) -> Tensor:
        """Return the log-probabilities of the head, as `MetaLearner.log_posteriors`; nothing in it is random.

        Raises:
            DataError: the head classifies the queries together and `mode` is inductive; or as `head_logits`.
        """
        check_head(self.head.name, mode)
        labels = label_T.cpu().numpy()
        way = int(labels.max()) + 1
        settings = self.head.settings(way, len(labels) / way)
        logits = [
            head_logits(self.head.name, settings, support, labels, query, background)
            for support, query in zip(support_ET, query_EP, strict=True)
        ]
        log_p_EPK = torch.log_softmax(with_background(torch.stack(logits), background), dim=2)
        if torch.isnan(log_p_EPK).any():  # the argmax of NaN is the first class, which would pass for a prediction
            raise DataError("the encoder gives features that are not finite; use other weights")
        return log_p_EPK

    def episodes_per_batch(self, adapt: AdaptSettings, points: int, device: torch.device) -> int:
        """Return 32; they are classified one after the other."""
        return 32


def with_head(loaded: LoadedModel, head: str | None = None, name: str | None = None) -> LoadedModel:
    """Return an encoder alone as a model that classifies; any other model as it is.

    Args:
        loaded: the model.
        head: key of `HEADS`; None: the one that the encoder was calibrated with, or else `nearest-mean`. With another
            head than that, the calibration is left out.
        name: of the model in error messages; None: its name in the settings.

    Raises:
        DataError: `head` is given for a model that is no encoder alone, or there is no such head.
    """
    if isinstance(loaded.model, MetaLearner):
        if head is not None:
            raise DataError(
                f"head {head}: is for an encoder alone, and {name or loaded.settings.name} is not one; omit it"
            )
        return loaded
    fitted = None if loaded.calibration is None else loaded.calibration.head
    head = head or (fitted.name if fitted is not None else loaded.info.get(HEAD, DEFAULT_HEAD))
    if head not in HEADS:
        raise DataError(f"head {head!r}: there is none of this name; give one of {', '.join(HEADS)}")
    if fitted is None or fitted.name != head:
        return replace(loaded, model=HeadModel(loaded.model, FittedHead(name=head)), calibration=None)
    return replace(loaded, model=HeadModel(loaded.model, fitted))


def with_named_head(loaded: LoadedModel, head: str | None, name: str) -> LoadedModel:
    """Return an encoder alone whose package names its head, so that `with_head` finds it; see there."""
    if head is None:
        return loaded
    named = with_head(loaded, head, name)
    return replace(loaded, info=loaded.info | {HEAD: head}, calibration=named.calibration)


def answer_mode(model: MetaLearner, mode: PredictionMode) -> PredictionMode:
    """Return the mode that a model answers in: a head that classifies each query alone does so in both.

    Raises:
        DataError: the head classifies the queries together, and `mode` is inductive.
    """
    return MODES[check_head(model.head.name, mode)] if isinstance(model, HeadModel) else mode


def fit_head(
    model: HeadModel, validation: SplitFeatures, tasks: Sequence[tuple[int, int, int]], seed: int
) -> FittedHead:
    """Choose the settings of the head on validation episodes, by the rule of `evaluate_baselines`.

    Args:
        model: with the head.
        validation: features of the validation classes.
        tasks: way, shot and queries per class of each task.
        seed: of the episodes, which are others than those that `evaluate` draws with it.
    """
    head = model.head.name
    chosen = []
    for way, shot, query in tasks:
        task = TASK_DEFAULTS | {"way": way, "shot": shot, "query": query, "seed": seed}
        settings = choose_settings(HEADS[head], validation, task)[1] if HEADS[head].grid else {}
        chosen.append(HeadSettings(way=way, shot=shot, settings=settings))
    return FittedHead(name=head, tasks=tuple(chosen))
