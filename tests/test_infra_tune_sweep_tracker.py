"""A sweep in MLflow: a parent run and one run per trial, each created once in spite of crashes and lost servers."""

import json
import subprocess
import threading
import time
from contextlib import ExitStack

import mlflow_template
import pytest
from mlflow_template import closed_port
from small_sweep import open_sweep, run_next, train

from metagmvae.configs.schema import TrackingSettings
from metagmvae.evaluation.sweeps.trials import read_trials
from metagmvae.infra.runs.run_folder import CURSOR
from metagmvae.infra.runs.status import read_status, write_status
from metagmvae.infra.tracking.store import connect
from metagmvae.infra.tune.request import finish
from metagmvae.infra.tune.sweep_tracker import SweepTracker
from metagmvae.infra.tune.sweep_uploader import NUMBER, PARENT, REASON, STATUS, SweepUploader, track_sweep

pytestmark = pytest.mark.mlflow


@pytest.fixture
def sweep(plan, dataset, tmp_path):
    return open_sweep(plan, dataset, tmp_path / "sweep")


def children(store, parent):
    client = connect(store).client
    experiment = client.get_run(parent).info.experiment_id
    return {int(r.data.tags[NUMBER]): r for r in client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'")}


def upload(sweep, store):
    uploader = SweepUploader(sweep.folder, connect(store), store.experiment)
    return uploader.send_sweep(list(sweep.ended.values()), list(sweep.running), artifacts=False)


def test_parent_run_and_trials_with_their_statuses(sweep, store):
    with SweepTracker(sweep, store, interval_s=0.05) as tracker:
        run_next(sweep, [0.3, 0.5])
        run_next(sweep, [0.2])
        running = sweep.next_trial()
        train(sweep, running, [0.4])
        while not _points_sent(sweep, running):
            time.sleep(0.02)  # until a trial that is still running is uploaded
        (sweep.folder.trial_folder(running) / "failed.txt").write_text("meta step 12: loss nan\n")
        sweep.end_trial(running)
        tracker.close()
        trials = tracker.with_runs(sweep.ended.values())
    assert not any(thread.name == "mlflow-sweep" for thread in threading.enumerate())
    cursor = json.loads((sweep.folder.root / CURSOR).read_text())
    client = connect(store).client
    parent = client.get_run(cursor["run_id"])
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "mine")
    assert parent.data.metrics["best_accuracy"] == 0.5
    assert parent.data.metrics["trials"] == 3
    assert parent.data.params["train.steps"] == "20"
    assert parent.data.tags["sweep.search"] == "random"
    assert "trials.jsonl" in {item.path for item in client.list_artifacts(cursor["run_id"])}
    there = children(store, cursor["run_id"])
    taken = [trial for trial in trials if trial.status != "refused"]
    assert set(there) == {trial.number for trial in taken}
    assert [there[t.number].info.status for t in taken] == ["FINISHED", "KILLED", "FAILED"]
    for trial in taken:
        run = there[trial.number]
        assert run.info.run_id == trial.run_id
        assert run.data.tags[STATUS] == trial.status
        assert run.data.params == {name: str(value) for name, value in trial.settings.items()}
        assert run.data.metrics["validation/5w1s"] == trial.last.accuracy
        history = client.get_metric_history(trial.run_id, "validation/5w1s")
        assert [(p.step, p.value) for p in history] == [(p.step, p.accuracy) for p in trial.curve]
        assert run.info.end_time - run.info.start_time == round(1000 * trial.seconds)
    assert there[running].data.tags[REASON] == "meta step 12: loss nan"
    assert all(not trial.run_id for trial in trials if trial.status == "refused")


def test_report_names_the_run_of_the_best_trial(sweep, store):
    with SweepTracker(sweep, store, interval_s=0.05) as tracker:
        run_next(sweep, [0.3, 0.5])
        answer = finish(sweep, tracker)
    # A damaged checkpoint, as here, does not cost the report.
    assert list(answer["not_calibrated"]) == [str(answer["best"]["number"])]
    assert "not a readable checkpoint" in answer["not_calibrated"][str(answer["best"]["number"])]
    (trial,) = [trial for trial in read_trials(sweep.folder.table) if trial.status == "finished"]
    assert trial.run_id
    assert json.loads((sweep.folder.root / "summary.json").read_text())["best"]["run_id"] == trial.run_id


def _points_sent(sweep, number):
    path = sweep.folder.root / CURSOR
    stores = json.loads(path.read_text())["stores"].values() if path.exists() else []
    return sum(store.get("trials", {}).get(str(number), {}).get("points", 0) for store in stores)


def test_crash_before_the_cursor_is_written_creates_no_second_run(sweep, store):
    run_next(sweep, [0.3, 0.5])
    run_next(sweep, [0.2, 0.4])
    first = upload(sweep, store)
    assert first.metrics == 2 * 2 * 3 + 3
    assert upload(sweep, store).metrics == 0
    cursor = json.loads((sweep.folder.root / CURSOR).read_text())
    for entry in cursor["stores"].values():
        entry["trials"].clear()  # as if killed before the cursor was written
    (sweep.folder.root / CURSOR).write_text(json.dumps(cursor))
    before = {number: run.info.run_id for number, run in children(store, first.run_id).items()}
    upload(sweep, store)
    assert {number: run.info.run_id for number, run in children(store, first.run_id).items()} == before
    client = connect(store).client
    for run_id in before.values():
        assert len(client.get_metric_history(run_id, "validation/5w1s")) == 2


def test_runs_of_interrupted_trials_end_with_the_sweep_and_go_on_with_it(sweep, store, plan, dataset):
    """After Ctrl-C the tracker ends them; after SIGKILL `metagmvae track` does, as often as it is called."""
    with SweepTracker(sweep, store, interval_s=60.0) as tracker:
        run_next(sweep, [0.3, 0.5])
        number = sweep.next_trial()
        train(sweep, number, [0.4])
        tracker.close("KILLED")
    parent = json.loads((sweep.folder.root / CURSOR).read_text())["run_id"]

    def state():
        run = children(store, parent)[number]
        return run.info.status, run.data.tags[STATUS]

    assert state() == ("KILLED", "interrupted")
    resumed = open_sweep(plan, dataset, sweep.folder.root, resume=True)
    assert resumed.next_trial() == number
    write_status(sweep.folder.root, "RUNNING")
    upload(resumed, store)
    assert state() == ("RUNNING", "running")
    # SIGKILL: the process of the status is gone, and the tracker could write nothing.
    status = json.loads((sweep.folder.root / "status.json").read_text())
    ended = subprocess.Popen(["true"])
    ended.wait()
    status["owner"]["pid"] = ended.pid
    (sweep.folder.root / "status.json").write_text(json.dumps(status))
    for _ in range(2):
        track_sweep(sweep.folder.root)
        assert state() == ("KILLED", "interrupted")
    last = open_sweep(plan, dataset, sweep.folder.root, resume=True)
    with SweepTracker(last, store, interval_s=60.0):
        assert run_next(last, [0.4, 0.6]) == number
    assert state() == ("FINISHED", "finished")
    assert len(children(store, parent)) == len([trial for trial in last.ended.values() if trial.status != "refused"])


def test_repeated_requests_create_one_run_for_the_sweep_and_each_trial(sweep, store, monkeypatch):
    mlflow_template.repeat_requests(monkeypatch, "create_run")
    with SweepTracker(sweep, store, interval_s=60.0):
        run_next(sweep, [0.3, 0.5])
        run_next(sweep, [0.2, 0.4])
    cursor = json.loads((sweep.folder.root / CURSOR).read_text())
    client = connect(store).client
    runs = client.search_runs([client.get_run(cursor["run_id"]).info.experiment_id])
    assert len({run.data.tags.get(NUMBER) for run in runs}) == len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_server_that_is_restarted_gets_everything_and_the_sweep_never_waits(sweep, tmp_path, caplog, monkeypatch):
    """A real `mlflow server` that is killed during the sweep and started again on the same port."""
    port = closed_port()
    tracking = TrackingSettings(uri=f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with ExitStack() as stack:
        with mlflow_template.running_server(tmp_path / "server", port):
            tracker = stack.enter_context(SweepTracker(sweep, tracking, interval_s=0.1))
            run_next(sweep, [0.3, 0.5])
            while not any(_points_sent(sweep, number) for number in sweep.ended):
                time.sleep(0.05)
        run_next(sweep, [0.2, 0.6])
        while not tracker._error:
            time.sleep(0.05)
        stack.enter_context(mlflow_template.running_server(tmp_path / "server", port))
        run_next(sweep, [0.2, 0.7])
        while tracker._error:
            time.sleep(0.05)
        tracker.close()
        warnings = [line for line in caplog.messages if "metagmvae track" in line]
        assert len(warnings) == 1
        assert "the sweep continues. If this lasts, upload it later" in warnings[0]
        assert "MLflow accepts the sweep again; what was missing has been uploaded" in caplog.messages
        cursor = json.loads((sweep.folder.root / CURSOR).read_text())
        there = children(tracking, cursor["run_id"])
        assert len(there) == 3
        assert {run.info.status for run in there.values()} == {"FINISHED"}
        assert connect(tracking).client.get_run(cursor["run_id"]).data.metrics["best_accuracy"] == 0.7


def test_sweep_without_a_server_is_uploaded_later(plan, dataset, tmp_path, store, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    with SweepTracker(sweep, TrackingSettings(), interval_s=0.05):
        run_next(sweep, [0.3, 0.5])
    assert f"metagmvae track {sweep.folder.root}" in caplog.text
    assert read_status(sweep.folder.root)[0] == "FINISHED"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store.store}/mlflow.db")
    report = track_sweep(sweep.folder.root)
    assert report.status == "FINISHED"
    assert len(children(store, report.run_id)) == 1


def test_disabled_tracking_writes_only_the_status(sweep):
    with SweepTracker(sweep, TrackingSettings(enabled=False)) as tracker:
        run_next(sweep, [0.3, 0.5])
        assert tracker.with_runs(sweep.ended.values()) == list(sweep.ended.values())
    assert not (sweep.folder.root / CURSOR).exists()
    assert read_status(sweep.folder.root)[0] == "FINISHED"
