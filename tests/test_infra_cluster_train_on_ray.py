"""Training on Ray continues after the loss of a worker or of the driver, with the same result as without."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import torch
from command_words import TINY, set_words
from driver_processes import end, kill_all, processes_of
from ray._private import ray_constants
from ray.train.torch import TorchTrainer

from metagmvae.configs.load import SettingsError
from metagmvae.configs.schema import RunSettings, Settings
from metagmvae.infra.cli import main
from metagmvae.infra.cluster import connect
from metagmvae.infra.cluster.connect import cluster
from metagmvae.infra.cluster.train_on_ray import _trainer, _use_gpu
from metagmvae.infra.runs.folder_lock import lock_run_folder
from metagmvae.infra.runs.run_folder import CHECKPOINT, METRICS, read_lines
from metagmvae.training.trainer.checkpoint import load_state

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

HOSTILE = 'raise RuntimeError("a module of the user was imported in place of ours")\n'
STEPS = 60
SETTINGS = TINY | {
    "pretrain.steps": 0,
    "train.steps": STEPS,
    "train.batch": 4,
    "train.set_size": 100,
    "train.samples": 8,
    "train.checkpoint_every": 5,
    "train.log_every": 5,
    "validation.every": 20,
    "run.engine": "ray",
    "run.workers": 2,
    "run.figures": "false",
}


def command(data: Path, out: Path, *more: str, **settings: object) -> list[str]:
    pairs = SETTINGS | {"data.uri": data, "run.out": out} | settings
    options = set_words(pairs)
    return [sys.executable, "-m", "metagmvae", "train", "omniglot-5way", *options, *more]


def start(data: Path, out: Path, *more: str, **settings: object) -> subprocess.Popen:
    """Start a driver in a new session, by which the processes that it leaves behind are found.

    Modules in its working folder can be imported, as with PYTHONPATH=. of the user.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(out.parent)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / f"{out.name}.log", "a") as log:
        return subprocess.Popen(
            command(data, out, *more, **settings),
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=out.parent,
        )


def steps(out: Path) -> list[int]:
    return [line["global_step"] for line in read_lines(out / METRICS)]


@contextmanager
def running(data: Path, out: Path, until: int = 10, *more: str) -> Iterator[subprocess.Popen]:
    """A driver that has trained `until` steps; it and its processes are killed at the end."""
    driver = start(data, out, *more)
    deadline = time.monotonic() + 120
    try:
        while not (done := steps(out)) or done[-1] < until:
            log = (out.parent / f"{out.name}.log").read_text()
            assert driver.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.05)
        assert done[-1] < STEPS, "the run ended before it could be interrupted"
        yield driver
    finally:
        kill_all(driver)


@pytest.fixture(scope="module")
def reference_run(data, tmp_path_factory):
    """A run without interruption, in a folder with modules of the user that have the names of our packages."""
    folder = tmp_path_factory.mktemp("reference")
    for name in ("configs", "training", "infra"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(HOSTILE)
    for name in ("evaluation", "pipelines"):
        (folder / f"{name}.py").write_text(HOSTILE)
    out = folder / "run"
    assert end(start(data, out)) == 0, (folder / "run.log").read_text()
    return out


def assert_equal_runs(out: Path, reference_run: Path) -> None:
    assert steps(out) == steps(reference_run) == list(range(5, STEPS + 1, 5))
    state, expected = load_state(out / CHECKPOINT), load_state(reference_run / CHECKPOINT)
    assert state["step"] == STEPS
    assert state["model"].keys() == expected["model"].keys()
    for key, value in expected["model"].items():
        assert torch.equal(state["model"][key], value), key
    assert state["best"]["5w1s"]["accuracy"] == expected["best"]["5w1s"]["accuracy"]


def test_modules_of_the_user_are_not_imported(reference_run):
    """Neither the driver nor its workers import them, from the working folder or from PYTHONPATH."""
    assert load_state(reference_run / CHECKPOINT)["step"] == STEPS


def test_killed_worker_is_replaced_and_training_continues_from_the_last_checkpoint(data, reference_run, tmp_path):
    out = tmp_path / "run"
    with running(data, out) as driver:
        workers = [p for p in processes_of(driver) if "RayTrainWorker" in " ".join(p.cmdline())]
        assert len(workers) == 2, [" ".join(p.cmdline())[:80] for p in processes_of(driver)]
        workers[1].kill()
        assert end(driver) == 0, (tmp_path / "run.log").read_text()
    assert_equal_runs(out, reference_run)


def test_a_stopped_and_a_killed_driver_are_resumed(data, reference_run, tmp_path):
    """After SIGTERM the workers save the step that they are at. (Ctrl-C: `test_infra_runs_stop_signals.py`.)"""
    out = tmp_path / "run"
    with running(data, out) as driver:
        driver.send_signal(signal.SIGTERM)
        code = end(driver, 60)
    log = (tmp_path / "run.log").read_text()
    assert code == 143, log
    (line,) = [line for line in log.splitlines() if line.startswith("metagmvae train:")]
    step = load_state(out / CHECKPOINT)["step"]
    resume = f"metagmvae train {out} --resume"
    assert line == f"metagmvae train: stopped by SIGTERM: meta step {step} is saved; continue with: {resume}"
    assert "Traceback" not in log
    assert "SIGTERM received" not in log
    # If a line is due at the step of the stop, the resumed run writes it.
    assert steps(out) == list(range(5, step, 5))

    with running(data, out, step + 5, "--resume") as driver:
        driver.kill()
    assert step < load_state(out / CHECKPOINT)["step"] < STEPS
    assert end(start(data, out, "--resume")) == 0, (tmp_path / "run.log").read_text()
    assert_equal_runs(out, reference_run)


def test_non_finite_loss_ends_the_run_at_once_with_one_line(data, tmp_path):
    out = tmp_path / "run"
    code = end(start(data, out, **{"train.learning_rate": 1e30}))
    log = (tmp_path / "run.log").read_text()
    assert code == 2, log
    (line,) = [line for line in log.splitlines() if line.startswith("metagmvae train:")]
    assert "the update was not applied and the last checkpoint stays" in line
    assert "Traceback" not in log


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray itself
def test_processes_that_a_training_does_not_need_are_not_started(tmp_path):
    """Ray has its own names for them; if they change, a training waits 12 s at its end."""
    settings = Settings(run=RunSettings(engine="ray", device="cpu"))
    left_out = []
    for stop_flag in (None, "of a driver"):
        trainer = _trainer(settings, {"stop_flag": stop_flag}, tmp_path, [])
        kept = {type(item).__name__ for item in trainer._create_default_callbacks()}
        left_out.append({type(item).__name__ for item in TorchTrainer._create_default_callbacks(trainer)} - kept)
        assert "BackendSetupCallback" in kept
    assert left_out == [{"DatasetsCallback"}, {"DatasetsCallback", "PlacementGroupCleanerCallback"}]


def test_start_timeout_names_a_remedy(monkeypatch):
    def slow(**options):
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", slow)
    with (
        pytest.raises(RuntimeError, match="not start within 30 s because this machine is too busy: try again"),
        cluster("", 1),
    ):
        pass


def test_under_uv_run_the_project_is_not_sent_to_the_workers(monkeypatch):
    """Ray's hook packs the working folder, and refuses one that is too large."""
    used = []
    monkeypatch.setattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    monkeypatch.delenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: used.append(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    with cluster("", 1):
        assert used == [False]


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("cpu", 8, False),
        ("auto", 0, False),
        ("auto", 2, True),
        ("cuda", 2, True),
        ("auto", 1, "the Ray cluster has 1 GPUs"),
        ("cuda", 0, "the Ray cluster has 0 GPUs"),
    ],
)
def test_workers_get_gpus_of_the_cluster_not_of_the_driver(monkeypatch, device, gpus, expected):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(gpus)} if gpus else {})
    settings = Settings(run=RunSettings(engine="ray", workers=2, device=device))
    if isinstance(expected, bool):
        assert _use_gpu(settings) is expected
    else:
        with pytest.raises(SettingsError, match=expected):
            _use_gpu(settings)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:9", "no Ray cluster answers there"),
        ("nonsense", "give host:port, ray://host:port, auto or local"),
    ],
)
def test_wrong_address_is_one_error_line(data, tmp_path, address, reason, capfd):
    words = command(data, tmp_path / "run", **{"run.address": address})
    assert main(words[3:]) == 2
    printed, log = capfd.readouterr()
    assert printed == ""
    assert reason in log
    assert log.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_named_before_ray_starts(data, tmp_path, monkeypatch, capfd):
    def started(*arguments):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(connect, "_start", started)
    words = command(data, tmp_path, "--resume")[3:]
    with lock_run_folder(tmp_path):
        assert main(words) == 2
    assert f"{tmp_path}: another process trains in this folder" in capfd.readouterr().err
    assert main(words) == 1  # nothing else is wrong
    assert "Ray was started" in capfd.readouterr().err


def test_a_dry_run_starts_no_cluster_and_counts_the_gpus(data, tmp_path, monkeypatch, capfd):
    def started(*arguments):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(connect, "_start", started)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main([*command(data, tmp_path / "run", "--dry-run")[3:], "--set=run.device=cpu"]) == 0
    assert main(command(data, tmp_path / "run", "--dry-run")[3:]) == 2
    assert "run.workers is 2, but the Ray cluster has 1 GPUs" in capfd.readouterr().err
    assert main(command(data, tmp_path / "run", "--dry-run", **{"run.address": "127.0.0.1:9"})[3:]) == 2
    assert "no Ray cluster answers there" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
