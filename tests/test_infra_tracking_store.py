"""Choice of the MLflow store, its creation, and its adaptation after it was moved or copied."""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow_template
import pytest

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.tracking import mlflow_environment
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.sqlite_store import LOCATIONS, sqlite_path, sqlite_uri
from metagmvae.infra.tracking.store import connect, experiment_id, store_key, store_uri
from metagmvae.pipelines.records import DataError


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("http://LocalHost:5000/", "http://127.0.0.1:5000"),
        ("http://[::1]:5000", "http://127.0.0.1:5000"),
        ("HTTP://127.0.0.1:5000//", "http://127.0.0.1:5000"),
        ("https://user:secret@Host:443/a/", "https://host/a"),
        ("http://host:80", "http://host"),
        ("http://host:8080/Path", "http://host:8080/Path"),
        ("sqlite:////x/../tmp//a.db", "sqlite:////tmp/a.db"),
        ("sqlite:////tmp/a%2520b.db", "sqlite+pysqlite:////tmp/a%2520b.db"),
        ("file:///tmp/a/", "/tmp/a"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_all_spellings_of_a_store_have_one_key(uri, key):
    assert store_key(uri) == key == store_key(key)


def test_relative_paths_name_the_store_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    keys = {store_key(uri) for uri in ("sqlite:///a.db", f"sqlite:///{tmp_path}/a.db", "sqlite:///link/a.db")}
    assert keys == {f"sqlite:///{tmp_path}/a.db"}
    assert store_uri(TrackingSettings(uri="sqlite:///a.db")) == f"sqlite:///{tmp_path}/a.db"


@pytest.mark.parametrize("name", ["plain", "a%20b", "50%", "a?b=c", "a#b", "a b", "~", "ä&+;"])
def test_path_of_any_name_survives_the_uri(tmp_path, name):
    path = tmp_path / name / "mlflow.db"
    path.parent.mkdir()
    assert sqlite_path(sqlite_uri(path)) == path
    assert sqlite_path(f"sqlite:///{path}") == path  # as a shell writes it: sqlite:///$PWD/…


def test_host_without_scheme_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "127.0.0.1:5000")
    with pytest.raises(DataError, match=r"write http://127\.0\.0\.1:5000"):
        store_uri(TrackingSettings())


def test_variables_that_are_not_used_are_named_once(monkeypatch, caplog):
    mlflow_environment.name_unused_variables.cache_clear()
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://h/")
    with caplog.at_level(logging.WARNING):
        mlflow_environment.name_unused_variables("http://h")
        mlflow_environment.name_unused_variables("http://h")
    (record,) = caplog.records
    assert "MLFLOW_RUN_ID (each run folder is" in record.message
    assert "MLFLOW_REGISTRY_URI" not in record.message  # it is the tracking URI
    mlflow_environment.name_unused_variables.cache_clear()


def filled_store(folder: Path) -> tuple[TrackingSettings, str]:
    """A store with a file in a run, and a registered version."""
    tracking = mlflow_template.new_store(folder)
    store = connect(tracking)
    run = store.client.create_run(experiment_id(store, "x"))
    (folder / "file.txt").write_text("content")
    store.client.log_artifact(run.info.run_id, str(folder / "file.txt"), "sub")
    store.client.create_registered_model("model")
    store.client.create_model_version("model", run.info.artifact_uri, run_id=run.info.run_id, await_creation_for=0)
    return tracking, run.info.run_id


def locations(folder: Path) -> set[str]:
    """All locations of artifacts in a store, without that of MLflow's own first experiment."""
    database = sqlite3.connect(folder / "mlflow.db")
    found = {row[0] for table, column in LOCATIONS for row in database.execute(f"SELECT {column} FROM {table}")}
    database.close()
    return {location for location in found if location and not location.endswith("mlruns/0")}


@pytest.mark.mlflow
@pytest.mark.parametrize("name", ["here", "a%20b?c#d ~"])
def test_moved_store_is_adapted(tmp_path, name, caplog):
    _, run_id = filled_store(tmp_path / "before" / "mlflow")
    shutil.move(tmp_path / "before", tmp_path / name)
    folder = tmp_path / name / "mlflow"
    with caplog.at_level(logging.WARNING):
        client = connect(TrackingSettings(store=str(folder))).client
    assert "was moved or copied from" in caplog.text
    assert not any("before" in location for location in locations(folder))
    assert Path(client.download_artifacts(run_id, "sub/file.txt")).read_text() == "content"
    assert "before" not in client.get_model_version_download_uri("model", "1")
    assert not (tmp_path / "before").exists()
    caplog.clear()
    connect(TrackingSettings(store=str(folder)))
    assert not caplog.records


@pytest.mark.mlflow
def test_copied_store_leaves_the_original_alone(tmp_path):
    original, run_id = filled_store(tmp_path / "original")
    before = locations(tmp_path / "original")
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    client = connect(TrackingSettings(store=str(tmp_path / "copy"))).client
    (tmp_path / "new.txt").write_text("new")
    client.log_artifact(run_id, str(tmp_path / "new.txt"))
    assert all(location.startswith(str(tmp_path / "copy")) for location in locations(tmp_path / "copy"))
    assert locations(tmp_path / "original") == before
    assert [item.path for item in connect(original).client.list_artifacts(run_id)] == ["sub"]


@pytest.mark.mlflow
def test_database_without_its_artifacts_is_refused_and_unchanged(tmp_path):
    filled_store(tmp_path / "original")
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "original" / "mlflow.db", tmp_path / "copy")
    with pytest.raises(TrackingError, match=r"lies apart from its artifacts, which were in .*/original/artifacts"):
        connect(TrackingSettings(store=str(tmp_path / "copy")))
    assert locations(tmp_path / "copy") == locations(tmp_path / "original")


@pytest.mark.mlflow
def test_artifacts_that_were_put_elsewhere_stay_there(tmp_path):
    tracking = mlflow_template.new_store(tmp_path / "store")
    (tmp_path / "disk" / "artifacts").mkdir(parents=True)
    client = connect(tracking).client
    client.create_experiment("other disk", artifact_location=str(tmp_path / "disk" / "artifacts"))
    client.create_experiment("bucket", artifact_location="s3://bucket/artifacts")
    connect(tracking)
    assert locations(tmp_path / "store") == {str(tmp_path / "disk" / "artifacts"), "s3://bucket/artifacts"}


@pytest.mark.mlflow
def test_database_of_another_program_is_not_touched(tmp_path):
    path = tmp_path / "other.db"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE mail (text)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(TrackingError, match="not an MLflow store"):
        connect(TrackingSettings(uri=f"sqlite:///{path}"))
    assert path.read_bytes() == before


@pytest.mark.mlflow
@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + b"x" * 1000])
def test_file_that_is_no_database_is_one_line(tmp_path, content):
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(TrackingError) as refused:
        connect(TrackingSettings(store=str(tmp_path)))
    assert "\n" not in str(refused.value)


@pytest.mark.mlflow
def test_locked_database_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("metagmvae.infra.tracking.sqlite_store.PATIENCE_S", 0.1)
    tracking = mlflow_template.new_store(tmp_path / "store")
    database = sqlite3.connect(tmp_path / "store" / "mlflow.db", isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TrackingError, match="database is locked; another process holds it"):
        connect(tracking)
    database.close()


@pytest.mark.mlflow
def test_database_that_cannot_be_written_is_one_line_without_log(tmp_path, monkeypatch, capfd):
    """It is opened read-only: permissions do not bind the user root."""
    monkeypatch.chdir(tmp_path)
    mlflow_template.new_store(tmp_path / "store")
    read_only = TrackingSettings(uri=f"sqlite:///file:{tmp_path}/store/mlflow.db?mode=ro&uri=true")
    with pytest.raises(TrackingError, match="attempt to write a readonly database; check the permissions") as refused:
        experiment_id(connect(read_only), "new")
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.mlflow
@pytest.mark.slow
def test_processes_that_open_a_new_store_at_once_all_start(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".mlflow.db.new").write_bytes(b"left by a process that was killed")
    code = (
        "from metagmvae.configs.schema import TrackingSettings; from metagmvae.infra.tracking.store import *; "
        f"print(experiment_id(connect(TrackingSettings(store={str(tmp_path / 'store')!r})), 'x'))"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd="/")
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [(out.strip(), err) for out, err in answers] == [("1", "")] * 3
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
