"""Requests to a served model: arrays or files, integers or words; parameters are bounded, so that requests end."""

import base64
import io
import json
from dataclasses import replace

import mlflow_template
import numpy as np
import pytest
from PIL import Image

from metagmvae.configs.schema import AdaptSettings
from metagmvae.infra.registry.pyfunc_model import MAX_PARAMETER, adapt_settings
from metagmvae.infra.registry.register import save_pyfunc
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.workflows.classify import ClassifyOptions, classify_folders
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing
from metagmvae.training.trainer.package import load_model, save_package


@pytest.mark.parametrize("key", ["samples", "iterations"])
@pytest.mark.parametrize("value", [0, -1, MAX_PARAMETER + 1, 10**9, 2**63 - 1])
def test_a_count_beyond_the_bounds_is_refused(key, value):
    with pytest.raises(DataError, match=f"{key} is {value}; it must be between 1 and 1,000"):
        adapt_settings(AdaptSettings(), {key: value})


def test_a_count_within_the_bounds_replaces_the_setting():
    assert adapt_settings(AdaptSettings(), {"samples": MAX_PARAMETER}).samples == MAX_PARAMETER


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model that was trained on inverted drawings, as MLflow loads it."""
    folder = tmp_path_factory.mktemp("served")
    loaded = load_model(mlflow_template.new_run(folder / "run"))
    loaded = replace(loaded, preprocessing=Preprocessing.of_shape(loaded.image_shape, invert=True))
    save_package(folder / "package", loaded)
    save_pyfunc(folder / "model", folder / "package", loaded)
    return import_mlflow().pyfunc.load_model(str(folder / "model"))


def drawings() -> list[bytes]:
    """Five drawings, dark on white, 40 x 60 pixels, as PNG files."""
    files = []
    for pixels in np.where(np.random.default_rng(4).random((5, 40, 60)) > 0.8, 0, 255).astype(np.uint8):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        files.append(stream.getvalue())
    return files


def answer(served, images, label) -> np.ndarray:
    """The answer of MLflow's scoring server to a request in JSON."""
    from mlflow.pyfunc import scoring_server

    body = json.dumps({"inputs": {"images": images, "label": label}})
    response = scoring_server.invocations(body, "application/json", served, served.metadata.get_input_schema())
    assert response.status == 200
    return np.array(json.loads(response.response)["predictions"])


@pytest.mark.mlflow
def test_files_and_words_give_the_answer_of_arrays_and_integers(served):
    files = drawings()
    preprocessing = Preprocessing.of_shape((1, 28, 28), invert=True)
    arrays = np.stack([apply_preprocessing(file, "", preprocessing) for file in files])
    numbers, words = [1, 0, -1, 1, -1], ["owl", "cat", None, "owl", None]
    expected = served.predict({"images": arrays, "label": np.array(numbers)})
    assert expected.shape == (2, 2)
    encoded = [base64.b64encode(file).decode() for file in files]
    for images in (arrays.tolist(), encoded, [f"data:image/png;base64,{text}" for text in encoded]):
        for label in (numbers, words, [1, 0, None, 1, None]):
            np.testing.assert_array_equal(answer(served, images, label), expected)
    np.testing.assert_array_equal(served.predict({"images": files, "label": words}), expected)


@pytest.mark.mlflow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": ["no base64!"] * 5}, "image 0: is text that is not base64"),
        ({"images": [base64.b64encode(b"GIF?").decode()] * 5}, "image 0: broken image"),
        ({"images": ["/etc/passwd"] * 5}, "image 0: "),
        ({"images": [[[[1]]], [[[1, 2]]], [[[3]]], [[[1]]], [[[1]]]]}, "different shapes"),
        ({"images": [[[[0.5] * 28] * 28]] * 5}, "from 0.5 to 0.5; pixel values must be 0 to 255"),
        ({"images": [[[[1.5] * 28] * 28]] * 5}, "from 1.5 to 1.5; pixel values must be 0 to 255"),
        ({"label": ["a", "a", None, None, None]}, "1 classes and 3 queries"),
        ({"label": ["a", 3, None, None, None]}, "label 3: |label a: "),
    ],
)
def test_wrong_files_and_words_are_one_line(served, change, reason):
    request = {"images": [base64.b64encode(file).decode() for file in drawings()], "label": [0, 1, -1, -1, -1]}
    with pytest.raises(import_mlflow().MlflowException, match=reason) as caught:
        answer(served, **(request | change))
    assert caught.value.get_http_status_code() == 400
    assert len(str(caught.value).splitlines()) == 1


FILE = base64.b64encode(drawings()[0]).decode()


@pytest.mark.mlflow
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"images": [], "label": []}, "there are no images; give labelled ones, and those to classify"),
        ({"images": [FILE] * 3}, "no label: give one per image, -1 or null"),
        ({"images": [FILE] * 3, "label": ["a"]}, "3 images and 1 labels; give one label per image"),
        ({"images": [FILE] * 3, "label": ["a", "b", "b"]}, "2 classes and 0 queries"),
        ({"images": [FILE], "label": [None]}, "0 classes and 1 queries"),
        ({"images": FILE, "label": "a"}, "1 classes and 0 queries"),
        (
            {"images": [None, FILE], "label": ["a", None]},
            "image 0 is no file, and others are; give files in",
        ),
    ],
)
def test_what_a_request_lacks_is_said_in_its_terms(served, request_, reason):
    """MLflow puts the values into one row if they are words or differ in number."""
    from mlflow.pyfunc import scoring_server

    body = json.dumps({"inputs": request_})
    with pytest.raises(import_mlflow().MlflowException, match=reason) as caught:
        scoring_server.invocations(body, "application/json", served, served.metadata.get_input_schema())
    assert caught.value.get_http_status_code() == 400


def files_of_all_kinds() -> dict[str, bytes]:
    """Images of every mode and form that a user may send."""
    rng = np.random.default_rng(5)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((90, 60))
    depth = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    alpha = small.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(small.size))
    turned = Image.Exif()
    turned[0x0112] = 6
    saved: dict[str, tuple[Image.Image, dict]] = {
        "16 bit.png": (depth, {}),
        "alpha.png": (alpha, {}),
        "bits.png": (small.convert("1"), {}),
        "cmyk.jpg": (small.convert("CMYK"), {}),
        "frames.gif": (small, {"save_all": True, "append_images": [small.rotate(90)]}),
        "palette.png": (small.quantize(16), {"transparency": 3}),
        "pages.tif": (small, {"save_all": True, "append_images": [small.rotate(90)]}),
        "turned.jpg": (small, {"exif": turned}),
        "web.webp": (small, {}),
    }
    files = {}
    for name, (image, options) in saved.items():
        stream = io.BytesIO()
        image.save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.rpartition(".")[2].upper()), **options)
        files[name] = stream.getvalue()
    return files


@pytest.mark.mlflow
@pytest.mark.parametrize("mode", ["transductive", "inductive"])
def test_files_of_all_kinds_get_the_probabilities_that_classify_gives(tmp_path, served, mode):
    files = files_of_all_kinds()
    for number, content in enumerate(drawings()[:3]):
        path = tmp_path / "support" / f"k{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "query").mkdir()
    for name, content in files.items():
        (tmp_path / "query" / name).write_bytes(content)
    model = served.unwrap_python_model().loaded
    found = classify_folders(model, tmp_path / "support", tmp_path / "query", options=ClassifyOptions(mode=mode))
    assert [row["query"] for row in found["queries"]] == sorted(files)
    expected = [[row["probabilities"][name] for name in found["classes"]] for row in found["queries"]]
    images = [drawings()[0], drawings()[2], drawings()[1], *(files[name] for name in sorted(files))]
    label = ["k0", "k0", "k1"] + [None] * len(files)
    request = {"images": [base64.b64encode(content).decode() for content in images], "label": label}
    np.testing.assert_array_equal(served.predict(request, {"mode": mode}), expected)
