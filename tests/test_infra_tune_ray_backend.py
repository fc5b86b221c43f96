"""A sweep on Ray Tune survives a killed worker and resumes after a killed driver; failed trials do not end it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from command_words import set_words
from driver_processes import end, kill_all, processes_of
from small_sweep import open_sweep

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.sweeps.trials import read_trials
from metagmvae.infra.runs.run_folder import METRICS, read_lines
from metagmvae.infra.tune import ray_backend
from metagmvae.infra.tune.trial import OUTSIDE
from metagmvae.pipelines.records import WorkError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
STEPS = 60
SETTINGS = {
    "model.channels": 8,
    "model.width": 32,
    "model.latent": 8,
    "train.batch": 2,
    "train.set_size": 50,
    "train.samples": 4,
    "train.checkpoint_every": 5,
    "train.log_every": 5,
    "train.precision": "float32",
    "validation.every": 10,
    "validation.episodes": 5,
    "adapt.samples": 4,
    "tracking.enabled": "false",
}
SPACE = """
train.learning_rate = { choice = [1e-3, 3e-3, 1e9] }
train.components = { choice = [5, 60] }
train.em_iterations = { choice = [1, 2] }
"""


def start(data: Path, out: Path, *more: str, space: str = SPACE, **settings: object) -> subprocess.Popen:
    """Start `metagmvae tune` in its own session, as in the tests of `train`."""
    (out.parent / "space.toml").write_text(space)
    pairs = SETTINGS | {"data.uri": data} | settings
    options = set_words(pairs)
    request = ["tune", "omniglot-5way", "--space", "space.toml", "--out", out, "--steps", STEPS, "--json", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "metagmvae", *map(str, request), *options]
    with open(out.parent / "log", "a") as log, open(out.parent / "answer", "w") as answer:
        return subprocess.Popen(
            command, env=environment, stdout=answer, stderr=log, start_new_session=True, cwd=out.parent
        )


def progress(out: Path) -> dict[int, int]:
    """Last logged step of each trial."""
    lines = {folder.name: read_lines(folder / METRICS) for folder in (out / "trials").glob("*")}
    return {int(name): int(rows[-1]["step"]) for name, rows in lines.items() if rows}


def wait_until(driver: subprocess.Popen, out: Path, condition) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        log = (out.parent / "log").read_text()
        assert driver.poll() is None, log
        assert time.monotonic() < deadline, log
        time.sleep(0.05)


def in_progress(out: Path, exclude: set[int]) -> set[int]:
    """Trials that have a checkpoint and are not near their end, without those in `exclude`."""
    return {number for number, step in progress(out).items() if 5 <= step <= STEPS - 20} - exclude


def ended(out: Path) -> dict[int, str]:
    return {trial.number: trial.status for trial in read_trials(out / "trials.jsonl")}


def test_killing_driver_and_worker_repeats_no_step_of_any_trial(data, tmp_path):
    out = tmp_path / "sweep"
    request = ("--search", "grid", "--scheduler", "none")
    driver = start(data, out, *request)
    try:
        wait_until(driver, out, lambda: "finished" in ended(out).values() and in_progress(out, set(ended(out))))
        driver.kill()
    finally:
        kill_all(driver)
    before = read_trials(out / "trials.jsonl")
    interrupted = in_progress(out, {trial.number for trial in before})
    written = {t.number: (out / "trials" / f"{t.number:05d}" / METRICS) for t in before if t.status == "finished"}
    stamps = {number: path.stat().st_mtime_ns for number, path in written.items()}

    second = start(data, out, *request)
    assert end(second) == 2
    assert "not empty; continue its sweep with --resume" in (tmp_path / "log").read_text()
    driver = start(data, out, *request, "--resume")
    try:
        known = set(ended(out))
        wait_until(driver, out, lambda: in_progress(out, set(ended(out)) | interrupted | known))
        workers = [p for p in processes_of(driver) if "ImplicitFunc" in " ".join(p.cmdline())]
        assert workers, [" ".join(p.cmdline())[:80] for p in processes_of(driver)]
        workers[0].kill()
    finally:
        code = end(driver, 300)
    assert code == 0, (tmp_path / "log").read_text()

    trials = read_trials(out / "trials.jsonl")
    assert sorted(trial.number for trial in trials) == list(range(12))
    for trial in trials:
        impossible = trial.settings["train.components"] > 50
        diverges = trial.settings["train.learning_rate"] > 1
        assert trial.status == ("refused" if impossible else "failed" if diverges else "finished"), trial
        lines = read_lines(out / "trials" / f"{trial.number:05d}" / METRICS)
        if trial.status == "finished":
            # Interrupted trials continued from their checkpoints: no step is repeated or missing.
            assert [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
            assert [point.step for point in trial.curve] == list(range(10, STEPS + 1, 10))
        elif diverges and not impossible:
            assert "the update was not applied" in trial.reason
    for earlier in before:
        assert earlier in [trial.model_copy(update={"run_id": earlier.run_id}) for trial in trials]
    assert {number: path.stat().st_mtime_ns for number, path in written.items()} == stamps

    answer = json.loads((tmp_path / "answer").read_text())
    best = max(trials, key=lambda trial: trial.last.accuracy if trial.last else 0)
    assert answer["best"]["accuracy"] == best.last.accuracy
    assert answer["trials"] == {"finished": 4, "failed": 2, "refused": 6}
    settings = load_settings(out / "best.toml")
    assert settings.train.em_iterations == answer["settings"]["train.em_iterations"]
    assert not (out / ".ray").exists()


def test_a_sweep_whose_own_processes_are_lost_says_how_it_continues(plan, dataset, tmp_path, monkeypatch):
    """Ray Tune raises a plain RuntimeError if its own worker runs out of memory, and not only those of its trials."""
    text = "Caught unexpected exception: 2 worker(s) were killed due to the node running low on memory. It was 0.96"
    tuner = SimpleNamespace(fit=Mock(side_effect=RuntimeError(text)))
    monkeypatch.setattr(ray_backend, "_tuner", lambda *arguments: tuner)
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    with pytest.raises(WorkError, match=r"^Ray Tune failed: .* out of memory: use fewer .*; continue with --resume$"):
        ray_backend.run_sweep(sweep, 1, 0.0, lambda: None)


def test_an_error_that_no_settings_have_caused_ends_the_sweep_and_no_trial(plan, dataset, tmp_path, monkeypatch):
    """A full disk, for example: all trials would fail by it, and a resume would not train them again."""
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    made = []

    def fit():
        callback, stopper = made
        first, second = sweep.next_trial(), sweep.next_trial()
        of = {number: SimpleNamespace(config={"number": number}) for number in (first, second)}
        assert not stopper("a", {"config": of[first].config, "step": 10, "accuracy": 0.5})
        assert not stopper.stop_all()
        assert stopper("a", {"config": of[first].config, OUTSIDE: "checkpoint.pt: cannot be written (No space left)"})
        assert stopper.stop_all()
        for number in (first, second):
            callback.on_trial_complete(1, [], of[number])
        raise EOFError("Ran out of input")  # of Ray's own file on the same disk

    def tuner(sweep, callback, *more):
        made[:] = [callback, ray_backend.SweepStopper(callback)]
        return SimpleNamespace(fit=fit)

    monkeypatch.setattr(ray_backend, "_tuner", tuner)
    with pytest.raises(WorkError) as caught:
        ray_backend.run_sweep(sweep, 1, 0.0, lambda: None)
    assert str(caught.value) == "trial 0: checkpoint.pt: cannot be written (No space left); continue with --resume"
    assert [trial for trial in sweep.ended.values() if trial.status != "refused"] == []
    resumed = open_sweep(plan, dataset, tmp_path / "sweep", resume=True)
    assert resumed.unfinished == sorted(sweep.running)
    monkeypatch.setattr(
        ray_backend, "_tuner", lambda *more: SimpleNamespace(fit=Mock(side_effect=EOFError("no input")))
    )
    with pytest.raises(WorkError, match=r"^Ray Tune failed: no input; continue with --resume$"):
        ray_backend.run_sweep(resumed, 1, 0.0, lambda: None)


POSSIBLE = """
train.learning_rate = { choice = [1e-3, 3e-3] }
train.em_iterations = { choice = [1, 2] }
"""


def test_stopped_distributed_trials_free_their_workers(data, tmp_path):
    """Ray frees the workers of a stopped trial only through its dashboard; without it the sweep would never end."""
    out = tmp_path / "sweep"
    several = {"run.engine": "ray", "run.workers": 2}
    driver = start(data, out, "--trials", "3", "--seed", "1", space=POSSIBLE, **several)
    code = end(driver, 550)
    assert code == 0, (tmp_path / "log").read_text()
    trials = read_trials(out / "trials.jsonl")
    assert {trial.status for trial in trials} == {"finished", "stopped"}
    assert len(trials) == 3
    assert trials[-1].number > next(trial.number for trial in trials if trial.status == "stopped")
