"""Status of a run: written by the run, or derived from its files."""

import json
import os
import socket
import subprocess
import sys

import pytest
from mlflow_template import ended_run, line

from metagmvae.infra.runs.status import read_status, write_status


def test_status_of_runs_that_ended_without_writing_it(tmp_path):
    run = ended_run(tmp_path / "run")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    status = json.loads((run / "status.json").read_text())
    owner = {"pid": ended.pid, "host": socket.gethostname()}
    (run / "status.json").write_text(json.dumps({**status, "status": "RUNNING", "owner": owner}))
    assert read_status(run)[0] == "KILLED"
    (run / "status.json").unlink()  # tracking was off during training
    assert read_status(run)[0] == "FINISHED"
    (run / "metrics.jsonl").write_text(line(10))
    assert read_status(run)[0] == "KILLED"


@pytest.mark.parametrize(("written_before_s", "status"), [(3600, "KILLED"), (0, "RUNNING")])
def test_number_of_the_process_belongs_to_a_later_one(tmp_path, written_before_s, status):
    """As after a restart of the machine: the process with this number began after the status was written."""
    run = ended_run(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as later:
        saved = json.loads((run / "status.json").read_text())
        owner = {"pid": later.pid, "host": socket.gethostname()}
        (run / "status.json").write_text(json.dumps({**saved, "status": "RUNNING", "owner": owner}))
        written = (run / "status.json").stat().st_mtime - written_before_s
        os.utime(run / "status.json", (written, written))
        assert read_status(run)[0] == status
        later.communicate(b"\n")


def test_a_clock_that_was_set_back_gives_no_end_before_the_start(tmp_path, monkeypatch):
    run = ended_run(tmp_path / "run")
    write_status(run, "RUNNING")
    started = read_status(run)[1]
    monkeypatch.setattr("time.time", lambda: started / 1000 - 3600)
    write_status(run, "FINISHED")
    assert read_status(run) == ("FINISHED", started, started)


def test_a_clock_that_was_set_back_does_not_end_the_run_itself(tmp_path):
    run = ended_run(tmp_path / "run")
    write_status(run, "RUNNING")
    os.utime(run / "status.json", (0, 0))
    assert read_status(run)[0] == "RUNNING"
