"""Names that MLflow refuses are refused with the settings; stored settings of older versions are still read."""

import json

import pytest

from metagmvae.configs.load import SettingsError, load_settings, settings_from_json, to_json
from metagmvae.configs.schema import Settings, TrackingSettings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("alias", alias) for alias in ("latest", "Latest", "v1", "V22", "a.b", "a/b", "a b", "x" * 256)),
        *(("register_as", name) for name in ("a/b", "a:b", "..", ".", " ", "a@b", "a'b", "x" * 241, "a\nb")),
        *(("experiment", name) for name in ("", "  ", "x" * 501, "a\x1b[2J")),
        *(("uri", uri) for uri in ("127.0.0.1:5000", "localhost:5000/", "mlflow.example.org:80/a", "[::1]:5000")),
    ],
)
def test_what_mlflow_refuses_is_a_wrong_setting(key, value):
    with pytest.raises(SettingsError, match=rf"^tracking\.{key}: ") as refused:
        load_settings("omniglot-cpu", [f"tracking.{key}={json.dumps(value)}"])
    assert "\n" not in str(refused.value)
    if key == "uri":
        assert f"write http://{value}" in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alias", ""),
        ("alias", "best_one-2"),
        ("register_as", ""),
        ("register_as", "omniglot 5.way"),
        ("experiment", "group/omniglot"),
        ("uri", "http://127.0.0.1:5000"),
        ("uri", "sqlite:///runs/a.db"),
        ("uri", "databricks"),
    ],
)
def test_what_mlflow_accepts_is_accepted(key, value):
    settings = load_settings("omniglot-cpu", [f"tracking.{key}={json.dumps(value)}"])
    assert getattr(settings.tracking, key) == value


@pytest.mark.parametrize("folder", ["mlruns", "/a/mlruns", "file:///a/mlruns", "file:/a/mlruns", "./mlruns"])
def test_folder_is_refused_as_mlflow_refuses_it(folder, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    path = "mlruns" if folder in ("mlruns", "./mlruns") else "/a/mlruns"
    with pytest.raises(
        SettingsError, match=rf"no longer opens a folder; write sqlite:///{path}/mlflow\.db, or set MLFLOW"
    ):
        load_settings("omniglot-cpu", [f"tracking.uri={folder}"])
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert load_settings("omniglot-cpu", [f"tracking.uri={folder}"]).tracking.uri == folder


@pytest.mark.mlflow
def test_mlflow_refuses_a_folder(tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(MlflowException, match="maintenance mode"):
        MlflowClient(str(tmp_path)).search_experiments()


def test_settings_that_an_older_version_stored_are_read():
    stored = json.loads(to_json(Settings()))
    stored["tracking"] |= {"alias": "v1", "register_as": "a/b", "experiment": ""}
    assert settings_from_json(json.dumps(stored)).tracking.register_as == "a/b"


def test_experiment_of_the_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert TrackingSettings().experiment == "mine"
    assert TrackingSettings(experiment="given").experiment == "given"
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    assert TrackingSettings().experiment == "metagmvae"
