"""The model that MLflow loads and serves: it takes a few-shot request and returns class probabilities.

A request is one episode: labelled images, and images without a label (-1 or null) that are classified. The logged
files are text and safetensors: `pyfunc_entry.py`, which imports this module from the installed package, and the model
package.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.encoders.head_model import HeadModel, answer_mode, with_head
from metagmvae.evaluation.fewshot.pixel_arrays import warn_of_polarity
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.infra.tracking.mlflow_environment import ignore_warnings
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encode_images import encode_images, vectors_as_images
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.trainer.package import LoadedModel, load_package, require_learner

ignore_warnings()  # before the imports, which give the warnings
from mlflow import MlflowException  # noqa: E402
from mlflow.models import ModelSignature  # noqa: E402
from mlflow.pyfunc import PythonModel  # noqa: E402
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec  # noqa: E402
from mlflow.types.schema import AnyType  # noqa: E402

PACKAGE = "package"
QUERY = -1
WITHOUT_RECORD = (
    "{}, but the model does not record the preprocessing of its training images, because an older version wrote it: "
    "give arrays that were preprocessed like them, and leave preprocessed true"
)
MAX_PARAMETER = 1000
"""Most iterations and samples of a request, so that it ends; the settings of a model are 10 and 32 by default."""


class Predictor:
    """Loads the logged model package and answers requests. `FewShotModel` makes it an MLflow model."""

    def load_context(self, context: Any) -> None:
        """Load the model package that was logged, on the GPU if there is one."""
        self.loaded = with_head(load_package(context.artifacts[PACKAGE]))
        self.device = default_device()
        self.loaded.model.to(self.device).eval()

    # Without type hints: MLflow would derive a signature from them, with a list of requests instead of arrays.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return class probabilities of the queries, (queries, K) float64, in the order of the request.

        They are calibrated if the model is (`metagmvae calibrate`).

        Column k belongs to the k-th label of the labelled images in sorted order. An encoder alone classifies by its
        head; without labels it returns the features of all images, (n, F) float64.

        Args:
            context: not used; `load_context` has loaded the model.
            model_input: `images`, n arrays (C, H, W) of whole numbers from 0 to 255, or n image files (PNG, JPEG, …) as
                bytes or in base64; or, for a model of vectors, `vectors`, n arrays of F numbers. `label`, n integers or
                n words, -1 or None for a query (an encoder alone needs no labels). Every image is used. MLflow leaves
                out other keys, and other parameters, and names them in the log of the server.
            params: `preprocessed`, `mode`, and, not for an encoder alone, `iterations`, `samples`, `seed`, as in the
                signature. By default arrays are taken as preprocessed already, like those of `Dataset.images`; with
                `preprocessed` false, what `metagmvae prepare` did to the training images is done to them (the
                inversion; they have the size of the model already). It is always done to image files.

        Raises:
            MlflowException: the request is invalid; a server answers with status 400 and the reason.
        """
        try:
            params = dict(params or {})
            key = inputs_key(self.loaded)
            depth = 1 if self.loaded.model.takes_vectors else 3
            images = self._images(request_values(model_input[key], depth), params)
            if "label" in model_input:
                return self._probabilities(images, request_values(model_input["label"], 0), params)
            if isinstance(self.loaded.model, HeadModel):
                return encode_images(self.loaded.model, images, self.device).double().cpu().numpy()
            raise DataError("no label: give one per image, -1 or null for the images to classify")
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _images(self, values: list[Any], params: dict[str, Any]) -> np.ndarray:
        """The images of a request as the model takes them, uint8 (n, C, H, W); or the vectors, float32 (n, F, 1, 1)."""
        if not values:
            raise DataError(f"there are no {inputs_key(self.loaded)}; give labelled ones, and those to classify")
        if self.loaded.model.takes_vectors:
            try:
                return vectors_as_images(self.loaded.model, np.asarray(values), "vectors")
            except ValueError as error:
                raise DataError(str(error) if isinstance(error, DataError) else "vectors differ in length") from error
        files = [isinstance(value, str | bytes) for value in values]
        if all(files):
            params.pop("preprocessed", None)
            return decode_files(self.loaded, values)
        if any(files):
            number = files.index(False)
            raise DataError(f"image {number} is no file, and others are; give files in base64 only, or arrays only")
        return preprocess(self.loaded, check_images(values, self.loaded.image_shape), params)

    def _probabilities(self, images: np.ndarray, labels: list[Any], params: dict[str, Any]) -> np.ndarray:
        model = require_learner(self.loaded, PACKAGE)
        support, label_T, query = split_request(images, labels)
        mode = answer_mode(model, _mode(params.pop("mode", "transductive")))
        seed = int(params.pop("seed", 0))
        adapt = adapt_settings(self.loaded.settings.adapt, params)
        h_nF = encode_images(model, np.concatenate([support, query]), self.device)
        h_TF, h_PF = h_nF[: len(support)], h_nF[len(support) :]
        way = int(label_T.max()) + 1
        calibration = self.loaded.calibration_map(adapt, mode, way, len(label_T) / way)
        answer = predict_queries(model, adapt, h_TF, label_T, h_PF, mode=mode, seed=seed, calibration=calibration)
        return answer.double().cpu().numpy()


class FewShotModel(Predictor, PythonModel):
    """A trained few-shot classifier as an MLflow model.

    It inherits `predict`, because MLflow demands type hints on a `predict` that the class itself defines.
    """


def inputs_key(loaded: LoadedModel) -> str:
    """Key of a request that holds what the model takes."""
    return "vectors" if loaded.model.takes_vectors else "images"


def request_values(column: Sequence[Any], depth: int) -> list[Any]:
    """Return what a request gives for a key, one value per image.

    MLflow puts all values of a key into one row if they are all words, or if the keys have different numbers of values.

    Args:
        column: of MLflow.
        depth: dimensions of a value that is an array of numbers; words have none.
    """
    values = list(column)
    if len(values) != 1 or not isinstance(values[0], list | np.ndarray):
        return values
    try:
        only = np.asarray(values[0])
    except ValueError:  # arrays of different shapes
        return list(values[0])
    if only.ndim == 0:
        return [only.item()]
    return list(values[0]) if not only.size or only.ndim > (depth if only.dtype.kind in "uif" else 0) else values


def _mode(name: str) -> PredictionMode:
    modes: dict[str, PredictionMode] = {"transductive": "transductive", "inductive": "inductive"}
    if name not in modes:
        raise DataError(f"mode is {name!r}; it must be {' or '.join(modes)}")
    return modes[name]


def decode_files(loaded: LoadedModel, files: Sequence[str | bytes]) -> np.ndarray:
    """Decode and preprocess image files, given as bytes or in base64, as `metagmvae classify` does.

    Raises:
        DataError: one is no image, or the model does not record the preprocessing of its training images.
    """
    if loaded.preprocessing is None:
        raise DataError(WITHOUT_RECORD.format("images are files"))
    images = []
    for number, file in enumerate(files):
        name = f"image {number}"
        try:
            # A data URI, data:image/png;base64,…, is what browsers make.
            content = file if isinstance(file, bytes) else base64.b64decode(file.rpartition(",")[2], validate=True)
        except ValueError as error:
            raise DataError(f"{name}: is text that is not base64 ({error}); encode the content of the file") from error
        images.append(apply_preprocessing(content, name, loaded.preprocessing))
    return np.stack(images)


def check_images(values: Sequence[Any], image_shape: tuple[int, int, int]) -> np.ndarray:
    """Return the images of a request, uint8 (n, C, H, W).

    Raises:
        DataError: they have another data type, shape or scale.
    """
    takes = f"the model takes whole numbers (n, {', '.join(map(str, image_shape))}), values 0 to 255"
    try:
        images = np.asarray(values)
    except ValueError as error:
        raise DataError(f"images have different shapes; {takes}") from error
    if images.dtype.kind not in "uif" or images.shape[1:] != tuple(image_shape):
        raise DataError(f"images are {images.dtype} {images.shape}; {takes}")
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high <= 1 or high > 255 or (images % 1).any():
        raise DataError(f"pixel values are from {low:g} to {high:g}; pixel values must be 0 to 255, whole numbers")
    return images.astype(np.uint8)


def preprocess(loaded: LoadedModel, images: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """Return the images as the model takes them; `preprocessed` is removed from the parameters.

    Images that are said to be preprocessed but have another polarity than the training images give a `PixelWarning`,
    which stands in the log of the server.

    Raises:
        DataError: they are not preprocessed, and the model does not record what was done to its training images.
    """
    if params.pop("preprocessed", True):
        warn_of_polarity(images, loaded.preprocessing)
        return images
    recorded = loaded.preprocessing
    if recorded is None:
        raise DataError(WITHOUT_RECORD.format("preprocessed is false"))
    return np.stack([apply_preprocessing(image, f"image {i}", recorded) for i, image in enumerate(images)])


def split_request(images: np.ndarray, labels: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return support images (T, C, H, W), their class numbers (T,), and queries (n, C, H, W).

    Class numbers count the labels from 0 in sorted order.

    Raises:
        DataError: the request is invalid; the message says why, with counts.
    """
    if len(labels) != len(images):
        raise DataError(f"{len(images)} images and {len(labels)} labels; give one label per image")
    # None in a column of pandas is NaN, which differs from itself.
    is_query = np.array([label is None or label != label or label == QUERY for label in labels])
    given = [label for label, query in zip(labels, is_query, strict=True) if not query]
    if not all(isinstance(label, str) for label in given):
        wrong = [label for label in given if isinstance(label, str | bool) or not _is_count(label)]
        if wrong:
            raise DataError(
                f"label {wrong[0]}: labels must be words, or integers that are 0 or larger; -1 or null for a query"
            )
        given = [int(label) for label in given]
    classes, label_T = np.unique(np.array(given), return_inverse=True)
    if len(classes) < 2 or not is_query.any():
        raise DataError(
            f"{len(classes)} classes and {is_query.sum()} queries (label -1 or null); the model needs at least two "
            "classes and one query"
        )
    return images[~is_query], label_T, images[is_query]


def _is_count(label: Any) -> bool:
    return isinstance(label, int | float | np.integer | np.floating) and float(label) >= 0 and float(label) % 1 == 0


def adapt_settings(adapt: AdaptSettings, params: Mapping[str, Any]) -> AdaptSettings:
    """Return the adaptation settings of the model, with `iterations` and `samples` replaced by those of a request.

    Raises:
        DataError: one of them is smaller than 1, or larger than `MAX_PARAMETER` and the setting of the model.
    """
    for key, value in params.items():
        limit = max(MAX_PARAMETER, getattr(adapt, key))
        if not 1 <= int(value) <= limit:
            raise DataError(f"{key} is {value}; it must be between 1 and {limit:,}")
    return adapt.model_copy(update={key: int(value) for key, value in params.items()})


def example_request(loaded: LoadedModel) -> dict[str, np.ndarray]:
    """Return a valid request: two classes with one image or vector each, and one query, all of noise."""
    rng = np.random.default_rng(0)
    size = loaded.image_shape[0]
    vectors = loaded.model.takes_vectors
    inputs = rng.normal(size=(3, size)) if vectors else rng.integers(0, 256, (3, *loaded.image_shape), dtype=np.uint8)
    labels = {"label": np.array([0, 1, QUERY])} if isinstance(loaded.model, MetaLearner) else {}
    return {inputs_key(loaded): inputs, **labels}


def model_signature(loaded: LoadedModel) -> ModelSignature:
    """Return the MLflow signature of a model; the defaults of its parameters are the settings of the model."""
    adapt = loaded.settings.adapt
    # Any type: arrays or files, and integers or words.
    inputs = [ColSpec(AnyType(), inputs_key(loaded)), ColSpec(AnyType(), "label", required=False)]
    params = [ParamSpec("mode", "string", "transductive")]
    if not loaded.model.takes_vectors:
        params.insert(0, ParamSpec("preprocessed", "boolean", True))
    if isinstance(loaded.model, MetaLearner):
        params += [
            ParamSpec("iterations", "long", adapt.iterations),
            ParamSpec("samples", "long", adapt.samples),
            ParamSpec("seed", "long", 0),
        ]
    outputs = Schema([TensorSpec(np.dtype("float64"), (-1, -1))])
    return ModelSignature(Schema(inputs), outputs, ParamSchema(params))
