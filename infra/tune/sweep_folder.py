"""The folder of a sweep. It holds everything that a resume needs; Ray's own state and MLflow may be lost.

    sweep.json        plan: space, base settings, search method, seed, fingerprints of code and data
    trials.jsonl      one line per trial that has ended (`evaluation.sweeps.trials`)
    trials/00012/     run folder of a trial, created when it is accepted: settings, metric lines, checkpoint
    best.toml         written at the end: the best settings, for `metagmvae train`

A trial with a line in the table has ended. A trial with a folder but no line is unfinished and continues from its
checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.configs.load import SettingsError, differences, settings_from_json, to_json
from metagmvae.configs.schema import Settings
from metagmvae.configs.search_space import Space
from metagmvae.evaluation.sweeps.record import SWEEP
from metagmvae.evaluation.sweeps.trials import TRIALS, CurvePoint, Trial, read_trials, to_json_lines
from metagmvae.infra.runs.run_folder import METRICS, RAY_FOLDER, SETTINGS, TRAINING_LOCK, read_lines, read_settings
from metagmvae.infra.tune.code_version import changed_parts, code_fingerprint, extension_fingerprint
from metagmvae.pipelines.files import atomic_file, read_json, write_json
from metagmvae.pipelines.output_target import check_output_folder
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset

if TYPE_CHECKING:
    from metagmvae.infra.tune.search import Search


TRIAL_FOLDERS = "trials"
REASON = "failed.txt"
"""File in a trial's folder: one line, why its training failed."""


@dataclass(frozen=True)
class SweepPlan:
    """Everything that decides the results of a sweep. A resume requires an equal plan."""

    name: str
    base: Settings
    space: Space
    search: Search
    scheduler: str
    seed: int
    task: str
    """Few-shot task whose validation accuracy ranks the trials, for example "5w1s"."""

    def to_dict(self, dataset: Dataset) -> dict[str, Any]:
        """The content of `sweep.json`."""
        return {
            "version": 1,
            "name": self.name,
            "task": self.task,
            "search": self.search,
            "scheduler": self.scheduler,
            "seed": self.seed,
            "space": self.space.to_dict(),
            "base": json.loads(to_json(self.base)),
            "data": dataset.uri,
            "data_fingerprint": dataset.fingerprint,
            "code": code_fingerprint() | extension_fingerprint(self.base),
        }


class SweepFolder:
    """Reads and writes the folder. Only the process that holds the folder's lock may write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.table = root / TRIALS

    def check(self, resume: bool) -> None:
        """Check that the folder does not exist, is empty, or holds the sweep to resume.

        Raises:
            DataError: the folder is not empty, is not the folder of a sweep, or cannot be written.
        """
        check_output_folder(self.root.absolute(), f"--out {self.root}")
        names = {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()
        names -= {TRAINING_LOCK, RAY_FOLDER}
        if not any((self.root / TRIAL_FOLDERS).glob("*")):
            names -= {TRIAL_FOLDERS}  # of a sweep that has not started
        if names and not resume:
            raise DataError(f"{self.root}: not empty; continue its sweep with --resume, or give another --out DIR")
        if names and SWEEP not in names:
            raise DataError(f"{self.root}: not the folder of a sweep (no {SWEEP}); give another --out DIR")

    def create(self) -> None:
        """Create the folder.

        Raises:
            DataError: it cannot be created.
        """
        try:
            (self.root / TRIAL_FOLDERS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.root}: cannot be created ({error.strerror}); give another --out DIR") from error

    def clear(self) -> None:
        """Delete the content of a sweep without trials. The folder and its lock, which is held, remain."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != TRAINING_LOCK:
                path.unlink()

    def write_or_check_plan(self, plan: SweepPlan, dataset: Dataset) -> None:
        """Write the plan of a new sweep, or compare it with the plan in the folder, see `check_plan`."""
        from metagmvae.evaluation.provenance import provenance

        if (self.root / SWEEP).exists():
            self.check_plan(plan, dataset)
        else:
            write_json(self.root / SWEEP, plan.to_dict(dataset) | {"environment": provenance()})

    def check_plan(self, plan: SweepPlan, dataset: Dataset) -> None:
        """Compare a plan with the one in the folder, if it has one.

        Raises:
            SettingsError: something that decides the results has changed; the message names it.
            DataError: the plan in the folder cannot be read.
        """
        path = self.root / SWEEP
        if not path.exists():
            return
        try:
            changes = _plan_changes(read_json(path), plan.to_dict(dataset))
        except (KeyError, TypeError, AttributeError, SettingsError) as error:
            message = str(error) if isinstance(error, SettingsError) else "a value has the wrong type"
            message = f"{error.args[0]} is missing" if isinstance(error, KeyError) else message
            raise DataError(
                f"{path}: not a plan that this version can read ({message}); give another --out DIR"
            ) from error
        if changes:
            raise SettingsError(f"{self.root}: cannot resume, the sweep has changed ({'; '.join(changes)})")

    def trial_folder(self, number: int) -> Path:
        """Run folder of a trial."""
        return self.root / TRIAL_FOLDERS / f"{number:05d}"

    def create_trial(self, number: int, settings: Settings) -> None:
        """Create the run folder of a trial that will run."""
        folder = self.trial_folder(number)
        folder.mkdir()
        write_json(folder / SETTINGS, json.loads(to_json(settings)))

    def trial_settings(self, number: int) -> Settings:
        """Settings of a trial."""
        return read_settings(self.trial_folder(number))

    def repair(self) -> None:
        """Delete what a killed process left incomplete: temporary files, a truncated last line, and trial folders
        without settings.

        Only for the process that holds the lock: in a running sweep such files are being written.
        """
        for path in self.root.glob(".*.tmp"):
            path.unlink()
        content = self.table.read_bytes() if self.table.exists() else b""
        if not content.endswith(b"\n") and content:
            with atomic_file(self.table) as file:
                file.write(content[: content.rfind(b"\n") + 1])
        for folder in (self.root / TRIAL_FOLDERS).iterdir():
            if folder.is_dir() and not (folder / SETTINGS).is_file():
                shutil.rmtree(folder)  # its number is proposed again, and it may contain a temporary file

    def unfinished(self, ended: Iterable[int]) -> list[int]:
        """Numbers of the trials that were accepted and have not ended; a folder without settings does not count."""
        numbers = {int(path.parent.name) for path in (self.root / TRIAL_FOLDERS).glob(f"*/{SETTINGS}")}
        return sorted(numbers - set(ended))

    def curve(self, number: int, task: str) -> tuple[CurvePoint, ...]:
        """Validations of a trial, from its metric lines."""
        key = f"validation/{task}"
        return tuple(
            CurvePoint(
                step=int(line["step"]),
                accuracy=float(line[key]),
                ci95=float(line[f"{key}_ci95"]) if f"{key}_ci95" in line else None,
                seconds=float(line["elapsed_s"]),
            )
            for line in read_lines(self.trial_folder(number) / METRICS)
            if key in line
        )

    def training_progress(self, number: int) -> tuple[int, float]:
        """Steps of meta-training that a trial has done, and its training time in seconds."""
        lines = read_lines(self.trial_folder(number) / METRICS)
        if not lines:
            return 0, 0.0
        return (int(lines[-1]["step"]) if lines[-1]["stage"] == "meta" else 0), float(lines[-1]["elapsed_s"])

    def trials(self) -> list[Trial]:
        """Trials that have ended."""
        return read_trials(self.table)

    def append_trial(self, trial: Trial) -> None:
        """Append the line of a trial that has ended. The line is on disk when this returns.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        try:
            with open(self.table, "a", encoding="utf-8") as file:
                file.write(to_json_lines([trial]))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{self.table}: cannot be written ({error.strerror}); continue with --resume") from error

    def rewrite_trials(self, trials: Iterable[Trial]) -> None:
        """Replace the table."""
        with atomic_file(self.table) as file:
            file.write(to_json_lines(trials).encode())


def _plan_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences between two plans, as `name: new, old`."""
    changes = [f"{k}: {new[k]!r}, {old[k]!r}" for k in ("task", "search", "scheduler", "seed") if new[k] != old[k]]
    for key in sorted(old["space"].keys() | new["space"].keys()):
        ours, theirs = (json.dumps(plan["space"].get(key, "not varied")) for plan in (new, old))
        if ours != theirs:
            changes.append(f"space {key}: {ours}, {theirs}")
    changes += differences(*(settings_from_json(json.dumps(plan["base"])) for plan in (new, old)))
    if new["data_fingerprint"] != old["data_fingerprint"]:
        changes.append(f"data: {new['data']} differs in content from {old['data']}")
    code = changed_parts(new["code"], old["code"])
    return changes + ([f"code: {', '.join(code)}"] if code else [])
