"""Launchers of processes, such as torchrun: a command of this package is one process, and Ray starts its workers."""

from __future__ import annotations

import os

from metagmvae.configs.load import SettingsError

TRAINING = "--set run.engine=ray --set run.workers={count}"
SEVERAL = {
    "train": TRAINING,
    "pretrain": TRAINING,
    "tune": "--workers-at-once {count}",
    "prepare": "--workers {count}",
    "features": "--workers {count}",
}
"""Options of the commands that can use several processes."""


def check_launcher(command: str) -> None:
    """Refuse to run as one of several processes that torchrun or a launcher with its variables has started.

    Each of them would do the whole work, and write the same files. In a worker of Ray no command runs.

    Raises:
        SettingsError: naming the options that start several processes.
    """
    count = os.environ.get("WORLD_SIZE", "")
    if "RANK" not in os.environ or not count.isdigit() or int(count) < 2:
        return
    options = SEVERAL.get(command, "").format(count=count)
    remedy = f"start it once, without the launcher, and give {options}" if options else "start it without the launcher"
    raise SettingsError(
        f"RANK and WORLD_SIZE={count} are set: a launcher such as torchrun has started {count} processes, and each "
        f"of them would do the whole work; {remedy}"
    )


def tasks_of_slurm() -> str:
    """The hint for a folder in use if srun has started this process several times; empty if it has not.

    Tasks of one step may work in folders of their own, so this alone is no error.
    """
    count = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if not count.isdigit() or int(count) < 2:
        return ""
    return f" (srun has started {count} tasks; start one: srun --ntasks=1, and {TRAINING.format(count=count)})"
