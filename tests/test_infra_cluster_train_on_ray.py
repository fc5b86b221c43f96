"""Training on Ray goes on when a worker or the driver dies, and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
from command_words import set_words, small_glyphs

from metagmvae.infra.cluster.connect import cluster
from metagmvae.training.trainer.checkpoint import load_state

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

ROOT = Path(__file__).parents[1]
STEPS = 40
SETTINGS = {
    "model.channels": 8,
    "model.width": 32,
    "model.latent": 8,
    "train.steps": STEPS,
    "train.batch": 4,
    "train.set_size": 100,
    "train.samples": 8,
    "train.decode_samples": 2,
    "train.checkpoint_every": 5,
    "train.log_every": 5,
    "train.precision": "float32",
    "validation.every": 20,
    "validation.episodes": 5,
    "adapt.samples": 4,
    "tracking.enabled": "false",
    "run.engine": "ray",
    "run.workers": 2,
    "run.figures": "false",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_glyphs(tmp_path_factory.mktemp("glyphs") / "data")


def command(data: Path, out: Path, *more: str, **settings: object) -> list[str]:
    pairs = SETTINGS | {"data.uri": data, "run.out": out} | settings
    options = set_words(pairs)
    return [sys.executable, "-m", "metagmvae", "train", "omniglot-5way", *options, *more]


def start(data: Path, out: Path, *more: str, **settings: object) -> subprocess.Popen:
    """A driver in a session of its own: what it leaves behind is found and ended by it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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


def end(driver: subprocess.Popen, seconds: float = 150) -> int:
    try:
        return driver.wait(seconds)
    finally:
        leave_nothing(driver)


def family(driver: subprocess.Popen) -> list[psutil.Process]:
    """Processes of the driver's session, its children that made sessions of their own included."""
    found = []
    for process in psutil.process_iter():
        try:
            sessions = {os.getsid(process.pid), *(os.getsid(parent.pid) for parent in process.parents())}
        except (psutil.Error, ProcessLookupError):
            continue
        if driver.pid in sessions:
            found.append(process)
    return found


def leave_nothing(driver: subprocess.Popen) -> None:
    for process in family(driver):
        try:
            process.kill()
        except psutil.Error:
            continue
    driver.wait()


def steps(out: Path) -> list[int]:
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line)["global_step"] for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for_step(driver: subprocess.Popen, out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (seen := steps(out)) or seen[-1] < step:
        log = (out.parent / f"{out.name}.log").read_text()
        assert driver.poll() is None, log
        assert time.monotonic() < deadline, log
        time.sleep(0.05)
    assert seen[-1] < STEPS, "the run was over before it could be disturbed"


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert end(start(data, out)) == 0, (out.parent / "run.log").read_text()
    return out


def assert_equal_runs(out: Path, undisturbed: Path) -> None:
    assert steps(out) == steps(undisturbed) == list(range(5, STEPS + 1, 5))
    ours, theirs = load_state(out / "checkpoint.pt"), load_state(undisturbed / "checkpoint.pt")
    assert ours["step"] == STEPS
    assert ours["model"].keys() == theirs["model"].keys()
    for key, value in theirs["model"].items():
        assert torch.equal(ours["model"][key], value), key
    assert ours["best"]["5w1s"]["accuracy"] == theirs["best"]["5w1s"]["accuracy"]


def test_a_killed_worker_is_replaced_and_training_goes_on_from_the_last_checkpoint(data, undisturbed, tmp_path):
    out = tmp_path / "run"
    driver = start(data, out)
    try:
        wait_for_step(driver, out, 10)
        workers = [p for p in family(driver) if "RayTrainWorker" in " ".join(p.cmdline())]
        assert len(workers) == 2, [" ".join(p.cmdline())[:80] for p in family(driver)]
        workers[1].kill()
    finally:
        code = end(driver)
    assert code == 0, (tmp_path / "run.log").read_text()
    assert_equal_runs(out, undisturbed)


def test_a_killed_driver_is_resumed(data, undisturbed, tmp_path):
    out = tmp_path / "run"
    driver = start(data, out)
    try:
        wait_for_step(driver, out, 10)
        driver.kill()
    finally:
        leave_nothing(driver)
    before = load_state(out / "checkpoint.pt")["step"]
    assert 0 < before < STEPS
    assert end(start(data, out, "--resume")) == 0, (tmp_path / "run.log").read_text()
    assert_equal_runs(out, undisturbed)


def test_an_interrupt_ends_in_one_line_and_can_be_resumed(data, undisturbed, tmp_path):
    out = tmp_path / "run"
    driver = start(data, out)
    try:
        wait_for_step(driver, out, 10)
        driver.send_signal(signal.SIGINT)
    finally:
        code = end(driver, 60)
    log = (tmp_path / "run.log").read_text()
    assert code == 130, log
    assert [line for line in log.splitlines() if line][-1].startswith("interrupted;"), log
    assert "Traceback" not in log
    assert end(start(data, out, "--resume")) == 0, (tmp_path / "run.log").read_text()
    assert_equal_runs(out, undisturbed)


def test_a_loss_that_is_not_finite_ends_the_run_at_once_with_its_line(data, tmp_path):
    out = tmp_path / "run"
    code = end(start(data, out, **{"train.learning_rate": 1e30}))
    log = (tmp_path / "run.log").read_text()
    assert code == 2, log
    (line,) = [line for line in log.splitlines() if line.startswith("metagmvae train:")]
    assert "the update was not applied and the last checkpoint stays" in line
    assert "Traceback" not in log


def test_a_machine_that_is_too_busy_to_start_a_cluster(monkeypatch):
    def slow(**request):
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", slow)
    with (
        pytest.raises(RuntimeError, match="not start within its 30 s, this machine is too busy: try again"),
        cluster("", 1),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:9", "no Ray cluster answers there"),
        ("nonsense", "give host:port, ray://host:port or auto"),
    ],
)
def test_a_cluster_that_is_not_there(data, tmp_path, address, reason):
    out = tmp_path / "run"
    assert end(start(data, out, **{"run.address": address}), 30) == 2
    log = (tmp_path / "run.log").read_text()
    assert reason in log
    assert log.count("\n") == 1
