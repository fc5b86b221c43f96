"""Which Ray cluster is used, and which code its workers run."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
from mlflow_template import closed_port

from metagmvae.infra.cluster import connect

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

TOKEN = "a" * 32
PRINT_CODE_OF_A_WORKER = """
import sys, ray
from metagmvae.configs.load import SettingsError
from metagmvae.infra.cluster.connect import cluster

@ray.remote
def code_of_the_worker():
    import metagmvae
    from metagmvae.configs.load import load_settings
    return metagmvae.__file__, load_settings("omniglot-cpu").name

try:
    with cluster(sys.argv[1], 1):
        answer = ray.get(code_of_the_worker.remote(), timeout=60)
except SettingsError as error:
    sys.exit(f"{error}")
print(*answer)
"""


@pytest.fixture
def environment():
    """Ray's files in a new folder (with a short name: paths of sockets are limited to 107 characters), and a token."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    words = {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    yield {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | words
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def head(environment):
    """Address of a cluster that requires the token."""
    port = closed_port()
    ports = [f"--port={port}", "--dashboard-agent-listen-port=0", f"--ray-client-server-port={closed_port()}"]
    command = ["-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=1", "--include-dashboard=false", *ports]
    log = Path(environment["RAY_TMPDIR"]) / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command, "--block"],
            env=environment | {"RAY_AUTH_MODE": "token"},
            stdout=file,
            stderr=file,
            start_new_session=True,  # --block leaves child processes behind: they are ended as a group
        )
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def code_of_a_worker(address, environment, folder):
    command = [sys.executable, "-c", PRINT_CODE_OF_A_WORKER, address]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=90)


def test_existing_cluster_runs_the_code_of_the_driver_and_requires_its_token(head, environment, tmp_path):
    done = code_of_a_worker(head, environment | {"RAY_AUTH_MODE": "token"}, tmp_path)
    file, preset = done.stdout.split()
    assert "py_modules" in file, done.stderr
    assert preset == "omniglot-cpu"
    # The cluster that `auto` finds is one of this user, so Ray uses the user's token.
    automatic = code_of_a_worker("auto", environment, tmp_path)
    assert automatic.stdout.endswith(" omniglot-cpu\n"), automatic.stderr
    # Ray tries for 20 s to connect without the token.
    refused = code_of_a_worker(head, environment | {"RAY_NUM_REDIS_GET_RETRIES": "1"}, tmp_path)
    assert refused.returncode == 1
    assert "requires a token; set RAY_AUTH_MODE=token" in refused.stderr.splitlines()[-1]


def test_file_of_a_stopped_cluster_does_not_matter(environment, tmp_path):
    """`ray.init()` without an address would read it, and try to join that cluster."""
    (Path(environment["RAY_TMPDIR"]) / "ray").mkdir()
    stale = Path(environment["RAY_TMPDIR"]) / "ray" / "ray_current_cluster"
    stale.write_text(f"127.0.0.1:{closed_port()}")
    done = code_of_a_worker("", environment, tmp_path)
    assert done.returncode == 0, done.stderr
    file, preset = done.stdout.split()
    assert "py_modules" not in file
    assert preset == "omniglot-cpu"


def test_address_without_a_cluster_is_one_error_line_within_seconds(environment, tmp_path):
    address = f"127.0.0.1:{closed_port()}"
    words = ["prepare", "glyphs", "--out", "data", "--workers", "1"]
    command = [sys.executable, "-m", "metagmvae", *words]
    started = time.monotonic()
    environment = environment | {"RAY_ADDRESS": address}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - started < 30
    assert done.returncode == 2, done.stderr
    assert f"RAY_ADDRESS) = '{address}': no Ray cluster answers there" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "free", "warns"),
    [("head:6379", 1, "'head:6379'"), ("auto", 1, "'auto' (head:1)"), ("head:6379", 4, ""), ("", 0, "")],
)
def test_a_cluster_that_others_use_is_named(monkeypatch, caplog, address, free, warns):
    """Ray would wait for free CPUs without a word. (A new cluster has not reported all of its CPUs at once.)"""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    context = mock.Mock(address_info={"gcs_address": "head:1"})
    monkeypatch.setattr(connect, "_join", lambda address: context)
    monkeypatch.setattr(connect, "_start", lambda cpus, dashboard: context)
    monkeypatch.setattr(connect.ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(connect.ray, "available_resources", lambda: {"CPU": float(free)} if free else {})
    with connect.cluster(address, 2):
        pass
    warning = f"the Ray cluster at {warns} has 1 of its 4 CPUs free; the work starts when 2 are free"
    assert caplog.messages == ([warning] if warns else [])
