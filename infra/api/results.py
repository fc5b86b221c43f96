"""What the functions of the Python API return: frozen values that show themselves as tables in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from typing import Any, Self

from metagmvae.evaluation.comparison.formatting import percent, points, task_name
from metagmvae.pipelines.records import printable
from metagmvae.pipelines.shards.dataset import Dataset

Table = tuple[Mapping[str, Any], ...]
"""Rows with plain values. Accuracies and differences are fractions in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """The answer of a command, with its main values as fields."""

    answer: Mapping[str, Any] = field(repr=False)
    """Everything that the command prints with `--json`."""

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any], **more: Any) -> Self:
        """Take the values of the fields from an answer; `more` are further values."""
        given = {f.name: answer[f.name] for f in fields(cls) if f.name in answer} | more
        frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return cls(answer=answer, **frozen)

    def _repr_html_(self) -> str:
        values, tables = {}, ""
        for name, value in self._shown().items():
            if value and isinstance(value, tuple) and isinstance(value[0], Mapping):
                tables += f"<p>{escape(name)}</p>{_table(value)}"
            elif value not in ((), {}, "", None):
                values[name] = value
        lines = "".join(f"<tr><th>{escape(key)}</th><td>{_cell(value)}</td></tr>" for key, value in values.items())
        return f"<table>{lines}</table>{tables}"

    def _shown(self) -> Mapping[str, Any]:
        """What a notebook shows, by title: plain values, and tables."""
        return _with_percent({f.name: getattr(self, f.name) for f in fields(self) if f.repr})


@dataclass(frozen=True, kw_only=True)
class PreparedData(CommandResult):
    """A data set that was written. It stands for its URI wherever a path is expected."""

    uri: str
    name: str
    image_shape: tuple[int, int, int] | None = None
    """(C, H, W); None for vectors."""
    feature_size: int | None = None
    """Number of values of a vector; None for images."""
    samples: Mapping[str, int]
    """By split."""
    classes: Mapping[str, int]
    """By split."""
    skipped: tuple[Any, ...] = ()
    """Images that could not be read."""

    def __fspath__(self) -> str:
        return self.uri

    def open(self) -> Dataset:
        """Open the data set."""
        return Dataset.open(self.uri)


@dataclass(frozen=True, kw_only=True)
class TrainedRun(CommandResult):
    """The folder of a training. It stands for its path wherever a path is expected."""

    path: Path
    last: Mapping[str, Any]
    """The last metric line."""
    registered: str = ""
    """`models:/NAME/VERSION`, if the model was registered."""
    alias: str = ""
    """The alias of the registered version."""

    def __repr__(self) -> str:
        """Without all values of the last metric line."""
        step = f": step {self.last['step']} of {self.last['steps']}" if "steps" in self.last else ""
        return f"<TrainedRun {self.path}{step}{', ' * bool(self.registered)}{self.registered}>"

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(CommandResult):
    """Few-shot accuracy of a model on episodes of one task."""

    model: str
    data: str
    split: str
    accuracy: float
    """Mean over episodes, a fraction in [0, 1]."""
    ci95: float | None
    """Half-width of the 95% confidence interval; None for a single episode."""
    way: int
    shot: int
    query: int
    episodes: int
    seed: int
    mode: str
    ece: float | None = None
    """Expected calibration error, a fraction in [0, 1]."""
    baselines: Table = ()
    """`baseline`, `accuracy`, `ci95`, … on the same episodes, if they were asked for."""
    paired: Table = ()
    """The model minus each baseline on the same episodes."""


@dataclass(frozen=True, kw_only=True)
class EvaluationTable(CommandResult):
    """Few-shot accuracy of a model on episodes of several tasks."""

    model: str
    data: str
    split: str
    rows: Table
    """`way`, `shot`, `accuracy`, `ci95`, `ece`, …: a task each, in the order of the ways and then of the shots."""
    baselines: Table = ()
    """As in `EvaluationResult`, with `way` and `shot`."""
    paired: Table = ()

    def _shown(self) -> Mapping[str, Any]:
        keys = ("model", "way", "shot", "accuracy", "ci95", "ece", "query", "episodes", "mode")
        rows = tuple({key: row[key] for key in keys if key in row} for row in self.rows)
        tables = {"rows": rows, "baselines": self.baselines, "paired": self.paired}
        return _with_percent({"model": self.model, "data": self.data, "split": self.split} | tables)


@dataclass(frozen=True, kw_only=True)
class ComparisonResult(CommandResult):
    """Models and recorded results side by side."""

    rows: Table
    """`name`, `results` (`way`, `shot`, `accuracy`, `ci95`), and the protocol of each."""
    paired: Table = ()
    """Differences to the first model on the same episodes."""
    notes: tuple[str, ...] = ()

    def _shown(self) -> Mapping[str, Any]:
        rows = [
            {"name": row["name"]}
            | {task_name((r["way"], r["shot"])): percent(r["accuracy"], r["ci95"]) for r in row["results"]}
            | {key: row[key] for key in ("mode", "split", "query", "episodes")}
            for row in self.rows
        ]
        return _with_percent(
            {"accuracy in percent by (way,shot)": tuple(rows), "paired": self.paired, "notes": self.notes}
        )


@dataclass(frozen=True, kw_only=True)
class SweepResult(CommandResult):
    """The folder of a sweep. It stands for its path wherever a path is expected."""

    sweep: Path
    name: str = ""
    trials: Mapping[str, int] | int = 0
    """Their number by status; for a dry run, their number."""
    best: Mapping[str, Any] | None = None
    """`number`, `accuracy`, `ci95` and `task` of the best trial; None: no trial was validated."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the best trial changes, by dotted key."""
    report: Path | None = None
    """In Markdown."""

    @property
    def best_settings(self) -> Path:
        """File with all settings of the best trial, for `train`."""
        from metagmvae.infra.tune.sweep_state import BEST

        return self.sweep / BEST

    def __fspath__(self) -> str:
        return str(self.sweep)


@dataclass(frozen=True, kw_only=True)
class FitResult(CommandResult):
    """A model made from a folder of pictures. It stands for the path of the model package."""

    model: Path
    report: Path
    """The HTML page."""
    samples: Mapping[str, int]
    classes: Mapping[str, int]
    preset: str
    accuracy: Table
    """`on`, `way`, `shot`, `accuracy`, `ci95`, `ece`: on classes that were not trained on."""
    baselines: Table = ()
    paired: Table = ()

    def __fspath__(self) -> str:
        return str(self.model)


def _with_percent(values: Mapping[str, Any]) -> dict[str, Any]:
    """Format accuracies and differences with their intervals in percent; tables too, where long cells are left out."""
    shown: dict[str, Any] = {
        name: tuple(_with_percent(row) for row in value)
        if isinstance(value, tuple) and value and isinstance(value[0], Mapping)
        else value
        for name, value in values.items()
    }
    if isinstance(shown.get("accuracy"), float):
        shown["accuracy"] = f"{percent(shown['accuracy'], shown.pop('ci95', None))} %"
    if isinstance(shown.get("difference"), float):
        shown["difference"] = f"{points(shown['difference'], shown.pop('ci95'))} points"
    return shown


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(printable(name))}</th>" for name in names)
    body = ("".join(f"<td>{_cell(row.get(name, ''))}</td>" for name in names) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in body)}</table>"


def _cell(value: Any) -> str:
    """Text of a value, escaped: names come from data and users."""
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(printable(str(key)))} {_cell(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(_cell, value))
    return escape(printable(f"{value:,}" if isinstance(value, int) else str(value)))
