"""A sweep that is killed while it writes its results has no half-written file, and a resume completes it."""

import os
import signal

import pytest
from small_sweep import open_sweep, train

from metagmvae.configs.load import load_settings
from metagmvae.configs.schema import TrackingSettings
from metagmvae.evaluation.sweeps.trials import read_trials
from metagmvae.infra.tune.request import finish
from metagmvae.infra.tune.sweep_tracker import SweepTracker

RESULTS = ("best.toml", "trials.jsonl", "parallel-coordinates.png", "summary.json", "report.md")


def ended_sweep(plan, dataset, root, resume=False):
    """A sweep whose three trials have ended."""
    sweep = open_sweep(plan, dataset, root, trials=3, resume=resume)
    for accuracies in [[0.3, 0.4], [0.5, 0.6], [0.2, 0.3]]:
        number = sweep.next_trial()
        if number is not None:
            train(sweep, number, accuracies)
            (sweep.folder.trial_folder(number) / "checkpoint.pt").unlink()
            sweep.end_trial(number)
    return sweep


def write_results(sweep):
    with SweepTracker(sweep, TrackingSettings(enabled=False)) as tracker:
        return finish(sweep, tracker)


def killed_at(name, sweep):
    """Write the results in another process, which is killed when the file `name` is complete but not in its place."""
    replace = os.replace

    def killing(source, target):
        if os.path.basename(target) == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    child = os.fork()
    if child == 0:
        os.replace = killing
        write_results(sweep)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("name", RESULTS)
def test_a_resume_completes_the_results(plan, dataset, tmp_path, name):
    root = tmp_path / "sweep"
    sweep = ended_sweep(plan, dataset, root)
    killed_at(name, sweep)
    assert len(read_trials(root / "trials.jsonl")) == len(sweep.ended)
    assert (root / "best.toml").exists() == (name != "best.toml")
    if (root / "best.toml").exists():
        load_settings(root / "best.toml")
    assert len(list(root.glob(".*.tmp"))) == 1
    before = {path.name for path in root.iterdir()}
    assert not before & set(RESULTS[RESULTS.index(name) :]) - {"trials.jsonl"}

    resumed = ended_sweep(plan, dataset, root, resume=True)
    assert resumed.ended == sweep.ended
    answer = write_results(resumed)
    assert answer["best"]["accuracy"] == 0.6
    assert set(RESULTS) <= {path.name for path in root.iterdir()}
    assert list(root.glob(".*.tmp")) == []
