"""What is found out about a run after its training goes into its folder, and on to MLflow: results, figures."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.surroundings import METRICS, read_lines
from pipelines.files import write_json
from pipelines.records import DataError

if TYPE_CHECKING:
    from configs.schema import Settings
    from evaluation.benchmark import EpisodeResults
    from pipelines.dataset import Dataset

EVALUATIONS = "evaluations.jsonl"


def keep_results(run_dir: Path, split: str, results: Sequence[EpisodeResults], made_with: dict[str, Any]) -> list[str]:
    """Put results into `results/` of a run (JSON, and accuracies by episode in Parquet), and a line for MLflow.

    A run that is tracked is sent at once; a store that cannot be reached is named on stderr, and
    `metagmvae track` sends it later.
    """
    from infra.tracking import TrackingError, track
    from infra.tracking_cursor import CURSOR

    trained = read_lines(run_dir / METRICS)
    line: dict[str, Any] = {"time": time.time(), "step": trained[-1]["global_step"] if trained else 0}
    files = []
    for result in results:
        stem = f"{split}-{result.way}way-{result.shot}shot-{result.mode}"
        files += [run_dir / "results" / f"{stem}.json", run_dir / "results" / f"{stem}.parquet"]
        write_json(files[-2], result.summary() | made_with)
        result.write_parquet(files[-1])
        key = result_key(split, result)
        line |= {key: result.mean, f"{key}_ci95": result.ci95}
    with (run_dir / EVALUATIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if (run_dir / CURSOR).exists():
        try:
            track(run_dir)
        except TrackingError as error:
            print(f"{error}; send the results later: metagmvae track {run_dir}", file=sys.stderr)
    return [str(file) for file in files]


def result_key(split: str, result: EpisodeResults) -> str:
    """Name of a result as a metric: `test/5w1s/transductive`."""
    return f"{split}/{result.way}w{result.shot}s/{result.mode}"


def draw_figures(run_dir: Path, settings: Settings, dataset: Dataset) -> None:
    """Put the figures of a finished run into `figures/`; what cannot be drawn of this data is named on stderr."""
    from evaluation.gallery import draw_gallery
    from evaluation.package import load_model

    split = settings.data.validation_split
    lines = read_lines(run_dir / METRICS)
    try:
        draw_gallery(load_model(run_dir), dataset, split, run_dir / "figures", lines)
    except DataError as error:
        print(f"no figures were drawn: {error}", file=sys.stderr)
