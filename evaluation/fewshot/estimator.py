"""A scikit-learn style few-shot classifier over a trained model.

from metagmvae.evaluation.fewshot.estimator import FewShotClassifier
classifier = FewShotClassifier("runs/omniglot-cpu").fit(support, labels)
classifier.predict_proba(queries)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.predict import Mode, classify_latents, encode_images, predict_queries
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.package import LoadedModel, load_model, meta_gmvae

PLAIN = AdaptSettings(e_step="identity", final_covariance="identity", samples=1)
"""Adaptation where there is no model: every point is its own latent, without noise."""


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Semi-supervised EM (Eq. 10 and 11) over a few labelled images and the queries.

    Args:
        model: a `LoadedModel`, or the path of a run folder, a checkpoint or a package. X are images then, one
            flattened image of values 0 to 255 a row. None: X are features, which are centred, brought to one
            scale for all (few labels say little about each feature's own) and taken for latents themselves.
        mode: `inductive` judges each query alone; `transductive` judges those of a call together, as the
            paper does: what is said of one depends on the others.
        iterations, samples, e_step, final_covariance, temperature: see `AdaptSettings`; None: those of the model.
        random_state: seed of the Monte Carlo noise.

    Attributes:
        classes_: labels in sorted order; columns of `predict_proba`.
        n_features_in_: numbers in a row of X.
    """

    def __init__(
        self,
        model: LoadedModel | str | Path | None = None,
        *,
        mode: Mode = "inductive",
        iterations: int | None = None,
        samples: int | None = None,
        e_step: Literal["diagonal", "identity"] | None = None,
        final_covariance: Literal["diagonal", "identity"] | None = None,
        temperature: float | None = None,
        random_state: int = 0,
    ) -> None:
        self.model = model
        self.mode = mode
        self.iterations = iterations
        self.samples = samples
        self.e_step = e_step
        self.final_covariance = final_covariance
        self.temperature = temperature
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> FewShotClassifier:
        """Keep the support: X (n, features) and its labels (n,); shots may differ between classes.

        Raises:
            DataError: X does not hold images of the model's shape, or `mode` is unknown.
            ValueError: X or y are not what scikit-learn allows.
        """
        if self.mode not in ("inductive", "transductive"):
            raise DataError(f"mode is {self.mode!r}; give inductive or transductive")
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        self.classes_, self._label_T = np.unique(y, return_inverse=True)
        self._loaded = load_model(self.model) if isinstance(self.model, str | Path) else self.model
        given = {name: getattr(self, name) for name in AdaptSettings.model_fields}
        own = self._loaded.settings.adapt if self._loaded is not None else PLAIN
        self._adapt = AdaptSettings(**own.model_dump() | {k: v for k, v in given.items() if v is not None})
        self._centre, self._spread = X.mean(axis=0), float(X.std()) or 1.0
        self._support = self._features(X)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes for every query: X (n, features) -> (n, K), in the order of `classes_`."""
        check_is_fitted(self)
        queries = self._features(validate_data(self, X, reset=False))
        transductive = self.mode == "transductive"
        if self._loaded is None:
            support_T1D, queries_P1D = self._support[:, None], queries[:, None]
            answer = classify_latents(self._adapt, support_T1D, self._label_T, queries_P1D, fit_on_queries=transductive)
        else:
            loaded, seed = meta_gmvae(self._loaded, self.model), self.random_state
            answer = predict_queries(
                loaded, self._adapt, self._support, self._label_T, queries, mode=self.mode, seed=seed
            )
        return answer.double().cpu().numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of every query: X (n, features) -> (n,)."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def _features(self, X: np.ndarray) -> Tensor:
        if self._loaded is None:
            return torch.as_tensor((X - self._centre) / self._spread, dtype=torch.float64)
        shape = self._loaded.image_shape
        if X.shape[1] != int(np.prod(shape)):
            raise DataError(f"X has {X.shape[1]} numbers in a row; an image of the model has {shape}")
        if X.min() < 0 or X.max() > 255:
            raise DataError(f"X runs from {X.min():g} to {X.max():g}; pixels run from 0 to 255")
        images = np.round(X).astype(np.uint8).reshape(-1, *shape)
        return encode_images(self._loaded.model, images, next(self._loaded.model.parameters()).device)
