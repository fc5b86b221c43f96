"""Models by reference: which ones load, what the error says, and which files are refused."""

import json
import pickle
from pathlib import Path

import mlflow_template
import pytest
import torch
from calibrations import fits

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.registry.register import register
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.tracking.store import connect
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.posterior_calibration import write_calibration
from metagmvae.training.trainer.package import load_model, save_package

pytestmark = pytest.mark.mlflow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return mlflow_template.new_run(tmp_path_factory.mktemp("runs") / "tiny run")


@pytest.fixture(scope="module")
def uri(run, tmp_path_factory):
    """URI of a store with versions 1 (alias `champion`) and 2 of `few-shot`."""
    store = mlflow_template.new_store(tmp_path_factory.mktemp("mlflow") / "store")
    register(run, store, "few-shot", "champion")
    register(run, store, "few-shot", "")
    return connect(store).uri


def has_weights_of(loaded, run) -> bool:
    reference = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    weights = loaded.model.state_dict()
    return weights.keys() == reference.keys() and all(torch.equal(weights[k], reference[k]) for k in weights)


@pytest.mark.parametrize("ref", ["models:/few-shot@champion", "models:/few-shot/2"])
def test_registered_models(uri, run, ref):
    loaded = resolve_model(ref, tracking_uri=uri)
    assert has_weights_of(loaded, run)
    assert tuple(loaded.image_shape) == mlflow_template.IMAGE_SHAPE


def test_the_calibration_travels_into_the_registry_and_with_the_run(tmp_path):
    run = mlflow_template.new_run(tmp_path / "run")
    record = fits(2.5, adapt=load_model(run).settings.adapt)
    write_calibration(run, [(load_model(run).model, record)])
    store = mlflow_template.new_store(tmp_path / "store")
    uri = connect(store).uri
    register(run, store, "calibrated", "champion")
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    for ref in ("models:/calibrated@champion", f"runs:/{run_id}"):
        assert resolve_model(ref, tracking_uri=uri).calibration == record


def test_environment_variable_names_the_store(uri, run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert has_weights_of(resolve_model("models:/few-shot@champion"), run)


def test_runs(uri, run):
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    assert has_weights_of(resolve_model(f"runs:/{run_id}", tracking_uri=uri), run)
    assert has_weights_of(resolve_model(f"runs:/{run_id}/checkpoint.pt", tracking_uri=uri), run)
    with pytest.raises(DataError, match=r"no best\.pt in that run; it has: .*checkpoint\.pt"):
        resolve_model(f"runs:/{run_id}/best.pt", tracking_uri=uri)
    with pytest.raises(DataError, match="no such run"):
        resolve_model("runs:/00000000000000000000000000000000", tracking_uri=uri)


def test_paths(run, tmp_path):
    save_package(tmp_path / "package", resolve_model(run))
    assert has_weights_of(resolve_model(tmp_path / "package"), run)
    assert has_weights_of(resolve_model(str(run / "checkpoint.pt")), run)
    with pytest.raises(DataError, match=r"no such model; give models:/NAME@ALIAS"):
        resolve_model(tmp_path / "nothing")


UNKNOWN = [
    ("models:/other@champion", r"no registered model 'other' in sqlite.*; it has: few-shot"),
    (
        "models:/few-shot@best",
        r"no such version; versions of few-shot: 1, 2; aliases: champion -> 1",
    ),
    ("models:/few-shot/3", r"versions of few-shot: 1, 2"),
    ("models:/few-shot", r"not a model reference; give models:/NAME@ALIAS"),
    ("models:/few-shot/latest/x", r"not a model reference"),
    ("runs:/", r"not a model reference"),
]


@pytest.mark.parametrize(("ref", "reason"), UNKNOWN)
def test_error_for_an_unknown_reference_lists_the_existing_ones(uri, ref, reason):
    with pytest.raises(DataError, match=reason) as caught:
        resolve_model(ref, tracking_uri=uri)
    assert "\n" not in str(caught.value)


def test_resolving_creates_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no MLflow store at .*runs/mlflow"):
        resolve_model("models:/x@champion")
    assert list(tmp_path.iterdir()) == []


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def register_files(uri: str, source: Path) -> None:
    client = connect(TrackingSettings(uri=uri)).client
    client.create_registered_model(source.name)
    client.create_model_version(source.name, str(source))


def test_pickled_model_is_refused(uri, tmp_path):
    """An MLflow model of another program, as written by `log_model(python_model=object)`."""
    source, marker = tmp_path / "foreign", tmp_path / "executed"
    source.mkdir()
    (source / "MLmodel").write_text("flavors: {python_function: {python_model: python_model.pkl}}")
    (source / "python_model.pkl").write_bytes(pickle.dumps(Hostile(marker)))
    register_files(uri, source)
    with pytest.raises(DataError, match=r"not a model that metagmvae registered .*python_model\.pkl"):
        resolve_model("models:/foreign/1", tracking_uri=uri)
    assert not marker.exists()


def test_pickle_with_the_file_name_of_the_weights_is_refused(uri, run, tmp_path):
    source, marker = tmp_path / "disguised", tmp_path / "executed"
    save_package(source / "artifacts" / "package", resolve_model(run))
    weights = source / "artifacts" / "package" / "model.safetensors"
    weights.write_bytes(pickle.dumps(Hostile(marker)))
    register_files(uri, source)
    with pytest.raises(ValueError, match="safetensors"):
        resolve_model("models:/disguised/1", tracking_uri=uri)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_version_that_has_lost_a_file_is_named_with_the_way_out(uri, run, tmp_path, name):
    source = tmp_path / f"lost-{name[6:]}"
    save_package(source / "artifacts" / "package", resolve_model(run))
    (source / "artifacts" / "package" / name).unlink()
    register_files(uri, source)
    with pytest.raises(DataError, match=rf"package has lost {name}: restore it, or register .* deleted in MLflow"):
        resolve_model(f"models:/{source.name}/1", tracking_uri=uri)
