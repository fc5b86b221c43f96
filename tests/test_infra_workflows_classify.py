"""Classification of image files: preprocessed like the training images, every file accounted for."""

import json
from dataclasses import replace

import mlflow_template
import numpy as np
import pytest
import torch
from PIL import Image

from metagmvae.infra.cli import main
from metagmvae.infra.commands.parsing import format_answer
from metagmvae.infra.workflows import classify
from metagmvae.infra.workflows.estimator import FewShotClassifier
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.package import load_model, save_package

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
    assert all(row["probabilities"] == {"a": row["a"], "b": row["b"]} for row in answer["queries"])
    assert (answer["left_out"], answer["blank"]) == ([], [])
    assert (tmp_path / "predictions.png").is_file()


def test_model_runs_on_the_default_device(folders, loaded, monkeypatch):
    """The meta device computes shapes only: the features are made there, and drawing latents fails."""
    monkeypatch.setattr(classify, "default_device", lambda: torch.device("meta"))
    with pytest.raises(RuntimeError, match=r"(META|meta)"):
        classify.classify_folders(loaded, *folders[:2])
    assert next(loaded.model.parameters()).device.type == "meta"


def test_one_class_is_refused(folders, loaded, tmp_path):
    support, query, _ = folders
    (support / "b").rename(tmp_path / "b")
    with pytest.raises(DataError, match="two or more"):
        classify.classify_folders(loaded, support, query)


@pytest.fixture
def inverting(loaded):
    """The model, with the record that its training images were inverted, as those of `prepare omniglot`."""
    return replace(loaded, preprocessing=Preprocessing.of_shape(loaded.image_shape, invert=True))


def probabilities(answer) -> np.ndarray:
    return np.array([list(row["probabilities"].values()) for row in answer["queries"]])


def test_files_are_preprocessed_like_the_training_images(folders, loaded, inverting, tmp_path):
    """The package keeps the record; original files of any size give what the prepared arrays give."""
    support, query, images = folders
    for file in [*support.rglob("*.png"), *query.glob("*.png")]:
        Image.open(file).resize((56, 56), Image.Resampling.NEAREST).save(file)
    packaged = load_model(save_package(tmp_path / "package", inverting))
    answer = classify.classify_folders(packaged, support, query)
    assert answer["preprocessing"]["invert"]
    assert answer["preprocessing"]["recorded"]
    big = images.repeat(2, axis=1).repeat(2, axis=2)
    classifier = FewShotClassifier(packaged, mode="transductive", preprocessed=False).fit(big[:4], list("aaab"))
    np.testing.assert_array_equal(classifier.predict_proba(big[4:]).astype("f4"), probabilities(answer).astype("f4"))
    as_it_is = classify.classify_folders(packaged, support, query, invert=False)
    assert not np.array_equal(probabilities(as_it_is), probabilities(answer))
    old = classify.classify_folders(loaded, support, query)
    assert not old["preprocessing"]["recorded"]
    np.testing.assert_array_equal(probabilities(old), probabilities(as_it_is))


def test_a_model_without_the_record_is_warned_about_in_one_line(folders, inverting, loaded, tmp_path, capsys):
    support, query, _ = folders
    package = {name: str(save_package(tmp_path / name, model)) for name, model in (("new", inverting), ("old", loaded))}

    def run(name, *options):
        command = ["classify", package[name], "--support", str(support), "--query", str(query), "--json", *options]
        assert main(command) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out)["preprocessing"]["invert"], printed.err

    assert run("new") == (True, "")
    assert run("new", "--no-invert") == (False, "")
    assert run("old", "--invert") == (True, "")
    invert, warning = run("old")
    assert not invert
    assert warning.count("\n") == 1
    assert "give --invert or --no-invert" in warning


def test_no_class_name_overwrites_the_answer(folders, loaded, capsys, tmp_path):
    support, query, _ = folders
    (support / "a").rename(support / "query")
    (support / "b").rename(support / "class")
    answer = classify.classify_folders(loaded, support, query)
    assert [row["query"] for row in answer["queries"]] == ["0.png", "1.png", "2.png"]
    for row in answer["queries"]:
        assert row["class"] == max(row["probabilities"], key=row["probabilities"].get)
        assert row["probabilities"].keys() == {"class", "query"}
    package = str(save_package(tmp_path / "package", loaded))
    assert main(["classify", package, "--support", str(support), "--query", str(query), "--invert"]) == 0
    assert "class 0." in capsys.readouterr().out


def test_renaming_the_classes_does_not_change_the_probabilities(folders, loaded):
    support, query, _ = folders
    before = probabilities(classify.classify_folders(loaded, support, query))
    (support / "a").rename(support / "z")
    after = probabilities(classify.classify_folders(loaded, support, query))
    np.testing.assert_array_equal(after[:, ::-1], before)


def test_every_file_is_accounted_for(folders, loaded):
    """Further formats and images without a suffix are read; what is left out is named with the reason."""
    support, query, _ = folders
    Image.open(query / "0.png").save(query / "3.tif")
    (query / "1.png").rename(query / "image")
    Image.new("L", (28, 28), 7).save(query / "blank.bmp")
    (query / "notes.txt").write_text("not an image")
    (query / "more").mkdir()
    Image.new("L", (28, 28)).save(query / "more" / "4.png")
    Image.new("L", (28, 28)).save(support / "stray.png")
    answer = classify.classify_folders(loaded, support, query)
    assert [row["query"] for row in answer["queries"]] == ["0.png", "2.png", "3.tif", "blank.bmp", "image"]
    assert {file["file"]: file["reason"] for file in answer["left_out"]} == {
        f"{support}/stray.png": "not in a class folder",
        f"{query}/more/4.png": "in a sub-folder",
        f"{query}/notes.txt": "suffix .txt",
    }
    assert answer["blank"] == [f"{query}/blank.bmp"]


def test_folders_without_images_are_refused(folders, loaded, tmp_path):
    support, query, _ = folders
    with pytest.raises(DataError, match="no such folder"):
        classify.classify_folders(loaded, tmp_path / "missing", query)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        classify.classify_folders(loaded, support, tmp_path / "empty")
    (support / "c").mkdir()
    with pytest.raises(DataError, match="class folder c holds no images"):
        classify.classify_folders(loaded, support, query)


def test_text_output_has_no_control_characters(folders, loaded):
    support, query, _ = folders
    (support / "a").rename(support / "\x1b[31mred")
    (query / "0.png").rename(query / "\x9b0\u202e.png")
    text = format_answer(classify.classify_folders(loaded, support, query))
    assert text.isascii()
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"\x1b[31mred" in text
    assert r"\x9b0\u202e.png" in text
