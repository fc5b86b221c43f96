"""A scikit-learn classifier on top of a trained model: part of the public Python API."""

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
from metagmvae.evaluation.fewshot.predict import PredictionMode
from metagmvae.evaluation.fewshot.predict_queries import classify_latents, predict_queries
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.pipelines.records import DataError
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.package import LoadedModel, require_meta_gmvae

WITHOUT_MODEL = AdaptSettings(e_step="identity", final_covariance="identity", samples=1)
"""Settings of EM on features without a model: each feature vector is its own only latent."""


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Few-shot classifier: semi-supervised EM (Eq. 10 and 11 of Lee et al., ICLR 2021) on a few labelled images.

    >>> import metagmvae
    >>> data = metagmvae.Dataset.open("data/glyphs")
    >>> images, labels = data.images("test"), data.labels("test")
    >>> X = images[:].reshape(len(images), -1)               # one flattened image per row, values 0 to 255
    >>> support, query = slice(0, 40), slice(40, 45)
    >>> classifier = metagmvae.FewShotClassifier("runs/glyphs").fit(X[support], labels[support])
    >>> classifier.predict(X[query]).shape
    (5,)
    >>> classifier.predict_proba(X[query]).shape == (5, len(classifier.classes_))
    True

    Args:
        model: the result of `metagmvae.load_model`, or a reference that it takes: the path of a run folder, checkpoint
            or package, or `models:/name@alias`. X then holds images, one flattened image of values 0 to 255 per row.
            None: X holds features. They are centred and divided by one common standard deviation (few labels say
            little about that of each feature), and serve as latents without noise.
        mode: `inductive` classifies each query alone. `transductive` classifies all queries of a call together, as in
            the paper; the prediction of a query then depends on the others.
        iterations: as all arguments down to `temperature`, see `AdaptSettings`; None: the value of the model.
        samples: Monte Carlo samples N.
        e_step: covariance in the E-step.
        final_covariance: covariance in the final posterior.
        temperature: divides the log-likelihoods.
        random_state: seed of the Monte Carlo noise.

    Attributes:
        classes_: labels in sorted order.
        n_features_in_: values in a row of X.
    """

    def __init__(
        self,
        model: LoadedModel | str | Path | None = None,
        *,
        mode: PredictionMode = "inductive",
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
        """Store the support: X (n, values) and its labels y (n,). Shots may differ between classes.

        A model is loaded if `model` is a reference, and moved to a GPU if there is one.

        Raises:
            DataError: X does not hold images of the model's shape, `mode` is unknown, or the model is encoder-only or
                does not exist.
            ValueError: scikit-learn does not accept X or y.
        """
        if self.mode not in ("inductive", "transductive"):
            raise DataError(f"mode is {self.mode!r}; it must be inductive or transductive")
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        self.classes_, self._label_T = np.unique(y, return_inverse=True)
        self._network, settings = self._load()
        requested = {name: getattr(self, name) for name in AdaptSettings.model_fields}
        changes = {name: value for name, value in requested.items() if value is not None}
        self._adapt = AdaptSettings(**settings.model_dump() | changes)
        self._mean, self._std = X.mean(axis=0), float(X.std()) or 1.0
        self._support = self._features(X)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the class probabilities of the queries: X (n, values) -> (n, K), columns as in `classes_`."""
        check_is_fitted(self)
        queries = self._features(validate_data(self, X, reset=False))
        if self._network is None:
            support_T1D, queries_P1D = self._support[:, None], queries[:, None]
            transductive = self.mode == "transductive"
            probabilities = classify_latents(
                self._adapt, support_T1D, self._label_T, queries_P1D, fit_on_queries=transductive
            )
        else:
            probabilities = predict_queries(
                self._network,
                self._adapt,
                self._support,
                self._label_T,
                queries,
                mode=self.mode,
                seed=self.random_state,
            )
        return probabilities.double().cpu().numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each query: X (n, values) -> (n,)."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def _load(self) -> tuple[MetaGMVAE | None, AdaptSettings]:
        if self.model is None:
            return None, WITHOUT_MODEL
        loaded = resolve_model(self.model) if isinstance(self.model, str | Path) else self.model
        name = self.model if isinstance(self.model, str | Path) else loaded.settings.name
        return require_meta_gmvae(loaded, name).to(default_device()), loaded.settings.adapt

    def _features(self, X: np.ndarray) -> Tensor:
        if self._network is None:
            return torch.as_tensor((X - self._mean) / self._std, dtype=torch.float64)
        shape = self._network.image_shape
        if X.shape[1] != int(np.prod(shape)):
            raise DataError(f"X has {X.shape[1]} values in a row; an image of the model has shape {shape}")
        if X.min() < 0 or X.max() > 255:
            raise DataError(f"X has values from {X.min():g} to {X.max():g}; pixels must be from 0 to 255")
        images = np.round(X).astype(np.uint8).reshape(-1, *shape)
        return encode_images(self._network, images, next(self._network.parameters()).device)
