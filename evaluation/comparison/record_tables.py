"""Markdown tables of recorded ablations, benchmarks, training curves, promotions and sweeps (`evaluation/results`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from metagmvae.evaluation.comparison.formatting import (
    counted,
    markdown_code,
    markdown_table,
    markdown_text,
    percent,
    points,
    task_name,
    task_title,
)
from metagmvae.pipelines.files import Document, check_document, read_json
from metagmvae.pipelines.records import DataError

MOST_CHANGES = 4
"""A row of an ablation with more changed settings than this is labelled by its name."""

LABELS = {
    "abl-frozen": "features of the pre-trained encoder, frozen; 200 steps",
    "abl-joint": "pre-trained encoder trained further from pixels; 1,000 steps",
    "literal": "literal transcription of the paper's equations",
    "batches: ": "batched tensors: ",
    "shards in place": "shards, memory-mapped",
}
"""Readable text for parts of the names that the files record."""

BENCHES = {
    "step": ("step", True),
    "episodes": ("episodes", True),
    "loader": ("loader", True),
    "loader-waiting": ("loader", False),
    "step-h100": ("step-h100", True),
    "prepare": ("prepare", True),
    "simclr": ("simclr", True),
    "features": ("features", False),
    "tune": ("tune", False),
}
"""Name of a table -> FILE of `bench-FILE.json`, and whether it has a list of rows, or single values."""

COLUMNS = {
    "variant": ("training step", "{}"),
    "form": ("evaluation", "{}"),
    "reader": ("reader", "{}"),
    "workers": ("Ray workers (0: one process without Ray)", "{}"),
    "road": ("input pipeline: what is measured", "{}"),
    "seconds": ("seconds per step", "{:.3g}"),
    "seconds_per_episode": ("seconds per episode", "{:.3f}"),
    "processor_seconds_per_episode": ("processor seconds per episode", "{:.3f}"),
    "samples_per_s": ("images per second", "{:,.0f}"),
    "samples_per_cpu_s": ("images per second of processor time", "{:,.0f}"),
    "images_per_s": ("images per second", "{:,.0f}"),
    "bytes_per_image": ("bytes per image on disk", "{:,.0f}"),
    "times_faster": ("speed-up", "{:.1f}"),
    "peak_mib": ("peak memory, MiB", "{:,.0f}"),
    "peak_memory_gib": ("peak memory, GiB", "{:.1f}"),
    "profile.share_of_matmul_rate": ("FLOP/s relative to a large matrix product", "{:.0%}"),
}
"""Key in a row -> title and format of its column."""

VALUES = {
    "waiting_share_in_training.memory": ("training time spent waiting, shards in memory", "{:.3%}"),
    "waiting_share_in_training.mmap": ("training time spent waiting, shards memory-mapped", "{:.3%}"),
    "waiting_share_in_training.encoded": ("training time spent waiting, encoded shards", "{:.3%}"),
    "written_rows_per_s": ("rows written per second", "{:,.0f}"),
    "sampled_in_place_rows_per_s": ("rows sampled per second from memory-mapped shards", "{:,.0f}"),
    "streamed_rows_per_s": ("rows streamed per second", "{:,.0f}"),
    "peak_memory_gib.a tenth.written": ("peak memory for writing a tenth of the rows, GiB", "{:.2f}"),
    "peak_memory_gib.all.written": ("peak memory for writing all rows, GiB", "{:.2f}"),
    "trials": ("trials", "{:,}"),
    "at_once": ("concurrent trials", "{:,}"),
    "training_s_per_trial": ("training, seconds per trial", "{:.2f}"),
    "seconds_per_trial": ("wall time with MLflow, seconds per trial", "{:.2f}"),
    "seconds_per_trial_without_mlflow": ("wall time without MLflow, seconds per trial", "{:.2f}"),
    "growth.driver_mib": ("driver memory, last quarter of the trials over the second", "{:.3f}"),
    "growth.workers_mib": ("worker memory, last quarter of the trials over the second", "{:.3f}"),
}
"""Key in a file -> title and format of its row in a table of single values."""


class _Score(BaseModel):
    way: int
    shot: int
    accuracy: float
    ci95: float | None


class _Difference(BaseModel):
    name: str
    way: int
    shot: int
    difference: float
    ci95: float


class _AblationRow(BaseModel):
    name: str
    results: Annotated[list[_Score], Field(min_length=1)]


class _ChangedSetting(BaseModel):
    setting: str
    values: dict[str, Any]


class _Ablation(BaseModel):
    rows: Annotated[list[_AblationRow], Field(min_length=1)]
    paired: list[_Difference]
    settings: list[_ChangedSetting]


class _CurveLine(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, Any]

    global_step: int
    elapsed_s: float


class _Curve(BaseModel):
    validation: Annotated[list[_CurveLine], Field(min_length=1)]


class _PromotedTask(BaseModel):
    task: str
    challenger: float
    champion: float
    difference: float
    ci95: float
    verdict: str


class _Promotion(BaseModel):
    tasks: list[_PromotedTask]


class _Importance(BaseModel):
    names: Annotated[list[str], Field(min_length=1, max_length=1)]
    importance: float
    low: float
    high: float
    chance: float


class _Importances(BaseModel):
    settings: list[_Importance]


class _BestGroup(BaseModel):
    value: Any
    mean: float
    ci95: float | None
    trials: int


class _GroupedSetting(BaseModel):
    best: _BestGroup


class _Sweep(BaseModel):
    task: str
    judged_at_step: int
    importance: _Importances
    settings: dict[str, _GroupedSetting]


class _BenchRows(BaseModel):
    rows: list[dict[str, Any]]
    profile: dict[str, dict[str, Any]] = {}


class _BenchValues(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, Any]


def _read(path: Path, schema: type[Document]) -> Document:
    return check_document(
        schema, read_json(path), path, "so it is not a record of this kind; restore or record it again"
    )


def bench_table(results: Path, name: str) -> str:
    """Speed and memory of one benchmark (`bench-NAME.json`)."""
    if name not in BENCHES:
        raise DataError(f"bench:{name}: unknown table; use one of {', '.join(BENCHES)}")
    file, has_rows = BENCHES[name]
    path = results / f"bench-{file}.json"
    if not has_rows:
        content = _read(path, _BenchValues).__pydantic_extra__
        values = [(title, _cell(content, key, form)) for key, (title, form) in VALUES.items()]
        return markdown_table(["measurement", "value"], [row for row in values if row[1]])
    record = _read(path, _BenchRows)
    rows = [row | {"profile": record.profile.get(row.get("variant", ""), {})} for row in record.rows]
    columns = [(title, [_cell(row, key, form) for row in rows]) for key, (title, form) in COLUMNS.items()]
    shown = [(title, cells) for title, cells in columns if any(cells)]
    return markdown_table([title for title, _ in shown], zip(*(cells for _, cells in shown), strict=True))


def ablation_table(results: Path, name: str) -> str:
    """Accuracy in percent of each configuration in `ablation-NAME.json`, and its paired difference to the first one."""
    record = _read(results / f"ablation-{name}.json", _Ablation)
    first = record.rows[0]
    tasks = [(result.way, result.shot) for result in first.results]
    paired = {(pair.name, (pair.way, pair.shot)): pair for pair in record.paired}
    rows = []
    for row in record.rows:
        cells = [_ablation_label(record.settings, first.name, row.name)]
        scores = {(result.way, result.shot): result for result in row.results}
        for task in tasks:
            pair = paired.get((row.name, task))
            difference = points(pair.difference, pair.ci95) if pair else ""
            cells += [percent(scores[task].accuracy, scores[task].ci95), difference]
        rows.append(cells)
    head = [title for task in tasks for title in (task_name(task), f"{task_name(task)}: difference")]
    return markdown_table(["changed settings", *head], rows)


def curve_table(results: Path, name: str) -> str:
    """Validations 1, 2, 4, 8, ... and the last of a training (`NAME-curve.json`)."""
    lines = _read(results / f"{name}-curve.json", _Curve).validation
    shown = [line for number, line in enumerate(lines, start=1) if number & (number - 1) == 0 or line is lines[-1]]
    keys = [key for key in lines[0].__pydantic_extra__ if key.startswith("validation/") and not key.endswith("_ci95")]
    rows = []
    for line in shown:
        metrics = line.__pydantic_extra__
        accuracies = [percent(metrics[key], metrics.get(f"{key}_ci95")) if key in metrics else "" for key in keys]
        rows.append([f"{line.global_step:,}", f"{line.elapsed_s:,.0f}", *accuracies])
    titles = [task_title(key.removeprefix("validation/")) for key in keys]
    return markdown_table(["step", "seconds", *titles], rows)


def promotion_table(results: Path, name: str) -> str:
    """Accuracies in percent of challenger and champion on the same episodes (`promotion-NAME.json`)."""
    rows = []
    for task in _read(results / f"promotion-{name}.json", _Promotion).tasks:
        accuracies = percent(task.challenger), percent(task.champion), points(task.difference, task.ci95)
        rows.append([task_title(task.task), *accuracies, markdown_text(task.verdict)])
    return markdown_table(["task", "challenger", "champion", "difference, points", "verdict"], rows)


def sweep_table(results: Path, name: str) -> str:
    """Importance and best value of each setting (`sweep-NAME.json`), from trials at the same step."""
    record = _read(results / f"sweep-{name}.json", _Sweep)
    rows = []
    for importance in record.importance.settings:
        (setting,) = importance.names
        value = (best := record.settings[setting].best).value
        rows.append(
            [
                markdown_code(setting),
                f"{importance.importance:.1%} ({importance.low:.1%} to {importance.high:.1%})",
                f"{importance.chance:.1%}",
                f"{value[0]:.2g} to {value[1]:.2g}" if isinstance(value, list) else markdown_text(str(value)),
                f"{percent(best.mean, best.ci95)} ({counted(best.trials, 'trial')})",
            ]
        )
    accuracy = f"mean {task_title(record.task)} accuracy of its trials at step {record.judged_at_step}"
    head = ["setting", "importance (95% interval)", "importance by chance", "best value", accuracy]
    return markdown_table(head, rows)


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    """Value at a dotted key as text; empty where the row does not have it."""
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ""
        value = value[part]
    return reduce(lambda text, old: text.replace(old, LABELS[old]), LABELS, form.format(value))


def _ablation_label(settings: Sequence[_ChangedSetting], first: str, name: str) -> str:
    """Settings of a row that differ from those of the first row, or its name where too many differ."""
    changed = [
        markdown_code(f"{row.setting} = {str(row.values[name]).lower()}")
        for row in settings
        if row.values[name] != row.values[first]
    ]
    if len(changed) > MOST_CHANGES or name in LABELS:
        return LABELS.get(name) or markdown_text(name)
    return ", ".join(changed) or "reference configuration"
