"""Upload of a run folder to MLflow: complete, and each value once in spite of interruptions."""

import json

import mlflow_template
import pytest
from mlflow_template import STARTED_MS, VALUES, ended_run, history, line

from metagmvae.configs.schema import Settings, TrackingSettings
from metagmvae.infra.runs.status import write_status
from metagmvae.infra.tracking import run_uploader
from metagmvae.infra.tracking.cursor import upload_lock
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.run_tracker import track
from metagmvae.infra.tracking.run_uploader import upload_run
from metagmvae.infra.tracking.store import connect, store_uri
from metagmvae.pipelines.records import DataError

pytestmark = pytest.mark.mlflow


@pytest.fixture
def run(tmp_path):
    return ended_run(tmp_path / "runs" / "five way")


def test_uploads_the_whole_run(run, store):
    report = upload_run(run, store)
    client = connect(store).client
    sent = client.get_run(report.run_id)
    assert (report.metrics, report.status) == (200 * 4, "FINISHED")  # loss, elbo, images_per_s, elapsed_s
    assert history(store, report.run_id, "loss") == [
        (step, 1000.0 - step, STARTED_MS + 500 * step) for step in range(1, 201)
    ]
    assert set(sent.data.metrics) == {*VALUES, "elapsed_s"}
    assert sent.data.params["train.batch"] == "4"
    assert sent.data.params["validation.shots"] == "[1, 5]"
    assert not any(key.startswith(("run.", "tracking.")) for key in sent.data.params)
    assert sent.data.tags["run.engine"] == sent.data.tags["engine"] == "local"
    assert sent.data.tags["data_fingerprint"] == "d" * 64
    assert sent.data.tags["mlflow.source.git.commit"] == "c0ffee"
    assert (sent.info.status, sent.info.start_time) == ("FINISHED", STARTED_MS)
    assert sent.info.end_time == STARTED_MS + 100_000
    assert sent.info.run_name == "five way"
    files = {item.path for item in client.list_artifacts(report.run_id)}
    assert files == {"settings.json", "run.json", "metrics.jsonl", "checkpoint.pt", "figures"}
    assert [item.path for item in client.list_artifacts(report.run_id, "figures")] == ["figures/curves.png"]


def test_second_upload_sends_nothing(run, store):
    first = upload_run(run, store)
    second = upload_run(run, store)
    assert (second.run_id, second.metrics, second.artifacts) == (first.run_id, 0, [])
    assert len(history(store, first.run_id, "loss")) == 200


def test_batch_sent_twice_is_stored_once(run, store):
    """After a crash between the store's answer and the write of the cursor, the cursor is empty."""
    first = upload_run(run, store)
    cursor = json.loads((run / "tracking.json").read_text())
    entry = cursor["stores"][store_uri(store)]
    cursor["stores"][store_uri(store)] = {**entry, "run_id": None, "lines": {}, "artifacts": {}}
    (run / "tracking.json").write_text(json.dumps(cursor))
    second = upload_run(run, store)
    assert second.run_id == first.run_id
    assert second.metrics == first.metrics
    assert len(history(store, first.run_id, "loss")) == 200
    assert len(connect(store).client.search_runs(["1"])) == 1


def test_interrupted_upload_is_completed_later(run, store, monkeypatch):
    """The store fails after two batches; the cursor records these two, and the next upload sends only the rest."""
    monkeypatch.setattr(run_uploader, "METRICS_PER_BATCH", 100)
    client = connect(store).client
    accepted = []
    real = type(client).log_batch

    def failing(self, run_id, metrics=(), params=(), tags=(), **options):
        if metrics:
            if len(accepted) == 2:
                raise ConnectionError("gone")
            accepted.append(len(metrics))
        return real(self, run_id, metrics, params, tags, **options)

    monkeypatch.setattr(type(client), "log_batch", failing)
    with pytest.raises(TrackingError, match="gone"):
        upload_run(run, store)
    monkeypatch.setattr(type(client), "log_batch", real)
    cursor = json.loads((run / "tracking.json").read_text())
    assert cursor["stores"][cursor["uri"]]["lines"]["metrics.jsonl"]["lines"] == 50
    rest = upload_run(run, store)
    assert rest.metrics == 800 - sum(accepted) == 600
    assert len(history(store, rest.run_id, "elbo")) == 200


def test_repeated_request_creates_one_run(run, store, monkeypatch):
    mlflow_template.repeat_requests(monkeypatch, "create_run")
    sent = upload_run(run, store)
    client = connect(store).client
    experiment = client.get_run(sent.run_id).info.experiment_id
    assert [found.info.run_id for found in client.search_runs([experiment])] == [sent.run_id]


def test_broken_line_is_named(run, store):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{half\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 201: not a metric line"):
        upload_run(run, store)


def test_resumed_run_uses_the_same_mlflow_run(run, store):
    first = upload_run(run, store)
    write_status(run, "RUNNING")
    settings = Settings.model_validate_json((run / "settings.json").read_text())
    workers = settings.model_copy(update={"run": settings.run.model_copy(update={"workers": 4})})
    (run / "settings.json").write_text(workers.model_dump_json())
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line(201, steps=201))
    second = upload_run(run, store)
    going = connect(store).client.get_run(second.run_id)
    assert (second.run_id, second.metrics) == (first.run_id, 4)
    assert going.info.status == "RUNNING"
    assert going.data.tags["run.workers"] == "4"
    write_status(run, "FAILED")
    upload_run(run, store)
    ended = connect(store).client.get_run(second.run_id).info
    assert (ended.status, ended.start_time) == ("FAILED", STARTED_MS)


def test_track_uses_the_previous_store_from_any_folder(run, store, tmp_path, monkeypatch):
    """The settings name the default store, a path relative to the working directory of the training."""
    first = upload_run(run, store)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line(201, steps=201))
    monkeypatch.chdir(tmp_path)
    again = track(run)
    assert (again.run_id, again.uri, again.metrics) == (first.run_id, store_uri(store), 4)
    assert track(run, uri=store_uri(mlflow_template.new_store(tmp_path / "other"))).metrics == 804


def test_run_deleted_on_the_server_is_an_error(run, store):
    report = upload_run(run, store)
    connect(store).client.delete_run(report.run_id)
    with pytest.raises(TrackingError, match=r"was deleted there; restore it, or delete .*tracking\.json"):
        upload_run(run, store)


def test_simultaneous_uploads_are_refused(run, store):
    with upload_lock(run), pytest.raises(TrackingError, match="another process is uploading it to MLflow"):
        upload_run(run, store)


def test_folder_without_settings_is_an_error(tmp_path, store):
    with pytest.raises(DataError, match=r"not a run folder \(no settings\.json\)"):
        upload_run(tmp_path, store)
    with pytest.raises(DataError, match="not a run folder"):
        track(tmp_path)


def test_store_folder_that_cannot_be_created_is_an_error(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match=r"tracking\.store"):
        upload_run(run, TrackingSettings(store=str(tmp_path / "file" / "store")))
