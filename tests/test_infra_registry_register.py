"""A run is registered as an MLflow model without pickled code, which MLflow loads and serves."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mlflow_template
import numpy as np
import pytest
import torch

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.infra.registry.alias_history import read_history
from metagmvae.infra.registry.register import register
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.tracking.run_uploader import upload_run
from metagmvae.infra.tracking.store import connect
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.trainer.checkpoint import load_state

pytestmark = pytest.mark.mlflow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return mlflow_template.new_run(tmp_path_factory.mktemp("runs") / "tiny run")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return mlflow_template.new_store(tmp_path_factory.mktemp("mlflow") / "store")


@pytest.fixture(scope="module")
def registered(run, store):
    return register(run, store, "few-shot", "champion", results={"5w1s": {"accuracy": 0.5, "ci95": 0.01}})


@pytest.fixture(autouse=True)
def _store_of_the_process(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", connect(store).uri)


def request_arrays() -> dict[str, np.ndarray]:
    """A request with 2 classes, 2 shots and 3 queries in mixed order."""
    images = np.random.default_rng(3).integers(0, 256, (7, *mlflow_template.IMAGE_SHAPE), dtype=np.uint8)
    return {"images": images, "label": np.array([-1, 4, 1, -1, 1, 4, -1])}


def expected(run, params: dict) -> np.ndarray:
    """The same prediction, made from the run folder without MLflow."""
    loaded = resolve_model(run)
    request, device = request_arrays(), torch.device("cpu")
    rows = [2, 4, 1, 5, 0, 3, 6]  # label 1, label 4, queries
    h_nF = encode_images(loaded.model, request["images"][rows], device)
    adapt = loaded.settings.adapt.model_copy(
        update={key: params[key] for key in ("iterations", "samples") if key in params}
    )
    mode, seed = params.get("mode", "transductive"), params.get("seed", 0)
    labels = np.array([0, 0, 1, 1])
    return np.asarray(predict_queries(loaded.model, adapt, h_nF[:4], labels, h_nF[4:], mode=mode, seed=seed))


def served(body: dict) -> np.ndarray:
    """The answer of MLflow's scoring server to this JSON."""
    mlflow = import_mlflow()
    from mlflow.pyfunc import scoring_server

    model = mlflow.pyfunc.load_model("models:/few-shot@champion")
    schema = model.metadata.get_input_schema()
    response = scoring_server.invocations(json.dumps(body), "application/json", model, schema)
    assert response.status == 200
    return np.array(json.loads(response.response)["predictions"])


def lists(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    return {key: value.tolist() for key, value in arrays.items()}


def test_version_has_tags_and_alias(registered, run, store):
    assert (registered.name, registered.version, registered.alias) == ("few-shot", "1", "champion")
    client = connect(store).client
    version = client.get_model_version_by_alias("few-shot", "champion")
    assert version.version == 1 or version.version == "1"
    assert version.tags["data_fingerprint"] == mlflow_template.DATA_FINGERPRINT
    assert version.tags["results.5w1s.accuracy"] == "0.5"
    assert version.tags["results.5w1s.ci95"] == "0.01"
    assert version.tags["run_id"] == version.run_id == upload_run(run, store).run_id


def test_no_pickled_file_is_logged(registered, store):
    client = connect(store).client
    root = Path(client.get_model_version_download_uri("few-shot", registered.version))
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    assert files == [
        "MLmodel",
        "artifacts/package/model.json",
        "artifacts/package/model.safetensors",
        f"code/metagmvae-{metadata.version('metagmvae')}-py3-none-any.whl",
        "conda.yaml",
        "input_example.json",
        "pyfunc_entry.py",
        "python_env.yaml",
        "requirements.txt",
        "serving_input_example.json",
    ]
    assert "cloudpickle" not in (root / "requirements.txt").read_text()


def test_registering_again_creates_the_next_version_and_moves_the_alias(run, tmp_path):
    own = mlflow_template.new_store(tmp_path / "own")
    assert register(run, own, "x", "champion").uri == "models:/x/1"
    second = register(run, own, "x", "champion")
    assert second.uri == "models:/x/2"
    assert register(run, own, "x", "").alias == ""
    client = connect(own).client
    assert str(client.get_model_version_by_alias("x", "champion").version) == "2"
    assert len(client.search_runs(["1"])) == 1


def test_default_alias_is_given_to_the_first_version_only(run, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    own = mlflow_template.new_store(tmp_path / "own").model_copy(update={"register_as": "x"})
    assert register(run, own).alias == "champion"
    assert register(run, own).alias == ""
    assert register(run, own.model_copy(update={"alias": ""}), "y").alias == ""
    client = connect(own).client
    assert str(client.get_model_version_by_alias("x", "champion").version) == "1"
    (change,) = read_history(connect(own), "x")
    assert (change.action, change.version, change.former) == ("registered", "1", None)


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", "it's", 'a"b'])
def test_invalid_name_is_refused_before_anything_is_sent(run, tmp_path, monkeypatch, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    own = mlflow_template.new_store(tmp_path / "own")
    with pytest.raises(DataError, match="not a valid name for a registered model"):
        register(run, own, name)
    assert not connect(own).client.search_experiments(filter_string="name = 'metagmvae'")


def test_missing_name_and_missing_model_are_errors(run, store, tmp_path):
    with pytest.raises(DataError, match=r"tracking\.register_as"):
        register(run, store)
    (tmp_path / "settings.json").write_text(Settings().model_dump_json())
    with pytest.raises(ValueError, match="checkpoint"):
        register(tmp_path, store, "x")


@pytest.mark.parametrize("params", [{}, {"mode": "inductive", "iterations": 2, "samples": 8, "seed": 5}])
def test_served_request_gives_the_same_probabilities(registered, run, params):
    answer = served({"inputs": lists(request_arrays()), "params": params})
    assert answer.shape == (3, 2)
    np.testing.assert_allclose(answer.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(answer, expected(run, params), rtol=1e-5, atol=1e-7)


LOAD_AND_PREDICT = """
import json, sys
import mlflow
import numpy as np
assert "infra" not in sys.modules
arrays = np.load(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/few-shot@champion")
answer = model.predict({"images": arrays["images"], "label": arrays["label"]}, params={"seed": 2})
print(json.dumps([str(answer.dtype), answer.tolist()]))
"""


def test_model_loads_in_a_process_outside_the_repository(registered, run, tmp_path):
    """The package is installed; the working directory is another one."""
    np.savez(tmp_path / "request.npz", **request_arrays())
    command = [sys.executable, "-c", LOAD_AND_PREDICT, str(tmp_path / "request.npz")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kind, answer = json.loads(done.stdout)
    assert kind == "float64"
    np.testing.assert_allclose(answer, expected(run, {"seed": 2}), rtol=1e-5, atol=1e-7)


WRONG = [
    ({"label": [0, 0, 1, 0, 1, 1, 1]}, {}, r"2 classes and 0 queries"),
    ({"label": [-1, 0, 0, -1, 0, 0, -1]}, {}, r"1 classes and 3 queries"),
    ({"label": [-2, 0, 1, -1, 1, 0, -1]}, {}, r"label -2"),
    ({"label": [0, 1, -1]}, {}, r"same length"),
    ({"label": [0, "a", 1, 1, -1, -1, -1]}, {}, r"label a: labels must be words, or integers"),
    ({"label": [0, 1, 1.5, -1, -1, -1, -1]}, {}, r"label 1.5: labels must be"),
    ({"images": (np.ones((7, 1, 28, 28)) * 0.9).tolist()}, {}, r"pixel values must be 0 to 255"),
    ({"images": np.full((7, 1, 28, 28), 300).tolist()}, {}, r"from 300 to 300; pixel values must be 0 to 255"),
    ({"images": np.ones((7, 3, 28, 28), int).tolist()}, {}, r"images are int64 \(7, 3, 28, 28\)"),
    ({"images": ["no image"] * 7}, {}, r"does not record the preprocessing"),
    ({}, {"mode": "both"}, r"transductive or inductive"),
    ({}, {"iterations": 0}, r"iterations is 0"),
]


@pytest.mark.parametrize(("inputs", "params", "reason"), WRONG)
def test_invalid_request_is_refused_with_the_reason(registered, inputs, params, reason):
    mlflow = import_mlflow()
    body = {"inputs": {**lists(request_arrays()), **inputs}, "params": params}
    with pytest.raises(mlflow.MlflowException, match=reason) as caught:
        served(body)
    assert caught.value.get_http_status_code() == 400


def test_best_model_of_a_shot_is_registered(tmp_path, store):
    run = mlflow_template.new_run(tmp_path / "run", best_by_shot=(1, 5))
    register(run, store, "by-shot", "five", shot=5)
    tags = connect(store).client.get_model_version_by_alias("by-shot", "five").tags
    assert (tags["shot"], tags["selected_by"], tags["validation_accuracy"]) == ("5", "validation/5w5s", "0.5")
    weights = resolve_model("models:/by-shot@five").model.state_dict()
    best = load_state(run / "checkpoint.pt")["best"]["5w5s"]["model"]
    assert all(torch.equal(weights[key], best[key]) for key in best)
    assert not all(
        torch.equal(weights[key], value) for key, value in load_state(run / "checkpoint.pt")["model"].items()
    )


def test_server_answers_over_http(registered, run, tmp_path):
    """`mlflow models serve`: status 200 with probabilities, 400 with the reason."""
    port = mlflow_template.closed_port()
    words = ["models", "serve", "--model-uri", "models:/few-shot@champion", "--env-manager", "local"]
    with mlflow_template.run_mlflow(tmp_path, port, *words):
        body = {"inputs": lists(request_arrays()), "params": {"mode": "inductive"}}
        status, answer = mlflow_template.post(port, body)
        assert status == 200
        np.testing.assert_allclose(answer["predictions"], expected(run, {"mode": "inductive"}), rtol=1e-5, atol=1e-7)
        status, answer = mlflow_template.post(port, {"inputs": {**body["inputs"], "label": [-1, 0, 0, -1, 0, 0, -1]}})
        assert status == 400
        assert "1 classes and 3 queries" in answer["message"]
