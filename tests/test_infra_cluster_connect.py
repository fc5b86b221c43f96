"""Whose code runs on Ray's workers: ours, whatever lies in the working folder, and the driver's on a joined cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_words import set_words, small_glyphs
from mlflow_template import closed_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

HOSTILE = 'raise RuntimeError("a module of the user was imported in place of ours")\n'
SETTINGS = {
    "model.channels": 8,
    "model.width": 32,
    "model.latent": 8,
    "train.steps": 2,
    "train.batch": 2,
    "train.set_size": 50,
    "train.samples": 4,
    "train.decode_samples": 1,
    "validation.every": 2,
    "validation.episodes": 2,
    "adapt.samples": 4,
    "tracking.enabled": "false",
    "run.engine": "ray",
    "run.workers": 2,
    "run.figures": "false",
}
WHERE = """
import sys, ray
from metagmvae.infra.cluster.connect import cluster

@ray.remote
def where():
    import metagmvae
    from metagmvae.configs.load import load_settings
    return metagmvae.__file__, load_settings("omniglot-cpu").name

with cluster(sys.argv[1], 1):
    print(*ray.get(where.remote()))
"""


def test_training_starts_where_the_user_has_folders_and_modules_of_our_names(tmp_path):
    """In the working folder and on PYTHONPATH."""
    for name in ("configs", "training", "infra"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(HOSTILE)
    (tmp_path / "evaluation.py").write_text(HOSTILE)
    (tmp_path / "pipelines.py").write_text(HOSTILE)
    small_glyphs(tmp_path / "data")
    words = set_words(SETTINGS | {"data.uri": "data", "run.out": "run"})
    command = [sys.executable, "-m", "metagmvae", "train", "omniglot-5way", *words]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint.pt").is_file()


def test_a_joined_cluster_runs_the_code_of_the_driver(tmp_path):
    """Sent by Ray, not taken from what the node has installed."""
    port = closed_port()
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    ports = ["--port", str(port), "--dashboard-agent-listen-port=0", "--ray-client-server-port", str(closed_port())]
    start = ["ray", "start", "--head", "--num-cpus=1", "--include-dashboard=false", *ports, "--block"]
    with open(tmp_path / "log", "w") as log:
        head = subprocess.Popen(start, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        command = [sys.executable, "-c", WHERE, f"127.0.0.1:{port}"]
        for _ in range(60):
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
            if "no Ray cluster answers" not in done.stderr:
                break
            assert head.poll() is None, (tmp_path / "log").read_text()
        file, preset = done.stdout.split()
        assert "py_modules" in file, done.stderr
        assert preset == "omniglot-cpu"
    finally:
        head.terminate()
        head.wait(30)
