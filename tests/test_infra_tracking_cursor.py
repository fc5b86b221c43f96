"""Which MLflow run a run folder is after it was copied or moved, and which store a command uses for it."""

import json
import os
import shutil

import mlflow_template
import pytest
from mlflow_template import ended_run

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.runs.folder_identity import FolderIdentity
from metagmvae.infra.runs.status import write_status
from metagmvae.infra.tracking.cursor import last_uri
from metagmvae.infra.tracking.run_tracker import track, tracking_settings
from metagmvae.infra.tracking.run_uploader import upload_run
from metagmvae.infra.tracking.store import connect, store_uri
from metagmvae.pipelines.records import DataError

pytestmark = pytest.mark.mlflow


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with a store and an uploaded run that was made there."""
    folder = tmp_path / "project"
    store = mlflow_template.new_store(folder / "runs" / "mlflow")
    run = ended_run(folder / "runs" / "first")
    write_status(run, "RUNNING")
    write_status(run, "FINISHED")
    upload_run(run, store)
    monkeypatch.chdir(folder)
    return folder


def run_id(run) -> str:
    return json.loads((run / "tracking.json").read_text())["run_id"]


def runs_in(folder) -> set[str]:
    client = connect(TrackingSettings(store=str(folder / "runs" / "mlflow"))).client
    return {run.info.run_id for run in client.search_runs(["1"])}


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_identity_of_a_folder_survives_a_move_but_not_a_copy(tmp_path):
    (tmp_path / "a").mkdir()
    identity = FolderIdentity.of(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert identity.is_here(tmp_path / "a")
    assert not identity.is_here(tmp_path / "copy")
    os.rename(tmp_path / "a", tmp_path / "b")
    assert identity.is_here(tmp_path / "b")
    assert not identity.is_here(tmp_path / "copy")
    assert not identity.model_copy(update={"host": "elsewhere"}).is_here(tmp_path / "b")
    in_container = identity.model_copy(update={"host": "other-pod", "path": str(tmp_path / "b")})
    assert in_container.is_here(tmp_path / "b")


def test_copied_run_is_a_run_of_its_own(project):
    first, second = project / "runs" / "first", project / "runs" / "second"
    shutil.copytree(first, second)
    report = track(second)
    assert report.metrics == 800  # everything is sent again
    assert runs_in(project) == {run_id(first), run_id(second)}
    assert track(second).run_id == report.run_id
    assert track(first).run_id == run_id(first) != report.run_id


def test_renamed_run_stays_the_same_run(project):
    before = run_id(project / "runs" / "first")
    os.rename(project / "runs" / "first", project / "runs" / "renamed")
    assert track(project / "runs" / "renamed").run_id == before
    assert runs_in(project) == {before}


@pytest.mark.parametrize("move", [os.rename, shutil.copytree])
def test_project_that_was_moved_or_copied_uses_its_own_store(project, tmp_path, move, monkeypatch):
    before = run_id(project / "runs" / "first")
    move(project, tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    edit(tmp_path / "new" / "runs" / "first" / "settings.json")
    (tmp_path / "new" / "runs" / "first" / "new.json").write_text("{}")
    report = track(tmp_path / "new" / "runs" / "first")
    assert (report.run_id, report.uri) == (before, f"sqlite:///{tmp_path}/new/runs/mlflow/mlflow.db")
    assert runs_in(tmp_path / "new") == {before}
    assert project.exists() == (move is shutil.copytree)
    if project.exists():
        client = connect(TrackingSettings(store=str(project / "runs" / "mlflow"))).client
        assert "new.json" not in {item.path for item in client.list_artifacts(before)}


def test_moved_project_is_found_from_another_folder(project, tmp_path, monkeypatch):
    os.rename(project, tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    assert track(tmp_path / "new" / "runs" / "first").uri == f"sqlite:///{tmp_path}/new/runs/mlflow/mlflow.db"
    assert not project.exists()
    assert not (tmp_path / "runs").exists()


def test_run_from_elsewhere_does_not_choose_the_store(project, tmp_path, monkeypatch, caplog):
    """Its settings and its cursor name a server and another program's database; neither is used."""
    foreign = tmp_path / "foreign"
    shutil.copytree(project / "runs" / "first", foreign)
    victim = tmp_path / "victim.db"
    settings = json.loads((foreign / "settings.json").read_text())
    settings["tracking"] |= {"uri": "http://127.0.0.1:9", "store": str(tmp_path / "store")}
    (foreign / "settings.json").write_text(json.dumps(settings))
    cursor = json.loads((foreign / "tracking.json").read_text())
    (entry,) = cursor["stores"].values()
    edit(foreign / "tracking.json", uri=f"sqlite:///{victim}", stores={f"sqlite:///{victim}": entry})
    here = f"sqlite:///{project}/runs/mlflow/mlflow.db"
    assert store_uri(tracking_settings(foreign)) == here
    assert f"its MLflow store is {here} here, not sqlite:///{victim}" in caplog.text
    assert track(foreign).uri == here
    assert not victim.exists()
    assert not (tmp_path / "store").exists()
    assert len(runs_in(project)) == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mine.db")
    assert store_uri(tracking_settings(foreign)) == f"sqlite:///{tmp_path}/mine.db"


def test_environment_counts_over_the_settings_of_a_run_made_here(project, tmp_path, monkeypatch):
    run = project / "runs" / "first"
    assert last_uri(run) == f"sqlite:///{project}/runs/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mine.db")
    assert store_uri(tracking_settings(run)) == f"sqlite:///{tmp_path}/mine.db"


def test_two_spellings_of_a_store_are_one_store(project, monkeypatch):
    run = project / "runs" / "first"
    (project / "link").symlink_to(project / "runs")
    for uri in ("sqlite:///runs/mlflow/mlflow.db", f"sqlite:///{project}/runs/../link/mlflow/mlflow.db"):
        assert track(run, uri).run_id == run_id(run)
    assert len(runs_in(project)) == 1
    cursor = json.loads((run / "tracking.json").read_text())
    (key,) = cursor["stores"]
    cursor["stores"] = {f"sqlite:///{project}/link/mlflow/mlflow.db": cursor["stores"][key]}  # of an older version
    (run / "tracking.json").write_text(json.dumps(cursor))
    assert track(run).metrics == 0


def test_missing_store_is_not_created_by_a_command_that_only_adds_to_it(project):
    shutil.rmtree(project / "runs" / "mlflow")
    with pytest.raises(DataError, match="no MLflow store at"):
        track(project / "runs" / "first", create=False)
    assert not (project / "runs" / "mlflow").exists()
