"""Reads registered versions as items of a comparison: their results, their settings, and the curve of their run."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from metagmvae.configs.credentials import redact
from metagmvae.configs.load import settings_from_json
from metagmvae.configs.schema import Settings, TrackingSettings
from metagmvae.evaluation.comparison.formatting import Task
from metagmvae.evaluation.comparison.result_files import read_recorded, rows_of, same_model
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, Score, compared_settings
from metagmvae.evaluation.comparison.validation_rows import ComparedItem, newest_validation, validation_row
from metagmvae.infra.registry.resolve import download, file_names, find_version
from metagmvae.infra.runs.run_folder import FIGURES, RESULTS
from metagmvae.infra.tracking.store import Store, connect, registered_models, versions_of
from metagmvae.infra.tracking.tracking_errors import tracking_errors
from metagmvae.pipelines.files import read_json
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.package import CARD

CURVES = f"{FIGURES}/curves.json"


def version_items(ref: str) -> list[ComparedItem]:
    """Read `models:/name@alias` or `models:/name/3`, or every version of `models:/name`.

    Raises:
        DataError: there is no such name, alias or version.
        TrackingError: the registry cannot be reached.
    """
    store = connect(TrackingSettings(), create=False)
    with tracking_errors(store.uri):
        name = re.fullmatch(r"models:/([^/@'\"]+)", ref)
        if name is None:
            return [_item(store, find_version(store, ref), ref)]
        return [_item(store, version, "") for version in _versions(store, name[1])]


def _versions(store: Store, name: str) -> list[Any]:
    """Return all versions of a registered model, the oldest first."""
    entries = versions_of(store, name)
    if not entries:
        known = ", ".join(sorted(registered_models(store))) or "none"
        raise DataError(f"models:/{name}: no registered model of that name in {redact(store.uri)}; known: {known}")
    numbers = sorted(int(entry.version) for entry in entries)  # read again, because a search gives no aliases
    return [store.client.get_model_version(name, str(number)) for number in numbers]


def _item(store: Store, version: Any, ref: str) -> ComparedItem:
    """Read one version: the results in its run that are of this model, else its tags, else its validation.

    `ref` is empty for one of all versions of a name.
    """
    identity = f"models:/{version.name}/{version.version}"
    optional, ref = not ref, ref or identity
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    name = f"{version.name} v{version.version}{aliases}"
    with tempfile.TemporaryDirectory() as folder:
        settings, info = _card(store, version, ref, Path(folder))
        files = _fetch_results(store, version.run_id, Path(folder))
        recorded = [task for file in files if file.suffix == ".json" for task in read_recorded(file)]
        # The run folder and the version may have been evaluated separately: the newest result of each task is used.
        newest = {
            (task.result.protocol, task.result.way, task.result.shot): task
            for task in sorted(recorded, key=lambda task: task.result.when)
            if same_model(task.result, settings, info)
        }
        rows = rows_of(name, "version", ref, newest.values())
        lines = _curve(store, version.run_id, Path(folder))
    rows = rows or _tagged(name, ref, version, settings, info) or _validated(name, ref, settings, info, lines)
    return ComparedItem(ref, name, tuple(rows), tuple(lines), is_model=True, identity=identity, optional=optional)


def _card(store: Store, version: Any, ref: str, folder: Path) -> tuple[Settings, dict[str, Any]]:
    """Return the settings and training information from the package of a version, without downloading its weights."""
    package = f"{store.client.get_model_version_download_uri(version.name, version.version)}/artifacts/package"
    if CARD not in file_names(store, package):
        raise DataError(f"{ref}: not registered by metagmvae")
    card = read_json(download(store, f"{package}/{CARD}", str(folder)))
    return settings_from_json(json.dumps(card["settings"])), card["info"]


def _fetch_results(store: Store, run_id: str, folder: Path) -> list[Path]:
    """Download the result files of a run."""
    names = [item.path for item in store.client.list_artifacts(run_id, RESULTS) if not item.is_dir]
    return sorted(Path(store.client.download_artifacts(run_id, name, str(folder))) for name in names)


def _curve(store: Store, run_id: str, folder: Path) -> list[dict[str, Any]]:
    """Return the validation lines of a run from its stored training curve."""
    if CURVES not in {item.path for item in store.client.list_artifacts(run_id, CURVES.rpartition("/")[0])}:
        return []
    lines: list[dict[str, Any]] = read_json(store.client.download_artifacts(run_id, CURVES, str(folder)))["validation"]
    return lines


def _validated(name: str, ref: str, settings: Settings, info: dict[str, Any], lines: list[dict[str, Any]]) -> list[Row]:
    """Make a row of the newest validation during training, if it is of the registered step."""
    newest, data = newest_validation(lines), info.get("data_fingerprint")
    # A best checkpoint is older than the newest validation, and its own validation is not known here.
    if newest is None or newest["global_step"] != settings.pretrain.steps + info.get("step", -1):
        return []
    mode = "transductive" if info.get("stage") == "meta" else "inductive"
    return [validation_row(name, "version", ref, settings, newest, mode, data)]


def _tagged(name: str, ref: str, version: Any, settings: Settings, info: dict[str, Any]) -> list[Row]:
    """Make rows of the tags `results.SPLIT.5w1s.MODE`, which do not record episodes, queries and data."""
    groups: dict[tuple[str, str], dict[Task, Score]] = {}
    for key, value in version.tags.items():
        match = re.fullmatch(r"results\.(.+)\.(\d+)w(\d+)s\.(transductive|inductive)", key)
        if match:
            split, way, shot, mode = match.groups()
            ci95 = version.tags.get(f"{key}_ci95")
            score = Score(float(value), float(ci95) if ci95 else None)
            groups.setdefault((mode, split), {})[int(way), int(shot)] = score
    compared = compared_settings(settings.model_dump(mode="json"), info.get("data_fingerprint"))
    cost = (info.get("elapsed_s"), info.get("step"))
    return [
        Row(name, "version", ref, EvalProtocol(mode, split, None, None, None, None), scores, *cost, compared)
        for (mode, split), scores in groups.items()
    ]
