"""Stores the results of `evaluate models:/…` with the registered version and with the run that it came from."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metagmvae.configs.schema import TrackingSettings
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.infra.registry.resolve import find_version
from metagmvae.infra.runs.run_folder import RESULTS
from metagmvae.infra.tracking.convert import MetricPoint
from metagmvae.infra.tracking.dataset_input import log_model_metrics, logged_model_id
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.run_results import result_metrics, write_result
from metagmvae.infra.tracking.store import connect
from metagmvae.infra.tracking.tracking_errors import tracking_errors

LOG = logging.getLogger(__name__)


def save_on_version(ref: str, split: str, results: Sequence[EpisodeResults], made_with: dict[str, Any]) -> str:
    """Set tags `results.…` of the version; upload metrics and files (JSON, Parquet per episode) to its run.

    If the store cannot be reached or written, a line on stderr says so; the command prints the results in any case.

    Returns:
        `models:/name/version`; empty if the results could not be stored.
    """
    try:
        store = connect(TrackingSettings(), create=False)
        with tracking_errors(store.uri), tempfile.TemporaryDirectory() as folder:
            version = find_version(store, ref)
            for result in results:
                numbers = result_metrics(split, result)
                key = next(iter(numbers))
                for name, value in numbers.items():
                    tag = f"results.{name.replace('/', '.')}"
                    store.client.set_model_version_tag(version.name, version.version, tag, f"{value:.6f}")
                now_ms = round(1000 * time.time())
                points = [MetricPoint(name, value, now_ms, 0) for name, value in numbers.items()]
                log_model_metrics(store, version.run_id, logged_model_id(version), points, made_with)
                for field in ("data", "data_fingerprint"):  # with these `metagmvae models` checks the dataset
                    tag = f"results.{key.replace('/', '.')}_{field}"
                    store.client.set_model_version_tag(version.name, version.version, tag, made_with[field])
                write_result(Path(folder) / key.replace("/", "-"), result, made_with)
            store.client.log_artifacts(version.run_id, folder, RESULTS)
    except TrackingError as error:
        LOG.warning("%s; the results were not stored with the registered version: evaluate again to store them", error)
        return ""
    return f"models:/{version.name}/{version.version}"
