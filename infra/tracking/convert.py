"""A run folder in MLflow's terms: settings to parameters, records to tags, metric lines to points.

Everything here is a function of the files alone, time stamps included. So a point that is sent twice is the
same (key, value, time, step) twice, and MLflow keeps it once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metagmvae.infra.runs.run_folder import EVALUATIONS, METRICS, SYSTEM
from metagmvae.infra.tracking.store import redact
from metagmvae.pipelines.records import DataError

NOT_METRICS = frozenset({"step", "steps", "global_step", "checkpoint"})
UNFINGERPRINTED = ("run", "tracking", "name")
"""Sections of the settings that may change when a run is resumed. MLflow's parameters can never change, so
these are tags."""


@dataclass(frozen=True)
class MetricPoint:
    """One metric value."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file that were not sent yet, and where the file stands after them."""

    points: list[MetricPoint]
    position: dict[str, Any]
    """`lines`, `bytes` and the `sha256` of all bytes up to here."""


def training_points(line: Mapping[str, Any], started_ms: int) -> list[MetricPoint]:
    """Points of a line of metrics.jsonl, at its `global_step`.

    The time is the start of the run plus the seconds trained, so a resumed run has no gap. Keys of the
    contrastive stage get the prefix `pretrain/`: its loss is another loss.
    """
    stage = str(line.get("stage", "meta"))
    prefix = "" if stage == "meta" else f"{stage}/"
    at = started_ms + round(1000 * float(line["elapsed_s"]))
    step = int(line["global_step"])
    return [MetricPoint(prefix + key, value, at, step) for key, value in _numbers(line) if key not in NOT_METRICS]


def system_points(line: Mapping[str, Any], started_ms: int) -> list[MetricPoint]:
    """Points of a line of system.jsonl, at its own `time` (seconds since 1970) and `sample` number."""
    at, step = round(1000 * float(line["time"])), int(line["sample"])
    return [MetricPoint(key, value, at, step) for key, value in _numbers(line) if key not in ("time", "sample")]


def evaluation_points(line: Mapping[str, Any], started_ms: int) -> list[MetricPoint]:
    """Points of a line of evaluations.jsonl: results on a split, at the step that the model had reached."""
    at, step = round(1000 * float(line["time"])), int(line["step"])
    return [MetricPoint(key, value, at, step) for key, value in _numbers(line) if key not in ("time", "step")]


READERS = {
    METRICS: training_points,
    SYSTEM: system_points,
    EVALUATIONS: evaluation_points,
}


def unsent_chunks(path: Path, position: Mapping[str, Any], started_ms: int, limit: int) -> Iterator[Chunk]:
    """Yield the lines after `position` in chunks of at most `limit` points.

    A last line without its newline is still being written and waits. Where the file no longer begins with
    what was sent (a resumed run cuts lines off that its checkpoint does not know), reading starts over.

    Raises:
        DataError: a whole line is not JSON, or lacks its step or time.
    """
    data = path.read_bytes() if path.exists() else b""
    start, number = int(position.get("bytes", 0)), int(position.get("lines", 0))
    digest = hashlib.sha256(data[:start])
    if start and (len(data) < start or digest.hexdigest() != position["sha256"]):
        start, number, digest = 0, 0, hashlib.sha256()
    points: list[MetricPoint] = []
    for raw in data[start:].splitlines(keepends=True):
        if not raw.endswith(b"\n"):
            break
        new = _points(path, raw, number + 1, started_ms)
        if points and len(points) + len(new) > limit:
            yield Chunk(points, _position(number, start, digest.hexdigest()))
            points = []
        points = points + new
        digest.update(raw)
        start, number = start + len(raw), number + 1
    if start != int(position.get("bytes", 0)):
        yield Chunk(points, _position(number, start, digest.hexdigest()))


def parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings that make the fingerprint, by dotted key."""
    return flatten({key: value for key, value in settings.items() if key not in UNFINGERPRINTED})


def tags(settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """The other settings, and the environment record: fingerprints, commit, command, versions, machine."""
    flat = flatten(record)
    mapped = {
        "mlflow.source.name": flat.get("command", ""),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": flat.get("commit", ""),
        "engine": str(settings.get("run", {}).get("engine", "")),
    }
    rest = flatten({key: settings[key] for key in UNFINGERPRINTED if key in settings})
    return {key: redact(value) for key, value in {**rest, **flat, **mapped}.items() if value != ""}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings to dotted keys; texts as they are, all else as JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)


def _points(path: Path, raw: bytes, number: int, started_ms: int) -> list[MetricPoint]:
    try:
        return READERS[path.name](json.loads(raw), started_ms)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} line {number}: not a metric line ({error}); mend or delete it") from error


def _position(lines: int, size: int, digest: str) -> dict[str, Any]:
    return {"lines": lines, "bytes": size, "sha256": digest}
