"""Lists registered versions: aliases, results, promotions, and whether their datasets still exist unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from metagmvae.evaluation.comparison.formatting import percent
from metagmvae.infra.registry.evidence import PREFIX
from metagmvae.infra.registry.resolve import unknown_name
from metagmvae.infra.tracking.store import Store, paginate, registered_models
from metagmvae.infra.tracking.tracking_errors import tracking_errors
from metagmvae.pipelines.records import DataError, ProgressCallback
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.manifest import dataset_files

EVALUATED = re.compile(r"results\.([\w-]+\.\d+w\d+s\.(?:trans|in)ductive)")
"""Tag of an accuracy that `evaluate` stored; further tags are `…_ci95`, `…_data` and `…_data_fingerprint`."""
GIVEN = re.compile(r"results\.(.+)\.accuracy")
"""Tag of an accuracy that a caller of `register` passed; a further tag is `….ci95`."""


def list_models(store: Store, name: str = "", on_progress: ProgressCallback | None = None) -> list[dict[str, Any]]:
    """Return one row for each version, the newest of each registered model first.

    `name` selects one registered model; empty: all. Opening the datasets takes time.

    Raises:
        DataError: there is no registered model of that name; the message lists those that exist.
        TrackingError: the store cannot be reached.
    """
    with tracking_errors(store.uri):
        models = registered_models(store)
        if name and name not in models:
            raise DataError(unknown_name(store, name, models))
        query = {"filter_string": f"name = '{name}'"} if name else {}
        versions = list(paginate(store.client.search_model_versions, **query))
    versions.sort(key=lambda version: (version.name, -int(version.version)))
    check_data = cache(data_state)
    rows = []
    for number, version in enumerate(versions, start=1):
        aliases = [alias for alias, v in models[version.name].aliases.items() if str(v) == str(version.version)]
        rows.append(_row(version, sorted(aliases), check_data))
        if on_progress is not None:
            on_progress(number, len(versions))
    return rows


def data_state(uri: str, fingerprint: str) -> tuple[str, str]:
    """Return "yes" if a dataset is unchanged, else "changed", "damaged" or "gone", and the reason.

    In an object store only the manifest is read. In a folder the existence of each file is checked, not its content.
    """
    try:
        dataset = Dataset.open(uri)
    except DataError as error:
        return "gone", str(error)
    if dataset.fingerprint != fingerprint:
        return "changed", f"{uri}: its fingerprint is {dataset.fingerprint[:12]}…, it was {fingerprint[:12]}…"
    if dataset.remote is None:
        missing = [name for name, _, _ in dataset_files(dataset.manifest) if not (dataset.root / name).is_file()]
        if missing:
            reason = f"{len(missing)} files are missing, for example {missing[0]}; run `metagmvae verify`"
            return "damaged", f"{uri}: {reason}"
    return "yes", ""


def table_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row of `list_models` to short strings for a table."""
    results = [f"{key} {percent(value['accuracy'], value.get('ci95'))}" for key, value in row["results"].items()]
    promotion = row["promotion"]
    decision = promotion.get("decision", "")
    champion = promotion.get("champion", "").rpartition("/")[2]
    rolled_back = ", rolled back" if "rolled_back" in promotion else ""
    tasks = [f"{task} {_difference(promotion[task])}" for task in promotion.get("tasks", []) if task in promotion]
    data = dict.fromkeys(f"{entry['uri']} {entry['state']}" for entry in row["data"])
    return {
        "model": f"{row['name']}/{row['version']}",
        "aliases": ", ".join(row["aliases"]),
        "kind": ", ".join(filter(None, (row["kind"], row["method"]))),
        "created": row["created"][:16],
        "run": row["run"][:8],
        "results": "; ".join(results),
        "promotion": " ".join(filter(None, [decision, f"over {champion}:" if champion else "", "; ".join(tasks)]))
        + rolled_back,
        "data": "; ".join(data) or "unknown",
    }


def _row(version: Any, aliases: list[str], check_data: Callable[[str, str], tuple[str, str]]) -> dict[str, Any]:
    tags = version.tags
    try:
        results, promotion = _results(tags), _promotion(tags)
    except ValueError as error:
        where = f"models:/{version.name}/{version.version}"
        raise DataError(f"{where}: tags results.… or promotion.… are damaged ({error}); delete these tags") from error
    datasets = {
        "training": (tags.get("data"), tags.get("data_fingerprint")),
        **{key: (tags.get(f"results.{key}_data"), tags.get(f"results.{key}_data_fingerprint")) for key in results},
        "promotion": (promotion.get("data"), promotion.get("data_fingerprint")),
    }
    data = []
    for use, (uri, fingerprint) in datasets.items():
        if uri and fingerprint:
            state, reason = check_data(uri, fingerprint)
            data.append({"of": use, "uri": uri, "fingerprint": fingerprint, "state": state, "why": reason})
    return {
        "name": version.name,
        "version": str(version.version),
        "aliases": aliases,
        "kind": tags.get("kind", "unknown"),
        "method": tags.get("method", ""),
        "created": datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        "run": version.run_id or "",
        "results": results,
        "promotion": promotion,
        "data": data,
    }


def _results(tags: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Return accuracy and ci95 of each evaluation, by a key such as `test.5w1s.transductive`."""
    results: dict[str, dict[str, float]] = {}
    for key in sorted(tags):
        for pattern, suffix in ((EVALUATED, "_ci95"), (GIVEN, ".ci95")):
            match = pattern.fullmatch(key)
            if match:
                keys = {"accuracy": key, "ci95": f"results.{match[1]}{suffix}"}
                results[match[1]] = {name: float(tags[tag]) for name, tag in keys.items() if tag in tags}
    return results


def _promotion(tags: Mapping[str, str]) -> dict[str, Any]:
    """Return the newest decision about a version; the numbers of each task form a dictionary."""
    flat = {key.removeprefix(PREFIX): value for key, value in tags.items() if key.startswith(PREFIX)}
    tasks = json.loads(flat.pop("tasks", "[]"))
    promotion: dict[str, Any] = {"tasks": tasks} if tasks else {}
    for key, value in flat.items():
        task, _, field = key.partition(".")
        if task in tasks and field:
            promotion.setdefault(task, {})[field] = value if field == "verdict" else float(value)
        else:
            promotion[key] = value
    return promotion


def _difference(task: Mapping[str, float]) -> str:
    if "difference" not in task:
        return percent(task["challenger"], task["ci95"])
    return f"{100 * task['difference']:+.2f} ± {100 * task['ci95']:.2f}"
