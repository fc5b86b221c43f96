"""Logs the accuracies of a run as metrics of its registered model, so that MLflow ranks models on one data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metagmvae.evaluation.comparison.result_files import read_recorded, same_model
from metagmvae.infra.runs.run_folder import EVALUATIONS, METRICS, RESULTS, read_lines, read_record
from metagmvae.infra.tracking.convert import timed_points, training_points
from metagmvae.infra.tracking.dataset_input import log_model_metrics
from metagmvae.infra.tracking.store import Store
from metagmvae.pipelines.files import read_json


def log_scores(store: Store, run_id: str, model_id: str, loaded: Any, run_dir: Path) -> None:
    """Log the validation at the step of the model, and the results of `metagmvae evaluate` for this model.

    The points are those that the run has already, with the same times, so the run does not get them twice.
    """
    started_ms = store.client.get_run(run_id).info.start_time
    reached = loaded.info.get("stage"), loaded.info.get("step")
    for line in read_lines(run_dir / METRICS):
        if (line["stage"], line["step"]) == reached:
            points = [point for point in training_points(line, started_ms) if "validation/" in point.key]
            log_model_metrics(store, run_id, model_id, points, read_record(run_dir))
    evaluated = [point for line in read_lines(run_dir / EVALUATIONS) for point in timed_points(line, "step")]
    latest = {point.key: point for point in evaluated}
    for path in sorted((run_dir / RESULTS).glob("*.json")):
        for task in read_recorded(path):
            result = task.result
            key = f"{result.split}/{result.way}w{result.shot}s/{result.mode}"
            if key in latest and same_model(result, loaded.settings, loaded.info):
                log_model_metrics(store, run_id, model_id, [latest[key]], read_json(path))
