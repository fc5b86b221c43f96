"""What stands in the registry: versions, aliases, evidence, and whether the data that it rests on are still there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from metagmvae.infra.registry.evidence import PREFIX
from metagmvae.infra.registry.resolve import no_such_name
from metagmvae.infra.tracking.store import Store, paginate, tracking_errors
from metagmvae.pipelines.records import DataError, ProgressCallback
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.manifest import dataset_files

EVALUATED = re.compile(r"results\.([\w-]+\.\d+w\d+s\.(?:trans|in)ductive)")
"""As `evaluate` keeps an accuracy; beside it `…_ci95`, `…_data` and `…_data_fingerprint`."""
GIVEN = re.compile(r"results\.(.+)\.accuracy")
"""As a caller of `register` gives one; beside it `….ci95`."""


def list_models(store: Store, name: str = "", on_progress: ProgressCallback | None = None) -> list[dict[str, Any]]:
    """One row for each version, the newest of each name first.

    Args:
        store: an open one.
        name: of one registered model; empty: all.
        on_progress: told (versions done, in all); their data sets are looked up.

    Raises:
        DataError: there is no registered model of that name; says which there are.
        TrackingError: the store cannot be reached.
    """
    with tracking_errors(store.uri):
        models = {model.name: model for model in paginate(store.client.search_registered_models)}
        if name and name not in models:
            raise DataError(no_such_name(store, name, models))
        wanted = {"filter_string": f"name = '{name}'"} if name else {}
        versions = list(paginate(store.client.search_model_versions, **wanted))
    versions.sort(key=lambda version: (version.name, -int(version.version)))
    state = cache(state_of_data)
    rows = []
    for number, version in enumerate(versions, start=1):
        aliases = [alias for alias, at in models[version.name].aliases.items() if str(at) == str(version.version)]
        rows.append(_row(version, sorted(aliases), state))
        if on_progress is not None:
            on_progress(number, len(versions))
    return rows


def state_of_data(uri: str, fingerprint: str) -> tuple[str, str]:
    """Whether a data set is still what it was, seen from this machine: "yes", "changed", "damaged" or "gone", and why.

    Of a data set in an object store only the manifest is read; of one in a folder its files are looked for, not read.
    """
    try:
        dataset = Dataset.open(uri)
    except DataError as error:
        return "gone", str(error)
    if dataset.fingerprint != fingerprint:
        return "changed", f"{uri}: its fingerprint is {dataset.fingerprint[:12]}…, and was {fingerprint[:12]}…"
    if dataset.remote is None:
        missing = [name for name, _, _ in dataset_files(dataset.manifest) if not (dataset.root / name).is_file()]
        if missing:
            return "damaged", f"{uri}: {len(missing)} files are missing, {missing[0]} first; see `metagmvae verify`"
    return "yes", ""


def short(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for a table that people read."""
    results = [f"{key} {_percent(value)}" for key, value in row["results"].items()]
    promotion = row["promotion"]
    decided, undone = promotion.get("decision", ""), ", rolled back" if "rolled_back" in promotion else ""
    over = promotion.get("champion", "").rpartition("/")[2]
    tasks = [f"{task} {_difference(promotion[task])}" for task in promotion.get("tasks", []) if task in promotion]
    data = dict.fromkeys(f"{entry['uri']} {entry['state']}" for entry in row["data"])
    return {
        "model": f"{row['name']}/{row['version']}",
        "aliases": ", ".join(row["aliases"]),
        "kind": row["kind"],
        "created": row["created"][:16],
        "run": row["run"][:8],
        "results": "; ".join(results),
        "promotion": " ".join(filter(None, [decided, f"over {over}:" if over else "", "; ".join(tasks)])) + undone,
        "data": "; ".join(data) or "not known",
    }


def _row(version: Any, aliases: list[str], state: Callable[[str, str], tuple[str, str]]) -> dict[str, Any]:
    tags = version.tags
    try:
        results, promotion = _results(tags), _promotion(tags)
    except ValueError as error:
        where = f"models:/{version.name}/{version.version}"
        raise DataError(f"{where}: its tags results.… or promotion.… are not ours ({error}); delete them") from error
    rests_on = {
        "training": (tags.get("data"), tags.get("data_fingerprint")),
        **{key: (tags.get(f"results.{key}_data"), tags.get(f"results.{key}_data_fingerprint")) for key in results},
        "promotion": (promotion.get("data"), promotion.get("data_fingerprint")),
    }
    data = []
    for what, (uri, fingerprint) in rests_on.items():
        if uri and fingerprint:
            there, why = state(uri, fingerprint)
            data.append({"of": what, "uri": uri, "fingerprint": fingerprint, "state": there, "why": why})
    return {
        "name": version.name,
        "version": str(version.version),
        "aliases": aliases,
        "kind": tags.get("kind", "unknown"),
        "created": datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        "run": version.run_id or "",
        "results": results,
        "promotion": promotion,
        "data": data,
    }


def _results(tags: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Accuracy and ci95 by what was judged: `test.5w1s.transductive`."""
    found: dict[str, dict[str, float]] = {}
    for key in sorted(tags):
        for form, interval in ((EVALUATED, "_ci95"), (GIVEN, ".ci95")):
            match = form.fullmatch(key)
            if match:
                numbers = {"accuracy": key, "ci95": f"results.{match[1]}{interval}"}
                found[match[1]] = {what: float(tags[tag]) for what, tag in numbers.items() if tag in tags}
    return found


def _promotion(tags: Mapping[str, str]) -> dict[str, Any]:
    """The newest decision about a version, numbers as numbers, those of a task together."""
    flat = {key.removeprefix(PREFIX): value for key, value in tags.items() if key.startswith(PREFIX)}
    tasks = json.loads(flat.pop("tasks", "[]"))
    found: dict[str, Any] = {"tasks": tasks} if tasks else {}
    for key, value in flat.items():
        task, _, what = key.partition(".")
        if task in tasks and what:
            found.setdefault(task, {})[what] = value if what == "verdict" else float(value)
        else:
            found[key] = value
    return found


def _percent(result: Mapping[str, float]) -> str:
    interval = f" ± {100 * result['ci95']:.2f}" if "ci95" in result else ""
    return f"{100 * result['accuracy']:.2f}{interval}"


def _difference(task: Mapping[str, float]) -> str:
    if "difference" not in task:
        return f"{100 * task['challenger']:.2f} ± {100 * task['ci95']:.2f}"
    return f"{100 * task['difference']:+.2f} ± {100 * task['ci95']:.2f}"
