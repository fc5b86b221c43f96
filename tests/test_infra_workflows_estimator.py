"""The scikit-learn classifier: the checks of scikit-learn, and predictions equal to those of the evaluation."""

from copy import deepcopy

import mlflow_template
import numpy as np
import pytest
import torch
from reference import semi_supervised_em
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from metagmvae.evaluation.fewshot.predict import predict_episodes
from metagmvae.infra.workflows import estimator
from metagmvae.infra.workflows.estimator import FewShotClassifier
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.objectives.mixture import fit_semi_supervised
from metagmvae.training.trainer.package import load_model

PIXELS = 28 * 28


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(mlflow_template.new_run(tmp_path_factory.mktemp("runs") / "run"))


def random_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, PIXELS)).astype(np.uint8)


@parametrize_with_checks([FewShotClassifier(), FewShotClassifier(e_step="diagonal")])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_equal_shots_give_the_probabilities_of_predict_episodes(loaded, mode):
    support, queries = random_images(6), random_images(5, seed=1)
    classifier = FewShotClassifier(loaded, mode=mode, random_state=3).fit(support[[3, 0, 4, 1, 5, 2]], list("bababa"))
    h = encode_images(loaded.model, np.concatenate([support, queries]).reshape(-1, 1, 28, 28), torch.device("cpu"))
    expected = predict_episodes(
        loaded.model,
        loaded.settings.adapt,
        h[:6].reshape(1, 2, 3, -1),
        h[None, 6:],
        mode=mode,
        seed_by_episode=[3],
    )[0]
    np.testing.assert_allclose(classifier.predict_proba(queries), expected, rtol=1e-4, atol=1e-6)
    assert classifier.classes_.tolist() == ["a", "b"]
    assert classifier.predict(queries).tolist() == [["a", "b"][k] for k in expected.argmax(1)]


def test_inductive_prediction_does_not_depend_on_other_queries(loaded):
    queries = random_images(4, seed=1)
    classifier = FewShotClassifier(loaded, samples=2).fit(random_images(3), [0, 0, 1])
    np.testing.assert_allclose(classifier.predict_proba(queries)[:1], classifier.predict_proba(queries[:1]), atol=1e-6)


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


@pytest.mark.parametrize(
    ("options", "X", "reason"),
    [
        ({"mode": "both"}, random_images(3), "mode is 'both'"),
        ({}, random_images(3)[:, :9], "9 values in a row"),
        ({}, random_images(3) * 2.0, "pixels must be from 0 to 255"),
        ({"iterations": 0}, random_images(3), "greater than 0"),
    ],
)
def test_wrong_arguments_are_refused(loaded, options, X, reason):
    with pytest.raises(ValueError, match=reason):
        FewShotClassifier(loaded, **options).fit(X, [0, 1, 1])
