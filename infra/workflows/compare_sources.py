"""Reads the items of `metagmvae compare`: run folders, result files, sweeps, registered versions, rows of the paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metagmvae.configs.load import settings_from_json
from metagmvae.evaluation.comparison.formatting import Task, parse_task
from metagmvae.evaluation.comparison.paper import DATA, PublishedResult, published_rows
from metagmvae.evaluation.comparison.result_files import read_recorded, recorded_name, rows_of
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, Score, compared_settings, decisive_settings
from metagmvae.evaluation.comparison.validation_rows import (
    ComparedItem,
    newest_validation,
    validation_protocol,
    validation_row,
)
from metagmvae.evaluation.encoders.named_encoder import is_encoder_name
from metagmvae.evaluation.sweeps.record import SWEEP, read_plan
from metagmvae.evaluation.sweeps.trials import TRIALS, Trial, read_trials
from metagmvae.infra.runs.run_folder import METRICS, RESULTS, SETTINGS, read_lines, read_record, read_settings
from metagmvae.infra.workflows.compare_versions import version_items
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.package import CARD

FORMS = (
    "run folders, result files (*.json), sweep folders, models:/NAME, models:/NAME@ALIAS, models:/NAME/VERSION, "
    "timm:NAME, torchvision:NAME, paper:omniglot, paper:mini-imagenet, or paper:DATASET/ROW"
)


def read_items(refs: Sequence[str], top: int = 1) -> list[ComparedItem]:
    """Read what the references name. Result files of one model in one folder make one item.

    Args:
        refs: in the order of the rows.
        top: number of trials of each sweep, the best first.

    Raises:
        DataError: a reference names nothing that can be compared, or two references name the same thing.
        TrackingError: the registry cannot be reached.
    """
    items: list[ComparedItem] = []
    files: dict[tuple[Path, str], list[Path]] = {}
    for ref in refs:
        path = Path(ref)
        if path.suffix == ".json" and path.is_file():
            model = (path.resolve().parent, recorded_name(path))
            if model not in files:
                items.append(ComparedItem(ref, model[1], (), identity=str(model)))
            files.setdefault(model, []).append(path)
        else:
            items += _read(ref, top)
    by_identity = {str(model): paths for model, paths in files.items()}
    items = [
        _with_results(item, by_identity[item.identity]) if item.identity in by_identity else item for item in items
    ]
    _check_once(items)
    return _with_distinct_names(items)


def _check_once(items: Sequence[ComparedItem]) -> None:
    """Refuse two references to the same thing: a model would be compared with itself."""
    refs: dict[str, str] = {}
    for item in items:
        identity = item.identity or item.ref
        if identity in refs:
            raise DataError(f"{item.ref}: the same as {refs[identity]}; give each one once")
        refs[identity] = item.ref


def _read(ref: str, top: int) -> list[ComparedItem]:
    if ref.startswith("paper:"):
        return [ComparedItem(row.ref, row.name, (_published(row),)) for row in published_rows(ref)]
    if ref.startswith("models:"):
        return version_items(ref)
    path = Path(ref)
    if (path / SWEEP).is_file():
        return [_sweep(ref, path, top)]
    if (path / SETTINGS).is_file():
        return [_run(ref, path)]
    if is_encoder_name(ref):
        return [ComparedItem(ref, ref, (), is_model=True)]
    if ref.startswith("runs:") or (path / CARD).is_file() or path.suffix == ".pt":
        return [ComparedItem(ref, path.name, (), is_model=True)]
    raise DataError(f"{ref}: not found or cannot be compared; give {FORMS}")


def _with_results(item: ComparedItem, files: list[Path]) -> ComparedItem:
    """Add the rows of the result files of one model."""
    resolved = [file.resolve() for file in files]
    for number, file in enumerate(resolved):
        if file in resolved[:number]:
            raise DataError(f"{files[number]}: given twice; give each file once")
    source = item.ref if len(files) == 1 else f"{files[0].parent}/{item.name}-*.json, {len(files)} files"
    tasks = [task for file in files for task in read_recorded(file)]
    return replace(item, rows=tuple(rows_of(item.name, "results", source, tasks)))


def _run(ref: str, path: Path) -> ComparedItem:
    """Read the stored results of a run, or its newest validation if there are none."""
    name = path.resolve().name
    lines = tuple(read_lines(path / METRICS))
    tasks = [task for file in sorted((path / RESULTS).glob("*.json")) for task in read_recorded(file)]
    rows = rows_of(name, "run", ref, tasks) or _validated(ref, name, path, lines)
    return ComparedItem(ref, name, tuple(rows), lines, is_model=True, identity=str(path.resolve()))


def _validated(ref: str, name: str, path: Path, lines: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Make a row of the newest validation during training."""
    settings, record = read_settings(path), read_record(path)
    mode = "inductive" if record.get("kind") == "encoder" else "transductive"
    newest = newest_validation(lines)
    if newest is None:
        return []
    return [validation_row(name, "run", ref, settings, newest, mode, record.get("data_fingerprint"))]


def _sweep(ref: str, path: Path, top: int) -> ComparedItem:
    """Read the best trials of a sweep by their newest validation."""
    plan = read_plan(path, with_settings=True)
    name, task_name, base = plan["name"], plan["task"], json.dumps(plan["base"])
    task = parse_task(task_name)
    if task is None:
        raise DataError(f'{path / SWEEP}: task is {task_name!r}; it must be like "5w1s"')
    trials = [trial for trial in read_trials(path / TRIALS) if trial.curve]
    if not trials:
        raise DataError(f"{ref}: no trial of the sweep has a validation result yet")
    best = sorted(trials, key=lambda trial: -trial.curve[-1].accuracy)[:top]
    settings, data = settings_from_json(base), plan.get("data_fingerprint")
    protocol = validation_protocol(settings, "transductive", data)
    compared = compared_settings(settings.model_dump(mode="json"), data)
    rows = tuple(_trial(ref, name, task, protocol, compared, trial) for trial in best)
    lines = tuple(
        {
            "global_step": point.step,
            "elapsed_s": point.seconds,
            f"validation/{task_name}": point.accuracy,
            **({} if point.ci95 is None else {f"validation/{task_name}_ci95": point.ci95}),
        }
        for point in best[0].curve
    )
    return ComparedItem(ref, rows[0].name, rows, lines, identity=str(path.resolve()))


def _trial(ref: str, name: str, task: Task, protocol: EvalProtocol, base: dict[str, Any], trial: Trial) -> Row:
    last = trial.curve[-1]
    scores = {task: Score(last.accuracy, last.ci95)}
    settings = base | decisive_settings(trial.settings)
    return Row(f"{name}, trial {trial.number}", "trial", ref, protocol, scores, last.seconds, last.step, settings)


def _published(row: PublishedResult) -> Row:
    protocol = EvalProtocol(row.mode, "test", DATA[row.dataset], row.query, 1000, None)
    scores = {
        task: Score(value / 100, row.ci95[task] / 100 if task in row.ci95 else None)
        for task, value in row.percent.items()
    }
    return Row(f"paper: {row.name}", "published", f"{row.ref} ({row.where})", protocol, scores)


def _with_distinct_names(items: list[ComparedItem]) -> list[ComparedItem]:
    """Replace a name that two items share by their references."""
    names = [item.name for item in items]
    return [
        replace(
            item,
            name=item.ref,
            rows=tuple(replace(row, name=row.name.replace(item.name, item.ref, 1)) for row in item.rows),
        )
        if names.count(item.name) > 1
        else item
        for item in items
    ]
