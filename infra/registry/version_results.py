"""What `evaluate models:/…` finds out goes back to the registered version, and to the run that it came from."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.registry.resolve import find_version
from metagmvae.infra.runs.run_folder import RESULTS
from metagmvae.infra.tracking.run_results import result_key
from metagmvae.infra.tracking.store import TrackingError, connect, tracking_errors
from metagmvae.pipelines.files import write_json

if TYPE_CHECKING:
    from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults


def keep_on_version(ref: str, split: str, results: Sequence[EpisodeResults], made_with: dict[str, Any]) -> str:
    """Tags `results.…` of the version; metrics and files (JSON, and accuracies by episode) of its run.

    A store that cannot be reached any more, or may not be written, is named on stderr: the results stand in the
    answer all the same.

    Returns:
        `models:/name/version`; empty where nothing could be kept.
    """
    try:
        store = connect(TrackingSettings(), create=False)
        with tracking_errors(store.uri), tempfile.TemporaryDirectory() as folder:
            version = find_version(store, ref)
            for result in results:
                key = result_key(split, result)
                numbers = {key: result.mean, f"{key}_ci95": result.ci95}
                for name, value in numbers.items():
                    tag = f"results.{name.replace('/', '.')}"
                    store.client.set_model_version_tag(version.name, version.version, tag, f"{value:.6f}")
                    store.client.log_metric(version.run_id, name, value)
                for what in ("data", "data_fingerprint"):  # so that `metagmvae models` can look whether it is there
                    tag = f"results.{key.replace('/', '.')}_{what}"
                    store.client.set_model_version_tag(version.name, version.version, tag, made_with[what])
                stem = Path(folder) / key.replace("/", "-")
                write_json(stem.with_suffix(".json"), result.summary() | made_with)
                result.write_parquet(stem.with_suffix(".parquet"))
            store.client.log_artifacts(version.run_id, folder, RESULTS)
    except TrackingError as error:
        print(f"{error}; the results were not kept with the registered version", file=sys.stderr)
        return ""
    return f"models:/{version.name}/{version.version}"
