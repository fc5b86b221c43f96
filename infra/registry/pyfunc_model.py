"""The model that MLflow loads and serves: a few-shot request in, class probabilities out.

One request is one episode: support images with their labels and query images with label -1, together. What is
logged is text and safetensors: `pyfunc_entry.py`, which imports this module from the installed package, and
the portable model package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from metagmvae.configs.schema import AdaptSettings
from metagmvae.infra.tracking.store import ignore_warnings
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.package import LoadedModel, load_package, require_meta_gmvae

ignore_warnings()  # before the imports that give them
from mlflow import MlflowException  # noqa: E402
from mlflow.models import ModelSignature  # noqa: E402
from mlflow.pyfunc import PythonModel  # noqa: E402
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec  # noqa: E402

Mode = Literal["transductive", "inductive"]
PACKAGE = "package"
QUERY = -1


class Predictor:
    """Loads the package that was logged and answers requests; MLflow only needs to be told of it below."""

    def load_context(self, context: Any) -> None:
        """Load the package that was logged with the model; on a GPU where there is one."""
        from metagmvae.training.device.default import default_device

        self.loaded = load_package(context.artifacts[PACKAGE])
        self.device = default_device()
        self.loaded.model.to(self.device).eval()

    # Without hints: MLflow takes them for a signature, and wants lists of requests where the signature says arrays.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return class probabilities of the queries, (queries, K) float64, in the order they were given.

        Column k belongs to the k-th smallest label among the support images. An encoder alone returns the features of
        all images, (n, F) float64.

        Args:
            context: not used; the model was loaded before.
            model_input: `images` uint8 (n, C, H, W), values 0 to 255; `label` int64 (n,), -1 for a query (an encoder
                takes none).
            params: `mode`, `iterations`, `samples`, `seed`, as in the signature (an encoder takes none).

        Raises:
            MlflowException: the request is wrong; a server answers 400 with the reason.
        """
        try:
            if isinstance(self.loaded.model, MetaGMVAE):
                return self._probabilities(model_input, dict(params or {}))
            return self._features(model_input)
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _features(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        from metagmvae.training.models.encode_images import encode_images

        images = check_images(inputs, self.loaded.image_shape)
        return encode_images(self.loaded.model, images, self.device).double().cpu().numpy()

    def _probabilities(self, inputs: Mapping[str, np.ndarray], params: dict[str, Any]) -> np.ndarray:
        from metagmvae.evaluation.fewshot.predict_queries import predict_queries
        from metagmvae.training.models.encode_images import encode_images

        model, image_shape = require_meta_gmvae(self.loaded, PACKAGE), self.loaded.image_shape
        support, label_T, query = split_request(inputs, image_shape)
        mode, seed = _mode(params.pop("mode", "transductive")), int(params.pop("seed", 0))
        adapt = adapt_settings(self.loaded.settings.adapt, params)
        h_nF = encode_images(model, np.concatenate([support, query]), self.device)
        h_TF, h_PF = h_nF[: len(support)], h_nF[len(support) :]
        answer = predict_queries(model, adapt, h_TF, label_T, h_PF, mode=mode, seed=seed)
        return answer.double().cpu().numpy()


class FewShotModel(Predictor, PythonModel):
    """A trained Meta-GMVAE as an MLflow model.

    `predict` is inherited on purpose: where MLflow finds one in the class itself, it asks for hints.
    """


def _mode(name: str) -> Mode:
    modes: dict[str, Mode] = {"transductive": "transductive", "inductive": "inductive"}
    if name not in modes:
        raise DataError(f"mode is {name!r}; it is {' or '.join(modes)}")
    return modes[name]


def check_images(inputs: Mapping[str, np.ndarray], image_shape: tuple[int, int, int]) -> np.ndarray:
    """Return the images of a request, uint8 (n, C, H, W).

    Raises:
        DataError: they have another type or shape.
    """
    images = np.asarray(inputs["images"])
    if images.dtype != np.uint8 or images.shape[1:] != tuple(image_shape):
        raise DataError(
            f"images are {images.dtype} {images.shape}; the model takes uint8 (n, "
            f"{', '.join(map(str, image_shape))}), values 0 to 255"
        )
    return images


def split_request(
    inputs: Mapping[str, np.ndarray], image_shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return support images (T, C, H, W), their classes numbered by rising label (T,), and queries (n, C, H, W).

    Raises:
        DataError: what is wrong with the request, with counts.
    """
    images, labels = check_images(inputs, image_shape), np.asarray(inputs["label"])
    if labels.shape != images.shape[:1]:
        raise DataError(f"{len(images)} images and {labels.size} labels; give one label to each image")
    if labels.size and labels.min() < QUERY:
        raise DataError(f"label {labels.min()}: labels are 0 and up, and -1 for a query")
    classes, label_T = np.unique(labels[labels != QUERY], return_inverse=True)
    if len(classes) < 2 or not (labels == QUERY).any():
        raise DataError(
            f"{len(classes)} classes and {(labels == QUERY).sum()} queries (label -1); the model needs two "
            "classes and one query at least"
        )
    if images.max() <= 1:
        # JSON numbers between 0 and 1 were cut to 0 and 1 on their way into uint8.
        raise DataError(f"the largest pixel value is {images.max()}; pixels run from 0 to 255")
    return images[labels != QUERY], label_T, images[labels == QUERY]


def adapt_settings(adapt: AdaptSettings, params: Mapping[str, Any]) -> AdaptSettings:
    """Settings of the adaptation with `iterations` and `samples` of a request in place of the model's.

    Raises:
        DataError: one of them is not a positive number.
    """
    wrong = [f"{key} is {value}" for key, value in params.items() if int(value) < 1]
    if wrong:
        raise DataError(f"{', '.join(wrong)}; it must be 1 or more")
    return adapt.model_copy(update={key: int(value) for key, value in params.items()})


def example(loaded: LoadedModel) -> dict[str, np.ndarray]:
    """A request that the model answers: two classes with an image each, and a query. The images are noise."""
    images = np.random.default_rng(0).integers(0, 256, (3, *loaded.image_shape), dtype=np.uint8)
    labels = {"label": np.array([0, 1, QUERY])} if isinstance(loaded.model, MetaGMVAE) else {}
    return {"images": images, **labels}


def signature(loaded: LoadedModel) -> ModelSignature:
    """The signature of a model; parameters default to its own settings."""
    adapt = loaded.settings.adapt
    inputs = [TensorSpec(np.dtype("uint8"), (-1, *loaded.image_shape), "images")]
    if not isinstance(loaded.model, MetaGMVAE):
        return ModelSignature(Schema(inputs), Schema([TensorSpec(np.dtype("float64"), (-1, loaded.model.feature_dim))]))
    inputs.append(TensorSpec(np.dtype("int64"), (-1,), "label"))
    params = [
        ParamSpec("mode", "string", "transductive"),
        ParamSpec("iterations", "long", adapt.iterations),
        ParamSpec("samples", "long", adapt.samples),
        ParamSpec("seed", "long", 0),
    ]
    outputs = Schema([TensorSpec(np.dtype("float64"), (-1, -1))])
    return ModelSignature(Schema(inputs), outputs, ParamSchema(params))
