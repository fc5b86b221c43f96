"""Live upload of a training run, and servers that are down, silent, or started late."""

import json
import socket
import threading
import time
from pathlib import Path

import mlflow_template
import pytest
from mlflow_template import closed_port, ended_run, history, line

from metagmvae.configs.credentials import redact
from metagmvae.configs.schema import Settings, TrackingSettings
from metagmvae.infra.registry.register import register
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.runs.status import read_status
from metagmvae.infra.tracking.live_tracker import LiveTracker
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.run_tracker import RunTracker
from metagmvae.infra.tracking.run_uploader import upload_run
from metagmvae.infra.tracking.store import connect

pytestmark = pytest.mark.mlflow


def new_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(Settings().model_dump_json())
    return folder


def test_uploads_during_training_and_at_its_end(tmp_path, store):
    run = new_run(tmp_path / "run")
    with RunTracker(run, store, interval_s=0.05):
        for step in range(1, 4):
            with (run / "metrics.jsonl").open("a") as file:
                file.write(line(step, steps=3))
        while not (run / "tracking.json").exists() or "metrics.jsonl" not in (run / "tracking.json").read_text():
            time.sleep(0.02)  # until the metrics are uploaded, while the block still runs
        (run / "checkpoint.pt").write_bytes(b"last")
    cursor = json.loads((run / "tracking.json").read_text())
    sent = connect(store).client.get_run(cursor["run_id"])
    assert sent.info.status == "FINISHED"
    assert len(history(store, cursor["run_id"], "loss")) == 3
    assert sent.data.metrics["system/system_memory_usage_percentage"] > 0
    assert "checkpoint.pt" in cursor["stores"][cursor["uri"]]["artifacts"]
    assert not any(thread.name == "mlflow-run" for thread in threading.enumerate())


@pytest.mark.parametrize(("error", "status"), [(ValueError("loss"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_exception_decides_the_final_status(tmp_path, store, error, status):
    run = new_run(tmp_path / "run")
    with pytest.raises(type(error)), RunTracker(run, store):
        raise error
    cursor = json.loads((run / "tracking.json").read_text())
    assert connect(store).client.get_run(cursor["run_id"]).info.status == status


def test_disabled_tracking_writes_only_the_status(tmp_path, store):
    run = new_run(tmp_path / "run")
    with RunTracker(run, store.model_copy(update={"enabled": False})):
        pass
    assert {path.name for path in run.iterdir()} == {"settings.json", "status.json"}


def test_unreachable_server_is_reported_once_and_the_run_is_uploaded_later(tmp_path, store, caplog, monkeypatch):
    run = new_run(tmp_path / "run")
    uri = f"http://user:secret@127.0.0.1:{closed_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = RunTracker(run, TrackingSettings(), interval_s=0.02).start()
    while not tracker._error:
        time.sleep(0.02)
    (run / "metrics.jsonl").write_text(line(1) + line(2, steps=2))
    (run / "checkpoint.pt").write_bytes(b"last")
    tracker.close()
    errors = [record.getMessage() for record in caplog.records if record.name.startswith("metagmvae")]
    reason = f"MLflow at {redact(uri)}: not reachable (Connection refused)"
    assert errors == [
        f"{reason}; the run continues. If this lasts, upload it later: metagmvae track {run}",
        f"{reason}; not all of the run has been uploaded. Upload it later: metagmvae track {run}",
    ]
    assert "secret" not in (run / "tracking.json").read_text()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    report = upload_run(run, store)
    assert (report.status, len(history(store, report.run_id, "loss"))) == ("FINISHED", 2)
    assert "checkpoint.pt" in report.artifacts


class Flaky(LiveTracker):
    """A tracker whose uploads fail as the list `errors` says."""

    def __init__(self, folder: Path, errors: list[Exception | None]) -> None:
        super().__init__(folder, TrackingSettings(), interval_s=60.0)
        self.errors = errors

    def upload(self, *, last: bool) -> None:
        if error := self.errors.pop(0):
            raise error


def test_each_outage_and_its_end_are_reported_and_what_is_missing_at_the_end(tmp_path, caplog):
    down = TrackingError("MLflow at x: down")
    tracker = Flaky(tmp_path, [None, down, down, None, None, down, down])
    with tracker:
        for _ in range(5):
            tracker.flush()
    assert tracker.errors == []
    continues = f"MLflow at x: down; the run continues. If this lasts, upload it later: metagmvae track {tmp_path}"
    missing = f"MLflow at x: down; not all of the run has been uploaded. Upload it later: metagmvae track {tmp_path}"
    again = "MLflow accepts the run again; what was missing has been uploaded"
    assert caplog.messages == [continues, again, continues, missing]


def test_upload_that_recovers_at_the_end_leaves_nothing_to_do(tmp_path, caplog):
    with Flaky(tmp_path, [TrackingError("down"), None]) as tracker:
        while not tracker._error:
            time.sleep(0.01)
    assert caplog.messages[1:] == ["MLflow accepts the run again; what was missing has been uploaded"]


@pytest.mark.parametrize(("status", "longest"), [("KILLED", 0.2), ("FINISHED", 0.8)])
def test_stopped_run_waits_a_shorter_time_for_a_slow_server(tmp_path, monkeypatch, caplog, status, longest):
    """Kubernetes and Slurm kill a process 30 s after SIGTERM."""
    monkeypatch.setattr("metagmvae.infra.tracking.live_tracker.PATIENCE_STOPPED_S", 0.2)
    monkeypatch.setattr("metagmvae.infra.tracking.live_tracker.PATIENCE_S", 0.8)
    release = threading.Event()
    tracker = Flaky(tmp_path, [None])
    monkeypatch.setattr(tracker, "upload", lambda last: release.wait())
    tracker.start()
    started = time.monotonic()
    tracker.close(status)
    assert longest <= time.monotonic() - started < longest + 0.5
    assert "MLflow is slow; not all of the run has been uploaded" in caplog.text
    release.set()


def test_silent_server_does_not_block_the_run(tmp_path, monkeypatch, caplog):
    """The port accepts connections and never answers: the last wait is limited, and the thread is a daemon."""
    monkeypatch.setattr("metagmvae.infra.tracking.live_tracker.PATIENCE_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        tracker = RunTracker(
            new_run(tmp_path / "run"), TrackingSettings(uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        ).start()
        thread = tracker._thread
        tracker.close()
        assert thread.is_alive()
        assert thread.daemon
        assert "MLflow is slow; not all of the run has been uploaded" in caplog.text
        assert read_status(tmp_path / "run")[0] == "FINISHED"
        thread.join()


def test_server_that_starts_later_gets_the_run(tmp_path, capfd):
    """A real `mlflow server` that is down at first; once it runs, the whole run is uploaded."""
    run, port = ended_run(tmp_path / "run"), closed_port()
    tracking = TrackingSettings(uri=f"http://127.0.0.1:{port}")
    with pytest.raises(TrackingError, match=str(port)):
        upload_run(run, tracking)
    with mlflow_template.running_server(tmp_path / "server", port):
        report = upload_run(run, tracking)
        assert (report.metrics, upload_run(run, tracking).metrics) == (800, 0)
        client = connect(tracking).client
        assert len(client.get_metric_history(report.run_id, "loss")) == 200
        assert client.get_run(report.run_id).info.status == "FINISHED"
        assert "checkpoint.pt" in {item.path for item in client.list_artifacts(report.run_id)}
        trained = mlflow_template.new_run(tmp_path / "trained")
        assert register(trained, tracking, "few-shot", "champion").uri == "models:/few-shot/1"
        loaded = resolve_model("models:/few-shot@champion", tracking_uri=tracking.uri)
        assert loaded.info["data_fingerprint"] == mlflow_template.DATA_FINGERPRINT
        assert capfd.readouterr().out == ""
