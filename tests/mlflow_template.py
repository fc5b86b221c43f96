"""For tests of tracking and registry: an empty MLflow store, and a run folder with a small model."""

import atexit
import contextlib
import functools
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

from configs.schema import AdaptSettings, ModelSettings, Settings, TrackingSettings, TrainSettings
from infra.mlflow_store import connect
from training.builders import build_model
from training.checkpoint import save_state

IMAGE_SHAPE = (1, 28, 28)
DATA_FINGERPRINT = "d" * 64


@functools.cache
def _template() -> Path:
    """A migrated database, made once per process and copied: migrations cost seconds."""
    folder = Path(tempfile.mkdtemp(prefix="mlflow-template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    connect(TrackingSettings(store=str(folder)))
    return folder / "mlflow.db"


def new_store(folder: Path) -> TrackingSettings:
    """Settings of a fresh SQLite store in `folder`."""
    folder.mkdir(parents=True)
    shutil.copy(_template(), folder / "mlflow.db")
    return TrackingSettings(store=str(folder))


def new_run(folder: Path, best_by_shot: tuple[int, ...] = (), seed: int = 0) -> Path:
    """A run folder with the checkpoint of a model as it was initialised; the best of each shot are other ones."""
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


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """A real `mlflow server` on loopback over a fresh store in `folder`; yields its URI."""
    new_store(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    # Of several workers uvicorn kills those that do not answer within 5 s, as they may not on a busy machine.
    command = [sys.executable, "-m", "mlflow", "server", *place, "--port", str(port), "--workers", "1"]
    # MLflow looks for uvicorn on the PATH, where an environment that is not activated does not stand.
    search = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": search, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            assert server.poll() is None, (folder / "log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # its own session: workers go with it
        server.wait()
