"""The scikit-learn classifier: the checks of scikit-learn, and predictions equal to those of the evaluation."""

import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import mlflow_template
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from reference import semi_supervised_em
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.pixel_arrays import PixelWarning, image_rows
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.infra.workflows import estimator
from metagmvae.infra.workflows.estimator import FewShotClassifier
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.objectives.class_posterior import fit_log_posteriors
from metagmvae.training.objectives.class_whitening import whiten_classes
from metagmvae.training.objectives.feature_diffusion import diffuse_features
from metagmvae.training.objectives.mixture import fit_semi_supervised
from metagmvae.training.trainer.package import load_model

PIXELS = 28 * 28


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(mlflow_template.new_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture
def inverting(loaded):
    """The model, as if it had been trained on inverted images."""
    return replace(loaded, preprocessing=Preprocessing.of_shape(loaded.image_shape, invert=True))


def random_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, PIXELS)).astype(np.uint8)


@parametrize_with_checks([FewShotClassifier(), FewShotClassifier(e_step="diagonal")])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_probabilities_are_those_of_predict_queries(loaded, mode):
    support, queries = random_images(6), random_images(5, seed=1)
    classifier = FewShotClassifier(loaded, mode=mode, random_state=3).fit(support[[3, 0, 4, 1, 5, 2]], list("bababa"))
    h = encode_images(loaded.model, np.concatenate([support, queries]).reshape(-1, 1, 28, 28), torch.device("cpu"))
    labels = np.array([0, 0, 0, 1, 1, 1])
    expected = predict_queries(loaded.model, loaded.settings.adapt, h[:6], labels, h[6:], mode=mode, seed=3)
    np.testing.assert_allclose(classifier.predict_proba(queries), expected, rtol=1e-4, atol=1e-6)
    assert classifier.classes_.tolist() == ["a", "b"]
    assert classifier.predict(queries).tolist() == [["a", "b"][k] for k in expected.argmax(1)]


def test_every_setting_of_the_adaptation_is_an_argument(loaded):
    assert AdaptSettings.model_fields.keys() <= FewShotClassifier().get_params().keys()
    support, queries = random_images(6), random_images(5, seed=1)
    probabilities = [
        FewShotClassifier(loaded, inductive=space).fit(support, list("ababab")).predict_proba(queries)
        for space in (None, "latents", "features")
    ]
    np.testing.assert_array_equal(probabilities[0], probabilities[1])
    assert abs(probabilities[2] - probabilities[0]).max() > 1e-6


@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_prediction_does_not_depend_on_names_and_order(loaded, mode):
    support, labels, queries = random_images(5), np.array([0, 0, 1, 2, 2]), random_images(6, seed=1)
    classifier = FewShotClassifier(loaded, samples=2, mode=mode)
    expected = classifier.fit(support, labels).predict_proba(queries)
    order = [4, 1, 3, 0, 2]
    np.testing.assert_array_equal(classifier.fit(support[order], labels[order]).predict_proba(queries), expected)
    renamed = classifier.fit(support, np.array(["c", "a", "b"])[labels]).predict_proba(queries)
    np.testing.assert_array_equal(renamed[:, [2, 0, 1]], expected)
    if mode == "inductive":
        classifier.fit(support, labels)
        np.testing.assert_array_equal(classifier.predict_proba(queries[::-1])[::-1], expected)
        for p in range(6):
            np.testing.assert_array_equal(classifier.predict_proba(queries[[p]])[0], expected[p])


def test_model_runs_on_the_default_device(loaded, monkeypatch):
    monkeypatch.setattr(estimator, "default_device", lambda: torch.device("meta"))
    classifier = FewShotClassifier(deepcopy(loaded)).fit(random_images(3), [0, 1, 1])
    assert classifier._support.device.type == "meta"


@pytest.mark.parametrize("e_step", ["diagonal", "identity"])
def test_unequal_shots_equal_the_reference_implementation(e_step):
    rng = np.random.default_rng(5)
    support = [rng.normal(k, 1, (count, 3)) for k, count in enumerate((4, 1, 2))]
    queries = rng.normal(1, 1.5, (9, 3))
    padded = np.full((3, 4, 3), 77.0)
    mask = np.zeros((3, 4))
    for k, rows in enumerate(support):
        padded[k, : len(rows)] = rows
        mask[k, : len(rows)] = 1
    mixture = fit_semi_supervised(
        torch.as_tensor(padded)[None],
        torch.as_tensor(queries)[None],
        iterations=4,
        e_step=e_step,
        mask_EKT=torch.as_tensor(mask)[None],
    )
    means, variances = semi_supervised_em(support, queries, 4, e_step)
    np.testing.assert_allclose(mixture.mean_EKD[0], means, rtol=1e-9)
    np.testing.assert_allclose(mixture.variance_EKD[0], np.maximum(variances, 1e-6), rtol=1e-6)


def test_features_are_classified_without_a_model():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    features = rng.normal(0, 1, (90, 8)) + 4 * np.eye(3, 8)[labels]
    assert cross_val_score(FewShotClassifier(), features, labels, cv=3).mean() > 0.95
    few = FewShotClassifier(mode="transductive").fit(features[::30], labels[::30])
    assert few.score(features, labels) > 0.9


def test_features_without_a_model_are_whitened_within_classes():
    rng = np.random.default_rng(0)
    labels, X = np.repeat([0, 1, 2], 10), rng.normal(0, 1, (30, 8)) + np.eye(3, 8)[np.repeat([0, 1, 2], 10)]
    support, query = np.arange(0, 30, 5), np.setdiff1d(np.arange(30), np.arange(0, 30, 5))
    classifier = FewShotClassifier(whitening=3.0).fit(X[support], labels[support])
    z = torch.as_tensor((X - X[support].mean(axis=0)) / X[support].std())[None]
    z_support, z_query = whiten_classes(z[:, support], torch.as_tensor(labels[support]), z[:, query], 3.0)
    adapt = AdaptSettings(e_step="identity", final_covariance="identity")
    _, expected = fit_log_posteriors(adapt, z_support.unflatten(1, (3, 2)), z_query[:, :, None], fit_on_queries=False)
    np.testing.assert_allclose(classifier.predict_proba(X[query]), expected[0].exp().numpy(), atol=1e-12)


@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_features_without_a_model_are_diffused_in_transductive_mode(mode):
    rng = np.random.default_rng(0)
    labels, X = np.repeat([0, 1, 2], 10), rng.normal(0, 1, (30, 8)) + np.eye(3, 8)[np.repeat([0, 1, 2], 10)]
    support, query = np.arange(0, 30, 5), np.setdiff1d(np.arange(30), np.arange(0, 30, 5))
    options = {"mode": mode, "e_step": "identity", "final_covariance": "identity"}
    plain = FewShotClassifier(**options).fit(X[support], labels[support]).predict_proba(X[query])
    diffused = FewShotClassifier(**options, diffusion=0.5).fit(X[support], labels[support]).predict_proba(X[query])
    if mode == "inductive":
        np.testing.assert_array_equal(plain, diffused)
        return
    z = torch.as_tensor((X - X[support].mean(axis=0)) / X[support].std())[None]
    z = diffuse_features(torch.cat([z[:, support], z[:, query]], dim=1), 0.5)
    adapt = AdaptSettings(e_step="identity", final_covariance="identity")
    _, expected = fit_log_posteriors(adapt, z[:, :6].unflatten(1, (3, 2)), z[:, 6:, None])
    np.testing.assert_allclose(diffused, expected[0].exp().numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "X", "reason"),
    [
        ({"mode": "both"}, random_images(3), "mode is 'both'"),
        ({}, random_images(3)[:, :9], "9 values in a row"),
        ({}, random_images(3) * 2.0, "not the scale 0 to 255"),
        ({}, random_images(3) - 128.0, "not the scale 0 to 255"),
        ({}, random_images(3) // 16, "from 0 to 15, which is not the scale"),
        ({}, random_images(3) // 128, "from 0 to 1, which is not the scale"),
        ({}, random_images(3).astype(np.uint16) * 257, "from 0 to 65535"),
        ({}, np.where(random_images(3) > 250, np.nan, 1.0), "contains NaN"),
        ({"pixel_range": (0, 255)}, random_images(3) / 255, "another scale"),
        ({"pixel_range": (0, 1)}, random_images(3), "pixel_range is 0 to 1"),
        ({"pixel_range": (1, 1)}, random_images(3), "two finite numbers"),
        ({"preprocessed": False}, random_images(3), "does not record the preprocessing"),
        ({}, random_images(3).reshape(3, 14, 56), r"X has shape \(3, 14, 56\)"),
        ({"iterations": 0}, random_images(3), "greater than 0"),
    ],
)
def test_wrong_arguments_are_refused(loaded, options, X, reason):
    with pytest.raises(ValueError, match=reason):
        FewShotClassifier(loaded, **options).fit(X, [0, 1, 1])


@pytest.mark.parametrize(
    "y",
    [
        ["a", None, "b"],
        ["a", float("nan"), "b"],  # NumPy makes a class "nan" of it
        np.array([0, np.nan, 1]),
        pd.Series(["a", None, "b"]),
        pd.Series(["a", pd.NA, "b"], dtype="string"),
        pd.Series([0, pd.NA, 1], dtype="Int64"),
        pd.Series(["a", None, "b"], dtype="category"),
    ],
    ids=range(7),
)
def test_a_missing_label_is_named(loaded, y):
    with pytest.raises(DataError, match=r"^y\[1\] is (None|nan|<NA>), not a label; leave such images out"):
        FewShotClassifier(loaded).fit(random_images(3), y)
    named = FewShotClassifier(loaded).fit(random_images(3), ["nan", "None", "nan"])
    assert list(named.classes_) == ["None", "nan"]


SCALES = {
    "floats 0 to 255": (lambda x: x.astype(np.float32), None),
    "ToTensor": (lambda x: (x / 255).astype(np.float32), (0, 1)),
    "-1 to 1": (lambda x: x / 127.5 - 1, (-1, 1)),
    "16 bits": (lambda x: x.astype(np.uint16) * 257, (0, 65535)),
}


@pytest.mark.parametrize("name", SCALES)
def test_the_same_pixels_on_another_scale_give_the_same_answer(loaded, name):
    scale, pixel_range = SCALES[name]
    support, queries, labels = random_images(4), random_images(3, seed=1), [0, 0, 1, 1]
    expected = FewShotClassifier(loaded).fit(support, labels).predict_proba(queries)
    classifier = FewShotClassifier(loaded, pixel_range=pixel_range).fit(scale(support), labels)
    np.testing.assert_array_equal(classifier.predict_proba(scale(queries)), expected)
    assert classifier.pixel_range_ == (pixel_range or (0, 255))


@pytest.mark.parametrize("scale", [lambda x: x / 255, lambda x: x > 127])
def test_fractions_and_booleans_are_scaled_with_a_warning(loaded, scale):
    support, queries, labels = random_images(4), random_images(3, seed=1), [0, 0, 1, 1]
    whole = np.rint(scale(support) * 255.0)
    expected = FewShotClassifier(loaded).fit(whole, labels).predict_proba(np.rint(scale(queries) * 255.0))
    with pytest.warns(PixelWarning, match=r"pixel_range=\(0, 1\)"):
        classifier = FewShotClassifier(loaded).fit(scale(support), labels)
    np.testing.assert_array_equal(classifier.predict_proba(scale(queries)), expected)


def test_queries_on_another_scale_than_the_support(loaded):
    support, labels = random_images(4), [0, 0, 1, 1]
    classifier = FewShotClassifier(loaded).fit(support, labels)
    with pytest.raises(ValueError, match="another scale than pixel_range 0 to 255"):
        classifier.predict(support / 255)
    with pytest.raises(ValueError, match="pixel_range is 0 to 255"):
        classifier.predict(support * 2.0)
    with pytest.warns(PixelWarning, match="up to 15 where 255 was expected"):
        classifier.predict(support // 16)
    fractions = FewShotClassifier(loaded, pixel_range=(0, 1)).fit(support / 255, labels)
    with pytest.raises(ValueError, match="pixel_range is 0 to 1"):
        fractions.predict(support)


def test_scalers_in_front_of_the_classifier_are_noticed(loaded):
    support, labels = random_images(6), [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="leave out a scaler"):
        make_pipeline(StandardScaler(), FewShotClassifier(loaded)).fit(support, labels)
    with pytest.warns(PixelWarning, match="as after MinMaxScaler"):
        make_pipeline(MinMaxScaler(), FewShotClassifier(loaded, pixel_range=(0, 1))).fit(support, labels)


def test_images_of_all_layouts(loaded):
    support, queries, labels = random_images(4), random_images(3, seed=1), [0, 0, 1, 1]
    classifier = FewShotClassifier(loaded).fit(support, labels)
    expected = classifier.predict_proba(queries)
    for shape in ((28, 28), (1, 28, 28), (28, 28, 1)):
        np.testing.assert_array_equal(classifier.predict_proba(queries.reshape(3, *shape)), expected)
        other = FewShotClassifier(loaded).fit(list(support.reshape(4, *shape)), labels)
        np.testing.assert_array_equal(other.predict_proba(queries), expected)


def test_channels_last_images_are_transposed():
    rows, shape = image_rows(np.arange(2 * 5 * 5 * 3).reshape(2, 5, 5, 3), (3, 5, 5))
    assert shape == (3, 5, 5)
    assert rows[1].reshape(shape)[:, 2, 4].tolist() == [75 + 14 * 3, 75 + 14 * 3 + 1, 75 + 14 * 3 + 2]


def test_images_that_should_be_inverted_already(loaded, inverting):
    """A bright background is warned about; `preprocessed=False` inverts the images as recorded."""
    strokes = np.where(random_images(4) > 200, 255, 0).astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = FewShotClassifier(inverting).fit(strokes, [0, 0, 1, 1]).predict_proba(strokes)
        original = FewShotClassifier(inverting, preprocessed=False).fit(255 - strokes, [0, 0, 1, 1])
    np.testing.assert_array_equal(original.predict_proba(255 - strokes), expected)
    with pytest.warns(PixelWarning, match="preprocessed=False"):
        FewShotClassifier(inverting).fit(255 - strokes, [0, 0, 1, 1])
    assert loaded.preprocessing is None


def test_an_unknown_mode_is_refused_after_fit_too(loaded):
    classifier = FewShotClassifier(loaded).fit(random_images(3), [0, 1, 1])
    with pytest.raises(ValueError, match="mode is 'both'"):
        classifier.set_params(mode="both").predict(random_images(3))


def write_drawings(folder, count: int) -> list:
    """Colour images of dark strokes on white, 40 x 60 pixels, as PNG files; return their paths."""
    pixels = np.where(np.random.default_rng(4).random((count, 40, 60, 3)) > 0.8, 0, 255).astype(np.uint8)
    paths = [folder / f"{number}.png" for number in range(count)]
    for image, path in zip(pixels, paths, strict=True):
        Image.fromarray(image).save(path)
    return paths


def test_files_and_images_of_pillow_are_preprocessed_as_recorded(inverting, tmp_path):
    paths, labels = write_drawings(tmp_path, 6), ["a", "a", "b", "b"]
    arrays = np.stack([apply_preprocessing(path.read_bytes(), "", inverting.preprocessing) for path in paths])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = FewShotClassifier(inverting).fit(arrays[:4], labels).predict_proba(arrays[4:])
        kinds = (Path, str, Path.read_bytes, Image.open)
        for kind in [lambda paths, one=one: [one(path) for path in paths] for one in kinds]:
            classifier = FewShotClassifier(inverting).fit(kind(paths[:4]), labels)
            np.testing.assert_array_equal(classifier.predict_proba(kind(paths[4:])), expected)
        np.testing.assert_array_equal(classifier.predict_proba(arrays[4:]), expected)  # and arrays after files
        assert set(classifier.predict(tuple(paths))) <= {"a", "b"}
        by_array = FewShotClassifier(inverting, pixel_range=(0, 1)).fit(arrays[:4] / 255, labels)
    np.testing.assert_array_equal(by_array.predict_proba(paths[4:]), expected)


def test_black_files_are_images_too(inverting, tmp_path):
    Image.new("L", (28, 28), 250).save(tmp_path / "dark.png")
    Image.new("L", (28, 28), 240).save(tmp_path / "darker.png")
    files = [tmp_path / "dark.png", tmp_path / "darker.png"]
    assert FewShotClassifier(inverting).fit(files, [0, 1]).predict(files).shape == (2,)


@pytest.mark.parametrize(
    ("X", "reason"),
    [
        (lambda paths: [*paths[:2], paths[2].with_name("none.png")], r"none.png: cannot be read \(No such file"),
        (lambda paths: [*paths[:2], paths[2].parent], "cannot be read"),
        (lambda paths: [*paths[:2], random_images(1)[0]], r"X\[2\] is ndarray"),
        (lambda paths: [*paths[:2], Image.new("F", (9, 9))], r"X\[2\]: floating-point"),
        (lambda paths: paths[0], "give a list"),
        (lambda paths: str(paths[0]), "give a list"),
        (lambda paths: paths[0].read_bytes(), "X is one bytes; give a list"),
        (lambda paths: [*paths[:2], b"no image"], r"X\[2\]: broken image"),
    ],
)
def test_wrong_files_are_refused(inverting, tmp_path, X, reason):
    paths = write_drawings(tmp_path, 3)
    classifier = FewShotClassifier(inverting)
    with pytest.raises(ValueError, match=reason):
        classifier.fit(X(paths), [0, 1, 1])
    classifier.fit(paths, [0, 1, 1])
    with pytest.raises(ValueError, match=reason):
        classifier.predict(X(paths))


def test_files_need_a_model_that_records_its_preprocessing(loaded, tmp_path):
    with pytest.raises(ValueError, match="does not record the preprocessing"):
        FewShotClassifier(loaded).fit(write_drawings(tmp_path, 2), [0, 1])


def test_fractions_are_not_rounded_unasked(loaded):
    support, labels = random_images(4), [0, 0, 1, 1]
    blurred = support * 0.99
    with pytest.raises(ValueError, match="fractions such as"):
        FewShotClassifier(loaded).fit(blurred, labels)
    with pytest.raises(ValueError, match="fractions such as"):
        FewShotClassifier(loaded).fit(support, labels).predict(blurred)
    expected = FewShotClassifier(loaded).fit(np.rint(blurred), labels).predict_proba(support)
    rounded = FewShotClassifier(loaded, pixel_range=(0, 255)).fit(blurred, labels)
    np.testing.assert_array_equal(rounded.predict_proba(support), expected)
