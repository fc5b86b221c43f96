"""Classification of image files: the same probabilities as the classifier, on the default device."""

import mlflow_template
import numpy as np
import pytest
import torch
from PIL import Image

from metagmvae.infra.workflows import classify
from metagmvae.infra.workflows.estimator import FewShotClassifier
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.package import load_model

SHOTS = {"a": 3, "b": 1}


@pytest.fixture
def folders(tmp_path):
    """Folders of support and queries, and the images in the order in which they are read."""
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    paths = [f"support/{name}/{shot}.png" for name, shots in SHOTS.items() for shot in range(shots)]
    for path, image in zip([*paths, *(f"query/{p}.png" for p in range(3))], images, strict=True):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return tmp_path / "support", tmp_path / "query", images


@pytest.fixture
def loaded(tmp_path):
    return load_model(mlflow_template.new_run(tmp_path / "run"))


def test_probabilities_equal_those_of_the_transductive_classifier(folders, loaded, tmp_path):
    support, query, images = folders
    answer = classify.classify_folders(loaded, support, query, tmp_path / "predictions.png")
    X = images.reshape(len(images), -1)
    expected = FewShotClassifier(loaded, mode="transductive").fit(X[:4], list("aaab")).predict_proba(X[4:])
    assert (answer["classes"], answer["shots"]) == (["a", "b"], [3, 1])
    assert [row["query"] for row in answer["queries"]] == ["0.png", "1.png", "2.png"]
    np.testing.assert_allclose([[row["a"], row["b"]] for row in answer["queries"]], expected, rtol=1e-6)
    assert (tmp_path / "predictions.png").is_file()


def test_model_runs_on_the_default_device(folders, loaded, monkeypatch):
    """The meta device computes shapes only: the features are made there, and drawing latents fails."""
    monkeypatch.setattr(classify, "default_device", lambda: torch.device("meta"))
    with pytest.raises(RuntimeError, match="META"):
        classify.classify_folders(loaded, *folders[:2])
    assert next(loaded.model.parameters()).device.type == "meta"


def test_one_class_is_refused(folders, loaded, tmp_path):
    support, query, _ = folders
    (support / "b").rename(tmp_path / "b")
    with pytest.raises(DataError, match="two or more"):
        classify.classify_folders(loaded, support, query)
