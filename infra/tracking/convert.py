"""Converts the files of a run folder to MLflow parameters, tags and metric points.

Every result depends on the files alone, time stamps included. A point that is uploaded twice therefore has the same
(key, value, time, step) both times, and MLflow stores it once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metagmvae.configs import load
from metagmvae.configs.credentials import redact
from metagmvae.infra.runs.run_folder import EVALUATIONS, METRICS, SYSTEM
from metagmvae.pipelines.records import DataError

NOT_METRICS = frozenset({"step", "steps", "global_step", "checkpoint"})
UNFINGERPRINTED = ("run", "tracking", "name")
"""Sections of the settings that may change when a run is resumed. They become tags, because MLflow parameters cannot
change."""


@dataclass(frozen=True)
class MetricPoint:
    """One metric value."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(frozen=True)
class Chunk:
    """Points of some complete lines of a file, and the position in the file after these lines."""

    points: list[MetricPoint]
    position: dict[str, Any]
    """`lines` and `bytes` read so far, and the `sha256` of these bytes."""


def training_points(line: Mapping[str, Any], started_ms: int) -> list[MetricPoint]:
    """Convert a line of metrics.jsonl; the step is its `global_step`.

    The time is the start of the run plus the seconds trained, so that a resumed run has no gap. Keys of the
    pre-training stage get the prefix `pretrain/`, because its loss is a different one.
    """
    stage = str(line.get("stage", "meta"))
    prefix = "" if stage == "meta" else f"{stage}/"
    timestamp_ms = started_ms + round(1000 * float(line["elapsed_s"]))
    step = int(line["global_step"])
    return [
        MetricPoint(prefix + key, value, timestamp_ms, step) for key, value in _numbers(line) if key not in NOT_METRICS
    ]


def timed_points(line: Mapping[str, Any], step_key: str) -> list[MetricPoint]:
    """Convert a line that has its own `time`, in seconds since 1970; its step is the value of a key."""
    timestamp_ms, step = round(1000 * float(line["time"])), int(line[step_key])
    not_metrics = ("time", step_key)
    return [MetricPoint(key, value, timestamp_ms, step) for key, value in _numbers(line) if key not in not_metrics]


READERS: dict[str, Callable[[Mapping[str, Any], int], list[MetricPoint]]] = {
    METRICS: training_points,
    SYSTEM: lambda line, _: timed_points(line, "sample"),
    EVALUATIONS: lambda line, _: timed_points(line, "step"),
}
"""Name of a file -> conversion of a line; the second argument is the start of the run, in ms since 1970."""


def unsent_chunks(path: Path, position: Mapping[str, Any], started_ms: int, limit: int) -> Iterator[Chunk]:
    """Yield the lines after `position` in chunks of at most `limit` points.

    A last line without a newline is still being written and is left for the next call. If the bytes before `position`
    have changed (a resumed run deletes the lines after its checkpoint), reading starts over at the first line.

    Raises:
        DataError: a complete line is not JSON, or has no step or time.
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
    """Return the settings that the fingerprint covers, by dotted key."""
    return flatten({key: value for key, value in settings.items() if key not in UNFINGERPRINTED})


def tags(settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """Return the other settings and the record of the run: fingerprints, commit, command, versions, machine."""
    flat = flatten(record)
    commit = flat.get("commit", "")
    mapped = {
        "mlflow.source.name": flat.get("command", ""),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit.removesuffix("+"),
        "mlflow.source.git.dirty": str(commit.endswith("+")).lower() if commit else "",
        "engine": str(settings.get("run", {}).get("engine", "")),
    }
    rest = flatten({key: settings[key] for key in UNFINGERPRINTED if key in settings})
    return {key: redact(value) for key, value in {**rest, **flat, **mapped}.items() if value != ""}


def flatten(tree: Mapping[str, Any]) -> dict[str, str]:
    """Convert nested mappings to one with dotted keys; strings stay as they are, other values but None become JSON."""
    values = load.flatten(dict(tree))
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values if value is not None}


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)


def _points(path: Path, raw: bytes, number: int, started_ms: int) -> list[MetricPoint]:
    try:
        return READERS[path.name](json.loads(raw), started_ms)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} line {number}: not a metric line ({error}); correct or delete it") from error


def _position(lines: int, size: int, digest: str) -> dict[str, Any]:
    return {"lines": lines, "bytes": size, "sha256": digest}
