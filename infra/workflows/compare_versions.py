"""Registered versions as rows of a comparison: their evidence, their settings, and the curve of their run."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from metagmvae.configs.load import settings_from_json
from metagmvae.configs.schema import Settings, TrackingSettings
from metagmvae.evaluation.comparison.result_files import read_recorded, rows_of, same_model
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, Score
from metagmvae.evaluation.comparison.validation_rows import (
    ComparedItem,
    compared_settings,
    newest_validation,
    validation_row,
)
from metagmvae.infra.registry.resolve import find_version
from metagmvae.infra.runs.run_folder import FIGURES, RESULTS
from metagmvae.infra.tracking.store import Store, connect, import_mlflow, redact, tracking_errors
from metagmvae.pipelines.files import read_json
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.package import CARD

CURVES = f"{FIGURES}/curves.json"


def version_sources(ref: str) -> list[ComparedItem]:
    """Sources of `models:/name@alias` or `models:/name/3`, or of every version of `models:/name`.

    Raises:
        DataError: there is no such name, alias or version.
        TrackingError: the registry cannot be reached.
    """
    store = connect(TrackingSettings(), create=False)
    with tracking_errors(store.uri):
        whole = re.fullmatch(r"models:/([^/@'\"]+)", ref)
        found = _versions(store, whole[1]) if whole else [find_version(store, ref)]
        return [_source(store, version, ref if whole is None else "") for version in found]


def _versions(store: Store, name: str) -> list[Any]:
    """All versions of a name, the first made first."""
    entries = list(store.client.search_model_versions(f"name = '{name}'"))
    if not entries:
        names = ", ".join(sorted(model.name for model in store.client.search_registered_models())) or "none"
        raise DataError(f"models:/{name}: no registered model of that name in {redact(store.uri)}; there: {names}")
    # The search leaves the aliases out.
    numbers = sorted(int(entry.version) for entry in entries)
    return [store.client.get_model_version(name, str(number)) for number in numbers]


def _source(store: Store, version: Any, ref: str) -> ComparedItem:
    """One version: results kept in its run that are of this very model; else its tags; else its validation."""
    listed = not ref
    ref = ref or f"models:/{version.name}/{version.version}"
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    name = f"{version.name} v{version.version}{aliases}"
    with tempfile.TemporaryDirectory() as folder:
        settings, info = _card(store, version, ref, Path(folder))
        files = _fetch(store, version.run_id, RESULTS, Path(folder))
        found = [one for file in files if file.suffix == ".json" for one in read_recorded(file)]
        of_it = [one for one in found if same_model(one.recorded, settings, info)]
        # The run and the version may have been judged apart: the newer result of a task counts.
        newest = {
            (one.recorded.protocol, one.recorded.way, one.recorded.shot): one
            for one in sorted(of_it, key=lambda one: one.recorded.when)
        }
        rows = rows_of(name, "version", ref, newest.values())
        lines = _curve(store, version.run_id, Path(folder))
    rows = rows or _tagged(name, ref, version, settings, info) or _validated(name, ref, settings, info, lines)
    identity = f"models:/{version.name}/{version.version}"
    return ComparedItem(ref, name, tuple(rows), tuple(lines), judgeable=True, identity=identity, listed=listed)


def _card(store: Store, version: Any, ref: str, folder: Path) -> tuple[Settings, dict[str, Any]]:
    """Settings of a version, and what is known of its training, from its package; the weights are not fetched."""
    root = store.client.get_model_version_download_uri(version.name, version.version)
    artifacts = import_mlflow().artifacts
    listed = artifacts.list_artifacts(artifact_uri=f"{root}/artifacts/package", tracking_uri=store.uri)
    if CARD not in {item.path.rpartition("/")[2] for item in listed}:
        raise DataError(f"{ref}: not a model that metagmvae registered")
    uri = f"{root}/artifacts/package/{CARD}"
    card = read_json(artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=store.uri))
    return settings_from_json(json.dumps(card["settings"])), card["info"]


def _fetch(store: Store, run_id: str, path: str, folder: Path) -> list[Path]:
    """Files of a folder of a run."""
    names = [item.path for item in store.client.list_artifacts(run_id, path) if not item.is_dir]
    return sorted(Path(store.client.download_artifacts(run_id, name, str(folder))) for name in names)


def _curve(store: Store, run_id: str, folder: Path) -> list[dict[str, Any]]:
    """Validations of the run, from the figures that it keeps."""
    if CURVES not in {item.path for item in store.client.list_artifacts(run_id, CURVES.rpartition("/")[0])}:
        return []
    lines: list[dict[str, Any]] = read_json(store.client.download_artifacts(run_id, CURVES, str(folder)))["validation"]
    return lines


def _validated(name: str, ref: str, settings: Settings, info: dict[str, Any], lines: list[dict[str, Any]]) -> list[Row]:
    """The newest validation in training, where it is of the very step that was registered."""
    newest, data = newest_validation(lines), info.get("data_fingerprint")
    # Of a model that was chosen by its score other validations than the newest would have to be known.
    if newest is None or newest["global_step"] != settings.pretrain.steps + info.get("step", -1):
        return []
    mode = "transductive" if info.get("stage") == "meta" else "inductive"
    return [validation_row(name, "version", ref, settings, newest, mode, data)]


def _tagged(name: str, ref: str, version: Any, settings: Settings, info: dict[str, Any]) -> list[Row]:
    """Rows of the tags `results.SPLIT.5w1s.MODE`, which say nothing of episodes, queries and data."""
    groups: dict[tuple[str, str], dict[tuple[int, int], Score]] = {}
    for key, value in version.tags.items():
        match = re.fullmatch(r"results\.(.+)\.(\d+)w(\d+)s\.(transductive|inductive)", key)
        if match:
            split, way, shot, mode = match.groups()
            ci95 = version.tags.get(f"{key}_ci95")
            score = Score(float(value), float(ci95) if ci95 else None)
            groups.setdefault((mode, split), {})[int(way), int(shot)] = score
    compared = compared_settings(settings, info.get("data_fingerprint"))
    cost = (info.get("elapsed_s"), info.get("step"))
    return [
        Row(name, "version", ref, EvalProtocol(mode, split, None, None, None, None), scores, *cost, compared)
        for (mode, split), scores in groups.items()
    ]
