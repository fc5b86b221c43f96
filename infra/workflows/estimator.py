"""A scikit-learn classifier on top of a trained model: part of the public Python API."""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.encoders.head_model import HeadModel, answer_mode, with_head
from metagmvae.evaluation.fewshot import pixel_arrays
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing
from metagmvae.pipelines.vectors import describe_shape
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encode_images import encode_images, vectors_as_images
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.models.posterior_calibration import UNCALIBRATED, CalibrationMap, PosteriorCalibration
from metagmvae.training.objectives.class_posterior import classify_latents
from metagmvae.training.objectives.episode_features import adapt_features
from metagmvae.training.trainer.package import LoadedModel, require_learner

WITHOUT_MODEL = AdaptSettings(e_step="identity", final_covariance="identity", samples=1)
"""Settings of EM on features without a model: each feature vector is its own only latent."""

MISSING = ("None", "nan", "<NA>", "NaT")
"""How missing labels of Python, NumPy and pandas are shown."""


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Few-shot classifier: semi-supervised EM (Eq. 10 and 11 of Lee et al., ICLR 2021) on a few labelled images.

    >>> import metagmvae
    >>> data = metagmvae.Dataset.open("data/glyphs")
    >>> images, labels = data.images("test"), data.labels("test")
    >>> X = images[:]                                        # uint8 (n, C, H, W), values 0 to 255
    >>> support, query = slice(0, 40), slice(40, 45)
    >>> classifier = metagmvae.FewShotClassifier("runs/glyphs").fit(X[support], labels[support])
    >>> classifier.predict(X[query]).shape
    (5,)
    >>> classifier.predict_proba(X[query]).shape == (5, len(classifier.classes_))
    True

    Args:
        model: the result of `metagmvae.load_model`, or a reference that it takes: the path of a run folder, checkpoint
            or package, or `models:/name@alias`. X then holds images: an array (n, H, W) for one channel,
            (n, C, H, W), (n, H, W, C), or rows (n, C * H * W); or a list of image files (paths, or their content as
            bytes) and images of Pillow, which are preprocessed as the model records it (crop, size, inversion), as by
            `metagmvae classify`. For a model of vectors (`metagmvae prepare vectors`) X holds vectors, (n, values).
            None: X holds features, (n, values). They are centred and divided by one common standard deviation (few
            labels say little about that of each feature), and serve as latents without noise.
        mode: `inductive` classifies each query alone. `transductive` classifies all queries of a call together, as in
            the paper; the prediction of a query then depends on the others.
        iterations: as all arguments down to `whitening`, see `AdaptSettings`; None: the value of the model.
        samples: Monte Carlo samples N.
        inductive: space of the classes in inductive mode, `latents` or `features` of the encoder.
        e_step: covariance in the E-step.
        final_covariance: covariance in the final posterior.
        temperature: divides the log-likelihoods in EM.
        proportions: class weights, `equal` or `estimated` from the queries of a call.
        proportions_prior: strength of the prior of estimated proportions.
        diffusion: how far the features of a call first move towards those that are like them; transductive only.
        whitening: by the covariance within classes of the labelled features; helps with several labels a class.
        random_state: seed of the Monte Carlo noise.
        pixel_range: the values of an array that mean black and white; they are scaled to 256 levels. None: 0 to 255,
            whole numbers; or, with a `PixelWarning`, 0 to 1 if X in `fit` holds booleans or only floats from 0 to 1.
            Any other values are refused. The scale of `fit` holds for all later calls.
        preprocessed: True: arrays have the shape and the polarity of the training data, like those of
            `Dataset.images`. False: arrays hold images as they were before `metagmvae prepare`, of any size; what it
            did to the training images (see `LoadedModel.preprocessing`) is done to them.
        head: classifier on the features of an encoder alone, as `--head` of `metagmvae evaluate`; None: the one that
            the encoder was calibrated with (`metagmvae calibrate --head`), or `nearest-mean`. An encoder alone takes
            none of the arguments from `iterations` to `whitening`.

    Attributes:
        classes_: labels in sorted order.
        n_features_in_: values in a row of X.
        pixel_range_: the scale of the array in `fit`, 0 to 255 for files; only with a model of images.
    """

    def __init__(
        self,
        model: LoadedModel | str | os.PathLike[str] | None = None,
        *,
        mode: PredictionMode = "inductive",
        iterations: int | None = None,
        samples: int | None = None,
        inductive: Literal["latents", "features"] | None = None,
        e_step: Literal["diagonal", "identity"] | None = None,
        final_covariance: Literal["diagonal", "identity"] | None = None,
        temperature: float | None = None,
        proportions: Literal["equal", "estimated", "balanced"] | None = None,
        proportions_prior: float | None = None,
        diffusion: float | None = None,
        whitening: float | None = None,
        random_state: int = 0,
        pixel_range: tuple[float, float] | None = None,
        preprocessed: bool = True,
        head: str | None = None,
    ) -> None:
        self.model = model
        self.mode = mode
        self.iterations = iterations
        self.samples = samples
        self.inductive = inductive
        self.e_step = e_step
        self.final_covariance = final_covariance
        self.temperature = temperature
        self.proportions = proportions
        self.proportions_prior = proportions_prior
        self.diffusion = diffusion
        self.whitening = whitening
        self.random_state = random_state
        self.pixel_range = pixel_range
        self.preprocessed = preprocessed
        self.head = head

    def fit(self, X: Any, y: Any) -> FewShotClassifier:
        """Store the support: images or features X, and their labels y (n,). Shots may differ between classes.

        A model is loaded if `model` is a reference, and moved to a GPU if there is one.

        Raises:
            DataError: X does not hold images of the model's shape or of a known scale, or a file that cannot be read;
                `mode` is unknown or not that of the head; or the model does not exist, or does not record the
                preprocessing that is asked for.
            ValueError: scikit-learn does not accept X or y, for example because of NaN in X.
        """
        self._check_mode()
        for number, label in enumerate(y if hasattr(y, "__iter__") else ()):
            if not isinstance(label, str) and str(label) in MISSING:  # NumPy makes words of some of them
                raise DataError(f"y[{number}] is {label}, not a label; leave such images out, or give them to predict")
        self._network, settings = self._load()
        decoded = self._decode(X)
        rows, shape = self._rows(X if decoded is None else decoded)
        X, y = validate_data(self, rows, y)
        check_classification_targets(y)
        self.classes_, self._label_T = np.unique(y, return_inverse=True)
        requested = {name: getattr(self, name) for name in AdaptSettings.model_fields}
        changes = {name: value for name, value in requested.items() if value is not None}
        if changes and isinstance(self._network, HeadModel):
            raise DataError(f"{', '.join(changes)}: not for an encoder alone; choose its head")
        self._adapt = AdaptSettings(**settings.model_dump() | changes)
        self._mean, self._std = X.mean(axis=0), float(X.std()) or 1.0
        if self._network is not None:
            answer_mode(self._network, self.mode)
            self._check_row(X, shape)
            if self._network.takes_vectors:
                self._check_no_images()
            elif decoded is None:
                self._fit_pixel_range(X)
            else:
                self.pixel_range_, self._brightest = pixel_arrays.EIGHT_BIT, float(X.max())
        self._support = self._features(X, shape, decoded is not None)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the class probabilities of the queries X, images or features as in `fit`: (n, K) as in `classes_`.

        Inductive: the probabilities of a query do not depend on the other queries. In both modes they do not depend on
        the order of the support and the names of the classes. If the model is calibrated, so are they, unless
        arguments other than `iterations` and `samples` change its settings of EM.

        Raises:
            DataError: the images have another scale than those of `fit`, a file cannot be read, or `mode` is unknown.
        """
        check_is_fitted(self)
        self._check_mode()
        decoded = self._decode(X)
        rows, shape = self._rows(X if decoded is None else decoded)
        X = validate_data(self, rows, reset=False)
        if self._network is not None:
            self._check_row(X, shape)
            if decoded is None and not self._network.takes_vectors:
                pixel_arrays.check_pixel_range(X, self.pixel_range_, self._brightest)
                if self.pixel_range is None and self.pixel_range_ == pixel_arrays.EIGHT_BIT:
                    pixel_arrays.check_whole(X)
        queries = self._features(X, shape, decoded is not None)
        if self._network is None:
            label_T, transductive = torch.as_tensor(self._label_T), self.mode == "transductive"
            features = self._support[None], label_T, queries[None]
            support_1TD, queries_1PD = adapt_features(self._adapt, *features, transductive=transductive)
            sets = support_1TD[:, :, None], label_T, queries_1PD[:, :, None]
            log_p_1PK = classify_latents(self._adapt, *sets, fit_on_queries=transductive)
            probabilities = log_p_1PK[0].exp()
        else:
            probabilities = predict_queries(
                self._network,
                self._adapt,
                self._support,
                self._label_T,
                queries,
                mode=answer_mode(self._network, self.mode),
                seed=self.random_state,
                calibration=self._calibration_map(self._network),
            )
        return probabilities.cpu().numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each query, (n,)."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def _calibration_map(self, network: MetaLearner) -> CalibrationMap:
        if self._calibration is None:
            return UNCALIBRATED
        way, mode = len(self.classes_), answer_mode(network, self.mode)
        return self._calibration.nearest_map(self._adapt, mode, way, len(self._label_T) / way)

    def _check_mode(self) -> None:
        if self.mode not in ("inductive", "transductive"):
            raise DataError(f"mode is {self.mode!r}; it must be inductive or transductive")

    def _load(self) -> tuple[MetaLearner | None, AdaptSettings]:
        self._preprocessing: Preprocessing | None = None
        self._calibration: PosteriorCalibration | None = None
        if self.model is None:
            if self.head is not None:
                raise DataError(f"head {self.head}: is for an encoder alone, and there is no model; omit it")
            return None, WITHOUT_MODEL
        if isinstance(self.model, str | os.PathLike):
            name = os.fspath(self.model)
            loaded = resolve_model(name)
        else:
            name, loaded = self.model.settings.name, self.model
        if not self.preprocessed and loaded.preprocessing is None and not loaded.model.takes_vectors:
            raise DataError(
                f"{name}: does not record the preprocessing of its training images, because an older version wrote it: "
                "preprocess the images as they were for the training, and pass preprocessed=True"
            )
        loaded = with_head(loaded, self.head, name)
        network = require_learner(loaded, name).to(default_device())
        self._preprocessing, self._calibration = loaded.preprocessing, loaded.calibration
        return network, loaded.settings.adapt

    def _decode(self, X: Any) -> np.ndarray | None:
        """Files and images of Pillow as the model takes them, uint8 (n, C, H, W); None for arrays and features."""
        if self._network is None or self._network.takes_vectors:
            return None
        return pixel_arrays.decode_images(X, self._preprocessing)

    def _rows(self, X: Any) -> tuple[Any, tuple[int, int, int]]:
        """Images as one row each, which is what scikit-learn checks, and their shape; features as they are."""
        if self._network is None:
            return X, (0, 0, 0)
        if self._network.takes_vectors:
            return X, self._network.image_shape
        return pixel_arrays.image_rows(X, self._network.image_shape, any_size=not self.preprocessed)

    def _check_row(self, X: np.ndarray, shape: tuple[int, int, int]) -> None:
        assert self._network is not None
        if X.shape[1] != int(np.prod(shape)):
            takes = describe_shape(shape, vectors=self._network.takes_vectors)
            raise DataError(f"X has {X.shape[1]} values in a row; the model takes {takes}")

    def _check_no_images(self) -> None:
        if not self.preprocessed or self.pixel_range is not None:
            raise DataError("preprocessed and pixel_range are for images, and the model takes vectors; omit them")

    def _fit_pixel_range(self, X: np.ndarray) -> None:
        if self.pixel_range is None:
            self.pixel_range_ = pixel_arrays.find_pixel_range(X)
        else:
            self.pixel_range_ = self.pixel_range
            pixel_arrays.check_pixel_range(X, self.pixel_range_, self.pixel_range_[1])
        pixel_arrays.warn_of_column_scaling(X)
        self._brightest = float(X.max())

    def _features(self, X: np.ndarray, shape: tuple[int, int, int], decoded: bool) -> Tensor:
        if self._network is None:
            return torch.as_tensor((X - self._mean) / self._std, dtype=torch.float64)
        device = default_device()
        if self._network.takes_vectors:
            return encode_images(self._network, vectors_as_images(self._network, X, "X"), device)
        if decoded:
            return encode_images(self._network, X.reshape(-1, *shape), device)
        images = pixel_arrays.eight_bit(X, self.pixel_range_).reshape(-1, *shape)
        if self.preprocessed:
            pixel_arrays.warn_of_polarity(images, self._preprocessing)
        else:
            assert self._preprocessing is not None  # checked by _load
            images = np.stack([apply_preprocessing(x, f"image {i}", self._preprocessing) for i, x in enumerate(images)])
        return encode_images(self._network, images, device)
