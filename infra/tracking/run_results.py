"""What is found out about a run after its training goes into its folder, and on to MLflow: results, figures."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.infra.runs.run_folder import CURSOR, EVALUATIONS, METRICS, RESULTS, read_lines
from metagmvae.pipelines.files import write_json

if TYPE_CHECKING:
    from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults


def keep_results(run_dir: Path, split: str, results: Sequence[EpisodeResults], made_with: dict[str, Any]) -> list[str]:
    """Put results into `results/` of a run (JSON, and accuracies by episode in Parquet), and a line for MLflow.

    A run that is tracked is sent at once; a store that cannot be reached is named on stderr, and
    `metagmvae track` sends it later.
    """
    from metagmvae.infra.tracking.run_tracker import track
    from metagmvae.infra.tracking.store import TrackingError

    trained = read_lines(run_dir / METRICS)
    line: dict[str, Any] = {"time": time.time(), "step": trained[-1]["global_step"] if trained else 0}
    files = []
    for result in results:
        stem = f"{split}-{result.way}way-{result.shot}shot-{result.mode}"
        files += [run_dir / RESULTS / f"{stem}.json", run_dir / RESULTS / f"{stem}.parquet"]
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
