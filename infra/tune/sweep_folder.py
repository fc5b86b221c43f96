"""A sweep's folder, which is the truth about the sweep: Ray's own state and MLflow can be lost at any moment.

    sweep.json        the plan: space, base settings, search, seed, fingerprints of code and data
    trials.jsonl      a line for each trial that has ended (`evaluation.sweeps.trials`)
    trials/00012/     run folder of a trial, made when it is proposed: settings, metric lines, checkpoint
    best.toml         at the end: the best settings, for `metagmvae train`

So a trial is in one of three places: a line in the table (ended), a folder without a line (to go on with, from its
checkpoint), or neither (not proposed yet).
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
from metagmvae.evaluation.sweeps.trials import TRIALS, CurvePoint, Trial, to_json_lines, read_trials
from metagmvae.infra.runs.run_folder import TRAINING_LOCK
from metagmvae.infra.runs.run_folder import METRICS, SETTINGS, read_lines
from metagmvae.infra.tune.code_version import changed, code_fingerprint
from metagmvae.pipelines.files import atomic_file, read_json, write_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset

if TYPE_CHECKING:
    from metagmvae.infra.tune.search import Search


SWEEP = "sweep.json"
FOLDERS = "trials"
REASON = "failed.txt"
"""In a trial's folder: one line, why its training failed."""


@dataclass(frozen=True)
class SweepPlan:
    """What makes a sweep the sweep that it is; a resumed one must have the same."""

    name: str
    base: Settings
    space: Space
    search: Search
    scheduler: str
    seed: int
    task: str
    """By whose validation accuracy trials are judged: "5w1s"."""

    def record(self, dataset: Dataset) -> dict[str, Any]:
        """As `sweep.json` keeps it."""
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
            "code": code_fingerprint(),
        }


class SweepFolder:
    """Reads and writes the folder; one process at a time, which holds it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.table = root / TRIALS

    def make(self, resume: bool) -> None:
        """Make the folder, or refuse one that is something else.

        Raises:
            DataError: it is not empty, not a sweep's, or cannot be made.
        """
        there = [path.name for path in self.root.iterdir()] if self.root.is_dir() else []
        if set(there) - {TRAINING_LOCK} and not resume:
            raise DataError(f"{self.root}: not empty; go on with --resume, or choose another folder: --out DIR")
        if set(there) - {TRAINING_LOCK} and SWEEP not in there:
            raise DataError(f"{self.root}: not a sweep's folder (no {SWEEP}); choose another one: --out DIR")
        try:
            (self.root / FOLDERS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.root}: cannot be made ({error.strerror}); choose another one: --out DIR") from error

    def clear(self) -> None:
        """Take away all that a sweep without trials has left; the folder itself stays, as it is held."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != TRAINING_LOCK:
                path.unlink()

    def keep(self, plan: SweepPlan, dataset: Dataset) -> None:
        """Keep the plan of a new sweep, or compare it with the one that is there.

        Raises:
            SettingsError: something that decides the outcome has changed since, naming what.
            DataError: the plan that is there cannot be read.
        """
        from metagmvae.evaluation.provenance import provenance

        new, path = plan.record(dataset), self.root / SWEEP
        if not path.exists():
            write_json(path, new | {"environment": provenance()})
            return
        try:
            found = _changes(read_json(path), new)
        except (KeyError, TypeError, AttributeError, SettingsError) as error:
            what = f"{type(error).__name__}: {error}" if not isinstance(error, SettingsError) else str(error)
            raise DataError(
                f"{path}: not the plan of a sweep that this version knows ({what}); choose another folder: --out DIR"
            ) from error
        if found:
            raise SettingsError(f"{self.root}: cannot resume, this is another sweep now ({'; '.join(found)})")

    def folder(self, number: int) -> Path:
        """Run folder of a trial."""
        return self.root / FOLDERS / f"{number:05d}"

    def open_trial(self, number: int, settings: Settings) -> None:
        """Make the run folder of a trial that is going to take a slot."""
        folder = self.folder(number)
        folder.mkdir()
        write_json(folder / SETTINGS, json.loads(to_json(settings)))

    def settings(self, number: int) -> Settings:
        return settings_from_json((self.folder(number) / SETTINGS).read_text(encoding="utf-8"))

    def mend(self) -> None:
        """Take away what a kill left half-written: a cut-off last line, folders of trials without settings.

        Only for the process that holds the folder: of a sweep that runs, these are being written just now.
        """
        content = self.table.read_bytes() if self.table.exists() else b""
        if not content.endswith(b"\n") and content:
            with atomic_file(self.table) as file:
                file.write(content[: content.rfind(b"\n") + 1])
        for folder in (self.root / FOLDERS).iterdir():
            if folder.is_dir() and not (folder / SETTINGS).is_file():
                shutil.rmtree(folder)  # its number is drawn again, and a kill may have left a temporary file there

    def unfinished(self, ended: Iterable[int]) -> list[int]:
        """Trials that were proposed and have not ended, in order; a folder without settings is no trial yet."""
        numbers = {int(path.parent.name) for path in (self.root / FOLDERS).glob(f"*/{SETTINGS}")}
        return sorted(numbers - set(ended))

    def curve(self, number: int, task: str) -> tuple[CurvePoint, ...]:
        """Validations of a trial, from its metric lines."""
        key = f"validation/{task}"
        return tuple(
            CurvePoint(
                step=int(line["step"]),
                accuracy=float(line[key]),
                ci95=float(line[f"{key}_ci95"]),
                seconds=float(line["elapsed_s"]),
            )
            for line in read_lines(self.folder(number) / METRICS)
            if key in line
        )

    def trained(self, number: int) -> tuple[int, float]:
        """Steps of meta-training and seconds that a trial has behind it."""
        lines = read_lines(self.folder(number) / METRICS)
        if not lines:
            return 0, 0.0
        return (int(lines[-1]["step"]) if lines[-1]["stage"] == "meta" else 0), float(lines[-1]["elapsed_s"])

    def trials(self) -> list[Trial]:
        """Trials that have ended."""
        return read_trials(self.table)

    def record(self, trial: Trial) -> None:
        """Add the line of a trial that has ended; it is on disk when this returns.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        try:
            with open(self.table, "a", encoding="utf-8") as file:
                file.write(to_json_lines([trial]))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{self.table}: cannot be written ({error.strerror}); go on with --resume") from error

    def rewrite(self, trials: Iterable[Trial]) -> None:
        """Replace the table."""
        with atomic_file(self.table) as file:
            file.write(to_json_lines(trials).encode())


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two plans, as `what: new, old`."""
    found = [f"{k}: {new[k]!r}, {old[k]!r}" for k in ("task", "search", "scheduler", "seed") if new[k] != old[k]]
    for key in sorted(old["space"].keys() | new["space"].keys()):
        ours, theirs = (json.dumps(plan["space"].get(key, "not varied")) for plan in (new, old))
        if ours != theirs:
            found.append(f"space {key}: {ours}, {theirs}")
    found += differences(*(settings_from_json(json.dumps(plan["base"])) for plan in (new, old)))
    if new["data_fingerprint"] != old["data_fingerprint"]:
        found.append(f"data: {new['data']} holds other data than {old['data']} did")
    code = changed(new["code"], old["code"])
    return found + ([f"code: {', '.join(code)}"] if code else [])
