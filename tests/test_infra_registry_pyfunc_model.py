"""Requests to the MLflow model: polarity of the images, and independence of what else is in the request."""

from dataclasses import replace
from types import SimpleNamespace

import mlflow_template
import numpy as np
import pytest

from metagmvae.evaluation.fewshot.pixel_arrays import PixelWarning
from metagmvae.infra.registry.pyfunc_model import PACKAGE, MlflowException, Predictor, model_signature
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.training.trainer.package import load_model, save_package

LABELS = np.array([-1, 4, 1, -1, 1, 4, -1])
STROKES = np.where(np.random.default_rng(3).random((7, *mlflow_template.IMAGE_SHAPE)) > 0.8, 255, 0).astype(np.uint8)


def served(loaded, folder):
    predictor = Predictor()
    predictor.load_context(SimpleNamespace(artifacts={PACKAGE: str(save_package(folder, loaded))}))

    def answer(images=STROKES, labels=LABELS, **params):
        return predictor.predict(None, {"images": images, "label": labels}, params)

    return answer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(mlflow_template.new_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def inverting(loaded, tmp_path_factory):
    """The answers of a model that was trained on inverted images."""
    recorded = replace(loaded, preprocessing=Preprocessing.of_shape(loaded.image_shape, invert=True))
    return served(recorded, tmp_path_factory.mktemp("inverting") / "package")


def test_images_that_are_not_preprocessed_are_inverted_as_recorded(inverting):
    np.testing.assert_array_equal(inverting(255 - STROKES, preprocessed=False), inverting(STROKES))


def test_a_bright_background_is_warned_about(inverting):
    with pytest.warns(PixelWarning, match="preprocessed"):
        inverting(255 - STROKES)


def test_preprocessing_that_is_not_recorded_cannot_be_asked_for(loaded, tmp_path):
    answer = served(loaded, tmp_path / "package")
    with pytest.raises(MlflowException, match="does not record the preprocessing"):
        answer(preprocessed=False)


def test_the_signature_has_the_parameter(loaded):
    assert {param.name: param.default for param in model_signature(loaded).params}["preprocessed"] is True


def test_inductive_answers_depend_on_the_support_and_the_query_only(inverting):
    together = inverting(mode="inductive")
    order = np.array([6, 5, 4, 2, 1, 0])  # without the query in row 3
    other_names = np.array([-1, 2, 7, -1, 7, 2, -1])  # the larger label becomes the smaller one
    alone = inverting(STROKES[order], other_names[order], mode="inductive")
    np.testing.assert_array_equal(alone[:, ::-1], together[[2, 0]])
