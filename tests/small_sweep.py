"""Helpers for tests of sweeps without Ray: a plan, a sweep in a folder, and the files that a trial writes."""

import json
from pathlib import Path

from command_words import pairs

from metagmvae.configs.load import load_settings
from metagmvae.configs.search_space import load_space
from metagmvae.infra.runs.run_folder import CHECKPOINT, METRICS
from metagmvae.infra.tune.sweep_folder import SweepFolder, SweepPlan
from metagmvae.infra.tune.sweep_state import SweepState
from metagmvae.pipelines.shards.dataset import Dataset

SPACE = "train.components = {range=[2, 9]}\ntrain.set_size = {choice=[4, 8]}\ntrain.em_iterations = {choice=[1, 2]}"


def new_plan(folder: Path, dataset: Dataset, space: str = SPACE) -> SweepPlan:
    """The plan of a random search."""
    (folder / "mine.toml").write_text(space)
    small = {"train.steps": 20, "validation.every": 10, "data.uri": dataset.uri, "train.samples": 4}
    base = load_settings("omniglot-5way", pairs(small))
    return SweepPlan("mine", base, load_space(folder / "mine.toml"), "random", "none", 0, "5w1s")


def open_sweep(plan, dataset, root, trials=6, *, resume=False, **more):
    """The state of a new or resumed sweep in `root`."""
    folder = SweepFolder(root)
    folder.check(resume)
    folder.create()
    folder.write_or_check_plan(plan, dataset)
    return SweepState(plan, folder, dataset, trials, **more)


def train(sweep, number, accuracies):
    """Write what a trial writes: a metric line at every tenth step, and a checkpoint."""
    folder = sweep.folder.trial_folder(number)
    with open(folder / METRICS, "a") as file:
        for index, accuracy in enumerate(accuracies):
            score = {
                "global_step": 10 * (index + 1),
                "loss": 1.0,
                "validation/5w1s": accuracy,
                "validation/5w1s_ci95": 0.01,
            }
            line = {"stage": "meta", "step": 10 * (index + 1), "elapsed_s": index + 1.0, "checkpoint": 1}
            file.write(json.dumps(line | score) + "\n")
    (folder / CHECKPOINT).write_bytes(b"state")


def run_next(sweep, accuracies):
    """Run the next trial; with fewer than two accuracies it is stopped early. Return its number."""
    number = sweep.next_trial()
    train(sweep, number, accuracies)
    sweep.end_trial(number)
    return number
