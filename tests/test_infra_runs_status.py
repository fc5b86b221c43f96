"""Status of a run: written by the run, or derived from its files."""

import json
import socket
import subprocess
import sys

from mlflow_template import ended_run, line

from metagmvae.infra.runs.status import read_status


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
