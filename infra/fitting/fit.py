"""`metagmvae fit`: from a folder of pictures to a classifier and a report, by the commands that exist.

The output folder is the model package (`model.json`, `model.safetensors`). It also holds `report.html`, `fit.json`
(what was decided, measured and found), and the folders `data` (shards), `run`, `results` and `example` (files of an
episode).
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from metagmvae.configs.mlflow_names import model_name
from metagmvae.evaluation.provenance import provenance
from metagmvae.evaluation.uncertainty.augmented_accuracy import evaluate_augmented, result_record
from metagmvae.infra.classification.example_files import write_example
from metagmvae.infra.fitting.fit_plan import FitPlan, episode_sizes, format_seconds, make_plan
from metagmvae.infra.fitting.fit_report import fit_result, write_fit_report
from metagmvae.infra.fitting.fit_schedule import make_schedule
from metagmvae.infra.fitting.fit_state import (
    DATA,
    EXAMPLE,
    LABELLED,
    REPORT,
    RESULTS,
    RUN,
    STATE,
    FitRequest,
    FitState,
    check_same,
    claimed_folder,
    copy_package,
    read_state,
)
from metagmvae.infra.runs.run_folder import SETTINGS
from metagmvae.infra.runs.training_speed import measure_episode_s
from metagmvae.pipelines.files import read_json, write_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.package import load_model

LOG = logging.getLogger(__name__)
RunCommand = Callable[[Sequence[str]], Mapping[str, Any]]
"""Runs a command of metagmvae from its words; returns its answer."""


def run_fit(request: FitRequest, run: RunCommand) -> dict[str, Any]:
    """Prepare, train, evaluate, and write the model package and the report; continue where an earlier call stopped.

    Args:
        request: arguments of the command.
        run: runs the other commands.

    Returns:
        As `fit_report.fit_result`.

    Raises:
        DataError: the pictures or the output folder cannot be used; nothing is left behind.
    """
    started = time.monotonic()
    out = request.out.absolute()
    plan, stored = plan_fit(request)
    if stored is not None and stored.result is not None:
        return stored.result | {"state": "finished earlier, nothing was done; give another --out for a new model"}
    with claimed_folder(out):
        state = stored or FitState(plan=plan)
        fit = _Fit(out, state, run, started - sum(state.seconds.values()))
        try:
            fit.run_all(resumed=stored is not None)
        except KeyboardInterrupt as stop:
            stop.add_note(f"the same command continues in {out}")
            raise
    assert fit.state.result is not None
    return fit.state.result


def plan_fit(request: FitRequest) -> tuple[FitPlan, FitState | None]:
    """Look at the pictures and decide; return the plan and the state of an earlier call. Nothing is written.

    Raises:
        DataError: as `run_fit`.
    """
    out, pictures = request.out.absolute(), request.pictures.absolute()
    if out.resolve().is_relative_to(pictures.resolve()):
        raise DataError(f"--out {out}: lies in the folder of the pictures; choose a folder outside of it")
    stored = read_state(out)
    plan = make_plan(request.pictures, request.labelled, request.budget_s, request.seed, unlabelled=request.unlabelled)
    if stored is not None:
        check_same(out, stored.plan, plan)
    return plan, stored


@dataclass
class _Fit:
    """One call. `state` is written after each part."""

    out: Path
    state: FitState
    run_command: RunCommand
    started: float
    """`time.monotonic` at the start, moved back by the seconds of earlier calls."""

    @property
    def plan(self) -> FitPlan:
        return self.state.plan

    def run_all(self, *, resumed: bool) -> None:
        """Do what is left."""
        for line in [*self.plan.found, *self.plan.will_do]:
            LOG.info(line)
        if resumed:
            LOG.info("continuing; finished parts are not repeated")
        self._save()
        self._prepare()
        dataset = Dataset.open(self.out / DATA)
        shots = self._tasks(dataset, "test")[1] if _labelled(dataset, "test") else [1, 5]
        self._schedule(dataset, shots)
        self._train(dataset)
        copy_package(self.out)
        evaluated = self._evaluate_all(dataset)
        example = self._classify_example(dataset)
        self._report(dataset, evaluated, example)

    def _command(self, *words: str) -> Mapping[str, Any]:
        """Print and run a command, and record it."""
        line = shlex.join(["metagmvae", *words])
        if line not in self.state.commands:
            self.state.commands.append(line)
            self._save()
        LOG.info(f"$ {line}")
        return self.run_command(words)

    def _prepare(self) -> None:
        if (self.out / DATA / "dataset.json").exists():
            return
        plan = self.plan
        words = ["prepare", "folder", "--source", plan.pictures, "--out", str(self.out / DATA)]
        words += ["--size", str(plan.size), "--channels", str(plan.data_channels), "--seed", str(plan.seed)]
        if plan.invert:
            words.append("--invert")
        if plan.unlabelled:
            words.append("--unlabelled")
        elif plan.classes and not plan.split_folders:
            words += ["--validation-classes", str(plan.validation_classes), "--test-classes", str(plan.test_classes)]
        with self._timed("prepare"):
            answer = self._command(*words)
        files = answer["files"]
        if files["left_out"]:
            LOG.info(f"{files['left_out']} of {files['seen']} files were left out: {answer['left_out']}")

    def _schedule(self, dataset: Dataset, shots: Sequence[int]) -> None:
        if self.state.schedule is not None:
            return
        plan = self.plan
        with self._timed("measure speed"):
            schedule = make_schedule(plan.preset, dataset, plan.budget_s, self.started, plan.seed, shots)
        self.state.schedule = schedule
        self._save()
        LOG.info(
            f"measured on {schedule.device}: {schedule.pretrain_step_s:.3f} s a step of {schedule.pretrain_batch} "
            f"images; {schedule.pretrain_steps:,} steps of contrastive pre-training and {schedule.meta_steps} of "
            "meta-training"
        )
        if not schedule.fits:
            needed = schedule.used_s + schedule.reserved_s + schedule.pretrain_steps * schedule.pretrain_step_s
            LOG.info(
                f"warning: {format_seconds(plan.budget_s)} is too short for a useful training, which gets the least "
                f"number of steps; all will take about {format_seconds(needed)}"
            )

    def _train(self, dataset: Dataset) -> None:
        if "train" in self.state.seconds:
            return
        assert self.state.schedule is not None
        overrides = [f"data.uri={self.out / DATA}", f"run.out={self.out / RUN}", *self.state.schedule.overrides]
        overrides.append(f"train.seed={self.plan.seed}")
        if _labelled(dataset, "validation"):
            way, shots, query = self._tasks(dataset, "validation")
            overrides += [f"validation.way={way}", f"validation.shots={shots}", f"validation.query={query}"]
            overrides.append(f"validation.every={self.state.schedule.meta_steps}")
        else:
            overrides.append("validation.every=0")
        registered = model_name("{data}", self.plan.pictures, self.out.name)
        overrides += [f"name={json.dumps(self.out.name)}", f"tracking.register_as={json.dumps(registered)}"]
        overrides += ["tracking.enabled=false", "run.figures=false"]
        words = ["train", self.plan.preset, *(word for o in overrides for word in ("--set", o))]
        resumed = (self.out / RUN / SETTINGS).exists()
        with self._timed("train"):
            self._command(*words, *(["--resume"] if resumed else []))

    def _tasks(self, dataset: Dataset, split: str) -> tuple[int, list[int], int]:
        """Way, shots and queries per class of a split."""
        labels = dataset.labels(split)
        return episode_sizes([int((labels == label).sum()) for label in set(labels.tolist())])

    def _evaluate_all(self, dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
        """Evaluate on the test classes and on the labelled pictures; return the records of each, by where."""
        evaluated = {}
        if _labelled(dataset, "test"):
            evaluated["test classes"] = self._evaluate(dataset, "test", "test")
        if self.plan.labelled is not None:
            folder = self.out / LABELLED
            if not (folder / "dataset.json").exists():
                size, channels = str(self.plan.size), str(self.plan.data_channels)
                words = ["prepare", "folder", "--source", self.plan.labelled, "--out", str(folder), "--size", size]
                words += ["--channels", channels, *(["--invert"] if self.plan.invert else [])]
                self._command(*words, "--validation-classes", "0", "--test-classes", "0")
            evaluated["labelled pictures"] = self._evaluate(Dataset.open(folder), "train", LABELLED)
        return evaluated or {"augmented views of training images, no classes": self._evaluate_views(dataset)}

    def _evaluate_views(self, dataset: Dataset) -> list[dict[str, Any]]:
        """Evaluate on pseudo-episodes; there is no command for it."""
        record = self.out / RESULTS / "augmented.json"
        if not record.exists():
            assert self.state.schedule is not None
            record.parent.mkdir(exist_ok=True)
            with self._timed("evaluate augmented views"):
                episodes = min(300, self.state.schedule.episodes)
                results = evaluate_augmented(load_model(self.out / RUN), dataset, "train", episodes=episodes)
                write_json(record, [result_record(result) for result in results])
        rows: list[dict[str, Any]] = read_json(record)
        return rows

    def _evaluate(self, dataset: Dataset, split: str, name: str) -> list[dict[str, Any]]:
        assert self.state.schedule is not None
        way, shots, query = self._tasks(dataset, split)
        records = []
        for position, shot in enumerate(shots):
            record = self.out / RESULTS / f"{name}-{way}way-{shot}shot.json"
            if not record.exists():
                record.parent.mkdir(exist_ok=True)
                words = ["evaluate", str(self.out / RUN), "--data", str(dataset.uri), "--split", split]
                words += ["--way", str(way), "--shot", str(shot), "--query", str(query)]
                left_s = self.plan.budget_s - sum(self.state.seconds.values())
                tasks_left = len(shots) - position + 2 * (name != LABELLED and self.plan.labelled is not None)
                episode_s = measure_episode_s(way, shot, query)
                episodes = self.state.schedule.affordable_episodes(left_s / tasks_left, episode_s)
                words += ["--episodes", str(episodes), "--baselines", "--record", str(record)]
                with self._timed(f"evaluate {name}, {shot} shot"):
                    self._command(*words)
            records.append(read_json(record))
        return records

    def _classify_example(self, dataset: Dataset) -> dict[str, Any] | None:
        """Classify some of the files as a user would; None without classes that were not trained on."""
        root = self.plan.labelled or (self.plan.pictures if _labelled(dataset, "test") else None)
        if root is None:
            return None
        keys = None if self.plan.labelled else set(dataset.index("test")["key"].to_pylist())
        class_of_file = write_example(root, self.out / EXAMPLE, keys, self.plan.seed)
        folder, figure = self.out / EXAMPLE, self.out / EXAMPLE / "predictions.png"
        words = ["--support", str(folder / "labelled"), "--query", str(folder / "queries"), "--figure", str(figure)]
        with self._timed("classify"):
            answer = self._command("classify", str(self.out), *words)
        right = sum(class_of_file[row["query"]] == row["class"] for row in answer["queries"])
        return {"figure": figure, "right": right, "queries": len(answer["queries"])}

    def _report(
        self, dataset: Dataset, evaluated: Mapping[str, list[dict[str, Any]]], example: dict[str, Any] | None
    ) -> None:
        records = [record | {"on": where} for where, rows in evaluated.items() for record in rows]
        self.state.result = fit_result(self.state, self.out, dataset, records, example)
        write_fit_report(self.out / REPORT, self.state, records, example, provenance())
        self._save()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the seconds of a block to those of a part, also if it is interrupted, and save the state at its end."""
        begin = time.monotonic()
        try:
            yield
        except BaseException:
            self.state.seconds[f"{part}, interrupted"] = time.monotonic() - begin
            raise
        finally:
            self._save()
        self.state.seconds[part] = time.monotonic() - begin
        self._save()

    def _save(self) -> None:
        write_json(self.out / STATE, self.state.model_dump(mode="json"))


def _labelled(dataset: Dataset, split: Literal["validation", "test"]) -> bool:
    """Whether a split has at least two classes."""
    part = dataset.manifest["splits"].get(split)
    return part is not None and part["classes"] >= 2
