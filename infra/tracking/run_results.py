"""Stores evaluation results of a run in its folder, and in MLflow if the run is tracked."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metagmvae.evaluation.fewshot.baseline_tuning import baselines_summary
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.infra.runs.run_folder import CURSOR, EVALUATIONS, METRICS, RESULTS, read_lines
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.run_tracker import track
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.records import DataError

LOG = logging.getLogger(__name__)


def save_results(run_dir: Path, split: str, results: Sequence[EpisodeResults], made_with: dict[str, Any]) -> list[str]:
    """Write results to `results/` of a run (JSON, and accuracies per episode as Parquet) and to evaluations.jsonl.

    A tracked run is uploaded at once. If the store does not exist or cannot be reached, a line on stderr says how to
    upload it later. If the folder cannot be written (the run of somebody else, a full disk), a line says so.

    Returns:
        Paths of the written files; empty if the folder cannot be written.
    """
    metric_lines = read_lines(run_dir / METRICS)
    step = int(metric_lines[-1]["global_step"]) if metric_lines else 0
    try:
        files = _write(run_dir, split, results, made_with, step)
    except (DataError, OSError) as error:
        LOG.warning("%s; the results were not stored with the run", error)
        return []
    if (run_dir / CURSOR).exists():
        try:
            # The default store is not created for a run that came from elsewhere.
            track(run_dir, create=bool(os.environ.get("MLFLOW_TRACKING_URI")))
        except (TrackingError, DataError) as error:
            LOG.warning("%s; upload the results later: metagmvae track %s", error, shlex.quote(str(run_dir)))
    return [str(file) for file in files]


def _write(
    run_dir: Path, split: str, results: Sequence[EpisodeResults], made_with: dict[str, Any], step: int
) -> list[Path]:
    """Write the files of `save_results`; return those of `results/`."""
    line: dict[str, Any] = {"time": time.time(), "step": step}
    files: list[Path] = []
    for result in results:
        stem = f"{split}-{result.way}way-{result.shot}shot-{result.mode}"
        files += write_result(run_dir / RESULTS / stem, result, made_with)
        line |= result_metrics(split, result)
    with (run_dir / EVALUATIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return files


def write_result(stem: Path, result: EpisodeResults, made_with: dict[str, Any]) -> list[Path]:
    """Write a result to `STEM.json`, and the accuracy of each episode to `STEM.parquet`; return the files."""
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".parquet")]
    write_json(files[0], result.summary() | baselines_summary([result]) | made_with)
    result.write_parquet(files[1])
    return files


def result_metrics(split: str, result: EpisodeResults) -> dict[str, float]:
    """Return accuracy and interval by their metric names: `test/5w1s/transductive`, and `…_ci95` if there is one."""
    key = f"{split}/{result.way}w{result.shot}s/{result.mode}"
    return {key: result.mean} | ({} if result.ci95 is None else {f"{key}_ci95": result.ci95})
