"""Runs the jobs of a table, here one after another or as tasks, under one parent run in MLflow."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.paper_tables.match_results import ResultFolder, read_result_folder
from metagmvae.evaluation.paper_tables.table_structure import TablePart
from metagmvae.evaluation.provenance import COMMAND
from metagmvae.infra.runs.run_folder import SETTINGS, read_settings
from metagmvae.infra.tables.run_job import JobOutcome, planned_steps, run_job
from metagmvae.infra.tables.table_jobs import JobList, PlannedSteps, TableJob, plan_jobs, recorded_steps
from metagmvae.infra.tables.table_request import GivenData, TableRequest, check_request
from metagmvae.infra.tables.table_tracking import TableTracker
from metagmvae.pipelines.records import DataError, MapTasks

LOG = logging.getLogger(__name__)


def run_table(
    request: TableRequest,
    parts: Sequence[TablePart],
    given: Sequence[GivenData],
    mapper: Callable[[], AbstractContextManager[MapTasks | None]],
    *,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train and evaluate what has no result yet; return `ran`, `failed`, `left_out` and `done_before`.

    `mapper` opens what runs the trainings as tasks; None: they run here, one after another. With `dry_run`, `would_run`
    is returned instead of `ran`, and nothing is written.

    Raises:
        DataError: no dataset is given.
        SettingsError: `--set` changes what it may not change.
        KeyboardInterrupt: a signal stopped the training; the same command continues.
    """
    check_request(request)
    if not given:
        raise DataError(f"table {request.name} --run: name the datasets with --data")
    is_new = not request.results.exists()
    folder = ResultFolder((), ()) if is_new else read_result_folder(request.results)
    plan = plan_jobs(parts, folder, given, request)
    if dry_run:
        jobs = [
            {"settings": job.name, "system": "; ".join(job.rows), "tasks": len(job.evaluations)} for job in plan.jobs
        ]
        return {"would_run": jobs} | _unable(plan)
    request.results.mkdir(parents=True, exist_ok=True)
    for number, job in enumerate(plan.jobs, 1):
        LOG.info("%d of %d: %s, for %s", number, len(plan.jobs), job.name, "; ".join(job.rows))
    if not plan.jobs:
        return _answer(plan, [])
    if any(part.base for part in parts):
        steps = recorded_steps(parts, folder, given, request) or _begun_steps(plan.jobs) or planned_steps(plan.jobs[0])
        plan = replace(plan, jobs=tuple(replace(job, steps=steps) for job in plan.jobs))
    with mapper() as map_tasks:
        return _answer(plan, _run_all(request, plan, map_tasks))


def _begun_steps(jobs: Sequence[TableJob]) -> PlannedSteps | None:
    """Steps of a training that an earlier call has begun; None: there is none."""
    begun = (read_settings(job.run_dir) for job in jobs if (job.run_dir / SETTINGS).exists())
    return next((PlannedSteps(s.pretrain.steps, s.train.steps, s.train.checkpoint_every) for s in begun), None)


def _run_all(request: TableRequest, plan: JobList, map_tasks: MapTasks | None) -> list[JobOutcome]:
    settings = load_settings(plan.jobs[0].preset, plan.jobs[0].overrides)
    command = COMMAND.get() or sys.argv[1:]
    outcomes = []
    with TableTracker(settings.tracking, request.name, request.out) as tracker:
        try:
            for outcome in _outcomes(plan.jobs, command, map_tasks):
                outcomes.append(outcome)
                tracker.add(outcome.run_dir)
                state = f"failed: {outcome.error}" if outcome.error else f"done in {outcome.seconds:,.0f} s"
                LOG.info("%s: %s", outcome.name, state)
        except KeyboardInterrupt as stop:
            stop.add_note("the same command continues")
            raise
        tracker.failed = any(outcome.error for outcome in outcomes)
    return outcomes


def _outcomes(jobs: Sequence[TableJob], command: Sequence[str], map_tasks: MapTasks | None) -> Iterator[JobOutcome]:
    """Run the jobs here one after another, or as tasks."""
    if map_tasks is None:
        yield from (run_job(job, command) for job in jobs)
        return
    for outcome in map_tasks(run_job, [(job, tuple(command)) for job in jobs]):
        assert isinstance(outcome, JobOutcome)
        yield outcome


def _answer(plan: JobList, outcomes: Sequence[JobOutcome]) -> dict[str, Any]:
    ran = [
        {"settings": o.name, "seconds": round(o.seconds, 1), "files": list(o.files)} for o in outcomes if not o.error
    ]
    failed = [{"system": "; ".join(o.rows), "settings": o.name, "reason": o.error} for o in outcomes if o.error]
    unable = _unable(plan)
    return {"ran": ran} | unable | {"failed": failed + unable["failed"]}


def _unable(plan: JobList) -> dict[str, Any]:
    """Part of the answer: what cannot be run, and what need not be run."""
    lists = {"failed": list(map(dict, plan.failed)), "left_out": list(map(dict, plan.left_out))}
    return {**lists, "done_before": plan.done}
