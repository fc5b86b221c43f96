"""Helpers for tests of tracking and registry: an empty MLflow store, a server, and run folders."""

import atexit
import contextlib
import functools
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metagmvae.configs.schema import AdaptSettings, ModelSettings, Settings, TrackingSettings, TrainSettings
from metagmvae.infra.tracking.store import connect
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.checkpoint import load_state, save_state

IMAGE_SHAPE = (1, 28, 28)
DATA_FINGERPRINT = "d" * 64
STARTED_MS = 1_700_000_000_000
VALUES = {"loss": 5.0, "elbo": -5.0, "images_per_s": 100.0}


@functools.cache
def _template() -> Path:
    """Return a migrated database, which is created once per process and copied, because migrations take seconds."""
    folder = Path(tempfile.mkdtemp(prefix="mlflow-template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    connect(TrackingSettings(store=str(folder)))
    return folder / "mlflow.db"


def new_store(folder: Path) -> TrackingSettings:
    """Create an SQLite store in `folder` and return its settings."""
    folder.mkdir(parents=True)
    shutil.copy(_template(), folder / "mlflow.db")
    return TrackingSettings(store=str(folder))


def new_run(folder: Path, best_by_shot: tuple[int, ...] = (), seed: int = 0) -> Path:
    """Create a run folder with a checkpoint of an initialised model; the best model of each shot has other weights."""
    folder.mkdir(parents=True)
    settings = Settings(
        model=ModelSettings(latent=8, channels=8, width=16, heads=2, layers=1),
        adapt=AdaptSettings(iterations=3, samples=4),
        train=TrainSettings(steps=1, seed=seed, selection="best" if best_by_shot else "last"),
    )

    def weights(seed: int) -> dict[str, Any]:
        return build_model(settings.model, IMAGE_SHAPE, seed).state_dict()

    score = {"accuracy": 0.5, "ci95": 0.1, "step": 1}
    state = {
        "settings": settings.model_dump_json(),
        "kind": "meta-gmvae",
        "projector": {},
        "image_shape": list(IMAGE_SHAPE),
        "data_fingerprint": DATA_FINGERPRINT,
        "stage": "meta",
        "step": 1,
        "model": weights(seed),
        "optimizer": {},
        "schedule": {},
        "rng": {},
        "best": {f"5w{shot}s": {**score, "model": weights(shot)} for shot in best_by_shot},
        "elapsed": 1.5,
    }
    save_state(folder / "checkpoint.pt", state)
    (folder / "settings.json").write_text(settings.model_dump_json())
    return folder


def untrained_run(folder: Path, data: Path, *, constant: bool = False, step: int = 1) -> Path:
    """Create a run folder of an untrained model: its latents are random features, or constant for all images."""
    new_run(folder)
    state = load_state(folder / "checkpoint.pt")
    state |= {"data_fingerprint": Dataset.open(data).fingerprint, "step": step}
    weights = state["model"]
    weights["inlet.weight"] *= 0 if constant else 30
    weights["head.weight"][8:] = 0  # rows of the log variance
    weights["head.bias"][8:] = -6
    save_state(folder / "checkpoint.pt", state)
    (folder / "run.json").write_text(json.dumps({"data": str(data)}))
    return folder


def line(step: int, stage: str = "meta", steps: int = 200) -> str:
    position = {"stage": stage, "step": step, "steps": steps, "global_step": step, "checkpoint": 0}
    return json.dumps({**position, **VALUES, "loss": 1000.0 - step, "elapsed_s": 0.5 * step}) + "\n"


def ended_run(folder: Path) -> Path:
    """Create a run folder as after `metagmvae train`, with 200 metric lines and placeholders for the other files."""
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(Settings(name="run").model_dump_json())
    record = {"command": "metagmvae train x", "commit": "c0ffee", "data_fingerprint": "d" * 64, "cpus": 2}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(line(step) for step in range(1, 201)))
    (folder / "checkpoint.pt").write_bytes(b"weights")
    (folder / "figures").mkdir()
    (folder / "figures" / "curves.png").write_bytes(b"image")
    (folder / "ray" / "checkpoint_000001").mkdir(parents=True)
    (folder / "ray" / "checkpoint_000001" / "state.pt").write_bytes(b"state of Ray")
    status = {"status": "FINISHED", "started_ms": STARTED_MS, "ended_ms": STARTED_MS + 100_000}
    (folder / "status.json").write_text(json.dumps({**status, "owner": {"pid": 1, "host": "elsewhere"}}))
    return folder


def history(tracking: TrackingSettings, run_id: str, key: str) -> list[tuple[int, float, int]]:
    points = connect(tracking).client.get_metric_history(run_id, key)
    return sorted((point.step, point.value, point.timestamp) for point in points)


def closed_port() -> int:
    """Return a port of this machine on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """Run `mlflow server` on the store in `folder`, which is created if it does not exist; yield its URI."""
    if not folder.exists():
        new_store(folder)
    port = port or closed_port()
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder / "artifacts"]
    with run_mlflow(folder, port, "server", *store):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def run_mlflow(folder: Path, port: int, *words: object) -> Iterator[None]:
    """Run a command of MLflow that listens on `port`, in `folder`, until the end of the block."""
    # With several workers uvicorn kills those that do not answer within 5 s, which happens on a busy machine.
    command = [sys.executable, "-m", "mlflow", *map(str, words), "--port", str(port), "--workers", "1"]
    # MLflow searches uvicorn on the PATH, which lacks the environment's bin folder unless it is activated.
    search_path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": search_path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("a") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            assert server.poll() is None, (folder / "log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # the group of the server includes its workers
        server.wait()


def post(port: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and answer of a request to a served model."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/invocations", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def repeat_requests(monkeypatch: Any, name: str) -> None:
    """Let a request of MLflow's client be made twice, as its HTTP client does if the first answer is lost or late."""
    from mlflow import MlflowClient

    once = getattr(MlflowClient, name)

    def twice(self: Any, *args: Any, **options: Any) -> Any:
        once(self, *args, **options)
        return once(self, *args, **options)

    monkeypatch.setattr(MlflowClient, name, twice)
