"""Markdown tables of recorded accuracies beside the paper's, from the files of `metagmvae evaluate --record`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metagmvae.evaluation.comparison.formatting import Task, percent, task_name
from metagmvae.evaluation.comparison.paper import BY_REF, TASKS, DatasetName
from metagmvae.evaluation.comparison.record_tables import markdown_table
from metagmvae.pipelines.files import read_json
from metagmvae.pipelines.records import DataError

TITLES: dict[DatasetName, str] = {"omniglot": "Omniglot", "mini-imagenet": "Mini-ImageNet"}

PAPER_ROWS: dict[DatasetName, dict[str, str]] = {
    "omniglot": {"paper: Meta-GMVAE (transductive)": "meta-gmvae", "paper: supervised ProtoNets": "protonets"},
    "mini-imagenet": {
        "paper: Meta-GMVAE (transductive), Conv5, 400 epochs of SimCLR": "meta-gmvae",
        "paper: UMTRA on the same features": "umtra-simclr",
    },
}
"""Label -> key of a row in Tables 1 and 10 of Lee et al., ICLR 2021."""

Results = list[dict[str, Any]]
"""Recorded results of one model and task, one for each training."""


SUMMARIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "omniglot": ("omniglot-best-5way", ("soft k-means", "nearest class mean")),
    "mini-imagenet": ("mini-imagenet-cpu", ("soft k-means", "nearest class mean")),
}
"""Dataset -> model and baselines on its features that a summary shows."""


def results_table(results: Path, names: Sequence[str], baselines: Sequence[str] = ()) -> str:
    """One row for each name and below them the paper's; accuracy in percent with its 95% confidence interval.

    Args:
        results: folder of the files.
        names: `NAME` stands for the files `NAME-5way-1shot.json` and so on. Names that start with `mini-imagenet` give
            a table of that dataset, others one of Omniglot. With several trainings (`NAME-seed0-5way-1shot.json`, ...)
            a cell shows mean ± standard deviation over trainings. `NAME+` adds a row for each baseline in the files.
        baselines: the only baselines to show of `NAME+`, in this order; all by default.

    Raises:
        DataError: a name has no result, or the names are not those of one dataset.
    """
    datasets: set[DatasetName] = {"mini-imagenet" if name.startswith("mini-imagenet") else "omniglot" for name in names}
    if len(datasets) != 1:
        raise DataError(f"table of {', '.join(names) or 'nothing'}: name the results of one dataset, or use --write")
    dataset = datasets.pop()
    tasks = TASKS[dataset]
    rows = []
    for asked in names:
        name = asked.removesuffix("+")
        by_task = [read_results(results, name, task) for task in tasks]
        if not any(by_task):
            raise DataError(f"{results}: no result of {name!r}; expected {name}-5way-1shot.json or similar")
        rows.append([f"**`{name}`**{_protocol(by_task)}", *map(accuracy_cell, by_task)])
        if asked != name:
            recorded = _baselines(by_task)
            for label in baselines or recorded:
                rows.append([f"{label}{_protocol(recorded[label])}", *map(accuracy_cell, recorded[label])])
    for label, key in PAPER_ROWS[dataset].items():
        rows.append([label, *(f"{value:.2f}" for value in BY_REF[f"paper:{dataset}/{key}"].values(tasks))])
    return markdown_table([f"{TITLES[dataset]} (way,shot)", *map(task_name, tasks)], rows)


def summary_table(results: Path, dataset: str) -> str:
    """The best model of a dataset, two baselines on the same features and episodes, and the paper's rows.

    Raises:
        DataError: the dataset has no summary.
    """
    if dataset not in SUMMARIES:
        raise DataError(f"summary:{dataset}: unknown table; use one of {', '.join(SUMMARIES)}")
    name, baselines = SUMMARIES[dataset]
    return results_table(results, [f"{name}+"], baselines)


def read_results(results: Path, name: str, task: Task) -> Results:
    """Return the recorded results of a name for a task: one, or one for each training; empty if there is none."""
    suffix = f"{task[0]}way-{task[1]}shot.json"
    single = results / f"{name}-{suffix}"
    files = [single] if single.exists() else sorted(results.glob(f"{name}-seed*-{suffix}"))
    return [read_json(file) for file in files]


def _baselines(by_task: Sequence[Results]) -> dict[str, list[Results]]:
    """Return the recorded results of each baseline by its label, one list for each task."""
    recorded = [[row for result in results for row in result.get("baselines", [])] for results in by_task]
    labels = dict.fromkeys(row["baseline"] for rows in recorded for row in rows)
    return {label: [[row for row in rows if row["baseline"] == label] for rows in recorded] for label in labels}


def _protocol(by_task: Sequence[Results]) -> str:
    """Return the recorded mode and the number of trainings of a row."""
    modes = sorted({result["mode"] for results in by_task for result in results})
    trainings = max(map(len, by_task))
    return f" ({', '.join(modes)}{f', {trainings} trainings' if trainings > 1 else ''})"


def accuracy_cell(results: Results) -> str:
    """Format accuracy ± 95% interval of one training, or mean ± standard deviation over several."""
    if not results:
        return ""
    accuracies = [result["accuracy"] for result in results]
    spread = results[0]["ci95"] if len(results) == 1 else statistics.stdev(accuracies)
    return percent(statistics.fmean(accuracies), spread)
