"""What `metagmvae compare` is given, read: run folders, result files, sweeps, registered versions, the paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metagmvae.configs.load import settings_from_json
from metagmvae.evaluation.comparison.paper import DATA, PublishedResult, published_rows
from metagmvae.evaluation.comparison.result_files import FoundResults, read_recorded, recorded_name, rows_of
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, Score, decisive_settings
from metagmvae.evaluation.comparison.validation_rows import (
    ComparedItem,
    compared_settings,
    newest_validation,
    task_of,
    validation_protocol,
    validation_row,
)
from metagmvae.evaluation.sweeps.trials import TRIALS, Trial, read_trials
from metagmvae.infra.runs.run_folder import METRICS, RECORD, RESULTS, SETTINGS, read_lines
from metagmvae.infra.workflows.compare_versions import version_sources
from metagmvae.pipelines.files import read_json
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.package import CARD

SWEEP = "sweep.json"
FORMS = (
    "run folders, result files (*.json), sweep folders, models:/NAME, models:/NAME@ALIAS, models:/NAME/VERSION, "
    "paper:omniglot, paper:mini-imagenet, or paper:DATASET/ROW"
)


def read_sources(refs: Sequence[str], top: int = 1) -> list[ComparedItem]:
    """Read what the references name; result files of one model in one folder make one source.

    Args:
        refs: in the order of the rows.
        top: trials of each sweep, the best first.

    Raises:
        DataError: a reference names nothing that can be compared, or is given twice.
        TrackingError: the registry cannot be reached.
    """
    sources: list[ComparedItem] = []
    results: dict[tuple[Path, str], list[tuple[str, list[FoundResults]]]] = {}
    files: set[Path] = set()
    for ref in refs:
        path = Path(ref)
        if path.suffix == ".json" and path.is_file():
            key = (path.resolve().parent, recorded_name(path))
            if key not in results:
                sources.append(ComparedItem(ref, key[1], ()))
            if path.resolve() in files:
                raise DataError(f"{ref}: named twice; name each thing once")
            files.add(path.resolve())
            results.setdefault(key, []).append((ref, read_recorded(path)))
        else:
            sources += _read(ref, top)
    by_first = {found[0][0]: (name, found) for (_, name), found in results.items()}
    read = [_results(source, *by_first[source.ref]) if source.ref in by_first else source for source in sources]
    _check_once(read)
    return _distinct(read)


def _check_once(sources: Sequence[ComparedItem]) -> None:
    """A model is no rival of itself."""
    seen: dict[str, ComparedItem] = {}
    for source in sources:
        identity = source.identity or source.ref
        if identity in seen:
            raise DataError(f"{source.ref}: is {seen[identity].ref} again; name each thing once")
        seen[identity] = source


def _read(ref: str, top: int) -> list[ComparedItem]:
    if ref.startswith("paper:"):
        return [ComparedItem(row.ref, row.name, (_published(row),)) for row in published_rows(ref)]
    if ref.startswith("models:"):
        return version_sources(ref)
    path = Path(ref)
    if (path / SWEEP).is_file():
        return [_sweep(ref, path, top)]
    if (path / SETTINGS).is_file():
        return [_run(ref, path)]
    if ref.startswith("runs:") or (path / CARD).is_file() or path.suffix == ".pt":
        return [ComparedItem(ref, path.name, (), judgeable=True)]
    raise DataError(f"{ref}: nothing there that can be compared; give {FORMS}")


def _results(source: ComparedItem, name: str, files: list[tuple[str, list[FoundResults]]]) -> ComparedItem:
    refs = files[0][0] if len(files) == 1 else f"{Path(files[0][0]).parent}/{name}-*.json, {len(files)} files"
    return replace(source, rows=tuple(rows_of(name, "results", refs, [one for _, found in files for one in found])))


def _run(ref: str, path: Path) -> ComparedItem:
    """Stored results of a run; where there are none, its newest validation."""
    name = path.resolve().name
    lines = tuple(read_lines(path / METRICS))
    found = [one for file in sorted((path / RESULTS).glob("*.json")) for one in read_recorded(file)]
    rows = rows_of(name, "run", ref, found) or _validated(ref, name, path, lines)
    return ComparedItem(ref, name, tuple(rows), lines, judgeable=True, identity=str(path.resolve()))


def _validated(ref: str, name: str, path: Path, lines: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The newest validation in training as a row."""
    settings = settings_from_json((path / SETTINGS).read_text(encoding="utf-8"))
    record = read_json(path / RECORD) if (path / RECORD).is_file() else {}
    mode = "inductive" if record.get("kind") == "encoder" else "transductive"
    newest = newest_validation(lines)
    if newest is None:
        return []
    return [validation_row(name, "run", ref, settings, newest, mode, record.get("data_fingerprint"))]


def _sweep(ref: str, path: Path, top: int) -> ComparedItem:
    """The best trials of a sweep, judged by their newest validation."""
    about = read_json(path / SWEEP)
    try:
        name, task, base = str(about["name"]), task_of(about["task"]), json.dumps(about["base"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path / SWEEP}: not the record of a sweep ({error!r})") from error
    if task is None:
        raise DataError(f'{path / SWEEP}: task is {about["task"]!r}; it must be like "5w1s"')
    trials = [trial for trial in read_trials(path / TRIALS) if trial.last is not None]
    if not trials:
        raise DataError(f"{ref}: no trial of the sweep was judged yet")
    best = sorted(trials, key=lambda trial: -_accuracy(trial))[:top]
    settings, data = settings_from_json(base), about.get("data_fingerprint")
    protocol, compared = validation_protocol(settings, "transductive", data), compared_settings(settings, data)
    rows = [_trial(ref, name, task, protocol, compared, trial) for trial in best]
    points = [
        {
            "global_step": point.step,
            "elapsed_s": point.seconds,
            f"validation/{about['task']}": point.accuracy,
            f"validation/{about['task']}_ci95": point.ci95,
        }
        for point in best[0].curve
    ]
    return ComparedItem(ref, rows[0].name, tuple(rows), tuple(points), identity=str(path.resolve()))


def _accuracy(trial: Trial) -> float:
    return trial.last.accuracy if trial.last is not None else 0.0


def _trial(
    ref: str, name: str, task: tuple[int, int], protocol: EvalProtocol, settings: dict[str, Any], trial: Trial
) -> Row:
    last = trial.curve[-1]
    scores = {task: Score(last.accuracy, last.ci95)}
    return Row(
        f"{name}, trial {trial.number}",
        "trial",
        ref,
        protocol,
        scores,
        last.seconds,
        last.step,
        settings | decisive_settings(trial.settings),
    )


def _published(row: PublishedResult) -> Row:
    protocol = EvalProtocol(row.mode, "test", DATA[row.dataset], row.query, 1000, None)
    scores = {
        task: Score(value / 100, row.ci95[task] / 100 if task in row.ci95 else None)
        for task, value in row.percent.items()
    }
    return Row(f"paper: {row.name}", "published", f"{row.ref} ({row.where})", protocol, scores)


def _distinct(sources: list[ComparedItem]) -> list[ComparedItem]:
    """Names that two sources share become the references."""
    names = [source.name for source in sources]
    shared = {name for name in names if names.count(name) > 1}
    return [
        replace(
            source,
            name=source.ref,
            rows=tuple(replace(row, name=row.name.replace(source.name, source.ref, 1)) for row in source.rows),
        )
        if source.name in shared
        else source
        for source in sources
    ]
