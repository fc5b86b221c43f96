"""Markdown tables of recorded accuracies beside the paper's, from the files of `metagmvae evaluate --record`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from metagmvae.configs.suggestions import did_you_mean, similar
from metagmvae.evaluation.comparison.formatting import (
    Task,
    format_value,
    markdown_code,
    markdown_table,
    markdown_text,
    percent,
    points,
    task_name,
)
from metagmvae.evaluation.comparison.paper import BY_REF, TASKS, DatasetName
from metagmvae.evaluation.comparison.result_files import (
    RecordedAccuracy,
    RecordedBaseline,
    RecordedResult,
    check_results_folder,
    read_results,
)
from metagmvae.pipelines.files import read_json
from metagmvae.pipelines.records import DataError

TITLES: dict[str, str] = {"omniglot": "Omniglot", "mini-imagenet": "Mini-ImageNet"}
"""Titles of datasets by their recorded names; others are titled by their names."""
OMNIGLOT_SPLITS = {"1200-100-323": "own split", "vinyals": "Vinyals split"}

PAPER_ROWS: dict[DatasetName, dict[str, str]] = {
    "omniglot": {"paper: Meta-GMVAE (transductive)": "meta-gmvae", "paper: supervised ProtoNets": "protonets"},
    "mini-imagenet": {
        "paper: Meta-GMVAE (transductive), Conv5, 400 epochs of SimCLR": "meta-gmvae",
        "paper: UMTRA on the same features": "umtra-simclr",
    },
}
"""Label -> key of a row in Tables 1 and 10 of Lee et al., ICLR 2021."""

ByTask = Mapping[Task, Sequence[RecordedResult]]
"""Recorded results of one name, one for each training."""

SUMMARIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "omniglot": (
        ("omniglot-best-inductive", "omniglot-best+"),
        ("optimal transport", "EM on features, identity", "nearest class mean"),
    ),
    "mini-imagenet": (("mini-imagenet-cpu+",), ("optimal transport", "nearest class mean")),
}
"""Dataset -> names (see `results_table`) and baselines that a summary shows."""


def results_table(results: Path, names: Sequence[str], baselines: Sequence[str] = ()) -> str:
    """One row for each name and below them the paper's; accuracy in percent with its 95% confidence interval.

    Args:
        results: folder of the files.
        names: `NAME` stands for the files `NAME-5way-1shot.json` and so on. The dataset that the files record
            decides the columns and the rows of the paper. With several trainings (`NAME-seed0-5way-1shot.json`, ...) a
            cell shows mean ± standard deviation over trainings. `NAME+` adds a row for each baseline in the files.
        baselines: the only baselines to show of `NAME+`, in this order; all by default.

    Raises:
        DataError: a name has no result, a file is not a result, or the results are not of one dataset.
    """
    if not names:
        raise DataError("table of nothing: name the results of one dataset, or use --write")
    recorded = {name: _require(results, name.removesuffix("+")) for name in names}
    dataset = _one_dataset(recorded)
    tasks = _columns(dataset, recorded)
    rows = []
    for name, by_task in recorded.items():
        rows.append([f"**{markdown_code(name.removesuffix('+'))}**{_protocol(by_task)}", *_cells(by_task, tasks)])
        if name.endswith("+"):
            by_label = _baselines(by_task)
            for label in baselines or by_label:
                row = by_label[label]
                tuned = any(result.validation_accuracy is not None for found in row.values() for result in found)
                protocol = f"{_modes(row)}{'' if tuned else ', untuned'}"
                rows.append([f"{markdown_text(label)} ({protocol})", *_cells(row, tasks)])
    if dataset in PAPER_ROWS:
        for label, key in PAPER_ROWS[dataset].items():
            rows.append([label, *(f"{value:.2f}" for value in BY_REF[f"paper:{dataset}/{key}"].values(tasks))])
    return markdown_table([f"{TITLES.get(dataset) or markdown_text(dataset)} (way,shot)", *map(task_name, tasks)], rows)


def summary_table(results: Path, dataset: str) -> str:
    """The best model of a dataset in each mode, baselines on the same features and episodes, and the paper's rows.

    Raises:
        DataError: the dataset has no summary.
    """
    if dataset not in SUMMARIES:
        raise DataError(f"summary:{dataset}: unknown table; use one of {', '.join(SUMMARIES)}")
    return results_table(results, *SUMMARIES[dataset])


def paired_table(results: Path, name: str) -> str:
    """Model minus each baseline on the same episodes in percentage points, with the settings of the baseline.

    Raises:
        DataError: the name has no result, or the results hold no differences.
    """
    by_task = {task: trainings[0] for task, trainings in _require(results, name).items() if trainings[0].paired}
    if not by_task:
        raise DataError(f"{results}: the results of {name!r} hold no differences; evaluate with --baselines")
    labels = {(row.baseline, row.baseline_mode): None for result in by_task.values() for row in result.paired}
    rows = []
    for label, mode in labels:
        cells = [f"{markdown_text(label)} ({mode})"]
        for result in by_task.values():
            difference = next((row for row in result.paired if row.baseline == label), None)
            baseline = next((row for row in result.baselines if row.baseline == label), None)
            cells += [points(difference.difference, difference.ci95) if difference else "", _settings(baseline)]
        rows.append(cells)
    head = [title for task in by_task for title in (task_name(task), f"{task_name(task)}: settings")]
    return markdown_table(["model minus baseline", *head], rows)


def calibration_table(results: Path, names: str) -> str:
    """Accuracy and expected calibration error in percent, before and after calibration, one row for each result.

    Raises:
        DataError: a name has no result, or a result has no calibration error.
    """
    rows = []
    for name in names.split(","):
        for task, (result, *_) in sorted(_require(results, name).items()):
            if result.ece is None or result.ece_uncalibrated is None:
                raise DataError(f"{results}: {name} {task_name(task)} has no calibration error; record it again")
            errors = f"{100 * result.ece_uncalibrated:.2f}", f"{100 * result.ece:.2f}"
            fitted = f"{result.temperature:.2f}", f"{100 * result.uniform:.2f}"
            rows.append([task_name(task), result.mode, percent(result.accuracy, result.ci95), *errors, *fitted])
    head = ["(way,shot)", "mode", "accuracy", "calibration error before", "calibration error", "temperature", "uniform"]
    return markdown_table(head, rows)


QUERIES = {"balanced": "balanced", "dirichlet-2": "Dirichlet(2)", "dirichlet-0.5": "Dirichlet(0.5)"}
"""Part of a file name -> title of the kind of queries."""
WEIGHTS = {"equal": "model, class weights 1/K", "estimated": "model, class weights estimated", "inductive": "model"}
"""Part of a file name -> label of the model."""


def queries_table(results: Path, name: str) -> str:
    """Accuracy in percent for balanced and Dirichlet-drawn queries, of a model in three forms and of the baselines.

    The files are `NAME-queries-KIND-FORM-5way-1shot.json` and so on.

    Raises:
        DataError: a result is missing.
    """
    found = {(kind, form): _require(results, f"{name}-queries-{kind}-{form}") for kind in QUERIES for form in WEIGHTS}
    tasks = sorted(found["balanced", "equal"])
    cells: dict[str, list[str]] = {}
    for task in tasks:
        for kind in QUERIES:
            for form, label in WEIGHTS.items():
                (result, *_) = found[kind, form][task]
                cells.setdefault(f"{label} ({result.mode})", []).append(percent(result.accuracy, result.ci95))
            for row in found[kind, "equal"][task][0].baselines:
                label = f"{markdown_text(row.baseline)} ({row.mode})"
                cells.setdefault(label, []).append(percent(row.accuracy, row.ci95))
    head = [f"{task_name(task)}, {title}" for task in tasks for title in QUERIES.values()]
    return markdown_table(["queries", *head], [[label, *row] for label, row in cells.items()])


def open_table(results: Path, name: str) -> str:
    """Accuracies, AUROC and calibration error in percent where queries may be of no labelled class.

    The files are `NAME-open-1.json` and so on, of `metagmvae evaluate --open`.

    Raises:
        DataError: there is no such file, or it has other content.
    """
    files = sorted(results.glob(f"{name}-open-*.json"))
    if not files:
        raise DataError(f"{results}: has no {name}-open-*.json; record it with metagmvae evaluate --open --record")
    rows = []
    for row in (row for file in files for row in read_json(file)["rows"]):
        accuracies = percent(row["accuracy"], row["ci95"]), f"{100 * row['auroc']:.2f}"
        answered = percent(row["open_accuracy"], row["open_ci95"]), f"{100 * row['ece']:.2f}" if "ece" in row else ""
        name = f"{markdown_text(row['model'])} ({row['mode']})"
        rows.append([task_name((row["way"], row["shot"])), name, *accuracies, *answered])
    head = ["(way,shot)", "classifier", "accuracy of known classes", "AUROC", 'accuracy with "unknown"']
    return markdown_table([*head, "calibration error"], rows)


def _settings(baseline: RecordedBaseline | None) -> str:
    return ", ".join(
        markdown_text(str(value) if name == "features" else f"{name} {format_value(value)}")
        for name, value in (baseline.settings.items() if baseline else ())
    )


def results_by_task(results: Path, name: str) -> ByTask:
    """Read the results of a name, one or one for each training, by task; empty if there are none.

    The files are `NAME-5way-1shot.json` and so on, or `NAME.json` for several tasks, with `-seed0` and so on after the
    name for several trainings.

    Raises:
        DataError: a file is not a result, is of another task than its name says, or of one that another file has.
    """
    pattern = re.compile(rf"{re.escape(name)}(-seed\d+)?(?:-(\d+)way-(\d+)shot)?\.json")
    by_task: dict[Task, dict[str, RecordedResult]] = {}
    for path in sorted(results.glob("*.json")):
        if not (match := pattern.fullmatch(path.name)):
            continue
        for result in read_results(path):
            task, training = (result.way, result.shot), match[1] or ""
            if match[2] and task != (int(match[2]), int(match[3])):
                raise DataError(f"{path}: its result is of {task_name(task)}, not as its name says; rename it")
            if training in by_task.setdefault(task, {}):
                raise DataError(f"{path}: another file has a result of {task_name(task)} too; remove one of them")
            by_task[task][training] = result
    return {
        task: [trainings[""]] if "" in trainings else list(trainings.values())
        for task, trainings in sorted(by_task.items())
    }


def _require(results: Path, name: str) -> ByTask:
    if by_task := results_by_task(results, name):
        return by_task
    check_results_folder(results)
    files = (re.fullmatch(r"(.+?)(?:-seed\d+)?(?:-\d+way-\d+shot)?\.json", path.name) for path in results.iterdir())
    hint = did_you_mean(similar(name, sorted({"flips", *(match[1] for match in files if match)})))
    raise DataError(f"{results}: no result of {name!r}{hint or f'; expected {name}-5way-1shot.json or similar'}")


def _one_dataset(recorded: Mapping[str, ByTask]) -> str:
    """Return the name of the dataset that all results record."""
    names = {
        result.images.name or f"dataset {result.data_fingerprint[:8]}": name
        for name, by_task in recorded.items()
        for trainings in by_task.values()
        for result in trainings
    }
    if len(names) > 1:
        found = ", ".join(f"{name} is of {dataset}" for dataset, name in names.items())
        raise DataError(f"{found}: name the results of one dataset, or use --write")
    return next(iter(names))


def _columns(dataset: str, recorded: Mapping[str, ByTask]) -> Sequence[Task]:
    """Return the tasks of the paper's table, or those that are recorded for a dataset that the paper does not use."""
    if dataset in PAPER_ROWS:
        return TASKS[dataset]
    return sorted({task for by_task in recorded.values() for task in by_task})


def _baselines(by_task: ByTask) -> dict[str, dict[Task, list[RecordedBaseline]]]:
    """Return the recorded results of each baseline by its label and task."""
    by_label: dict[str, dict[Task, list[RecordedBaseline]]] = {}
    for task, trainings in by_task.items():
        for row in (row for result in trainings for row in result.baselines):
            by_label.setdefault(row.baseline, {}).setdefault(task, []).append(row)
    return by_label


def _protocol(by_task: ByTask) -> str:
    """Return what is recorded of a row: mode, split of Omniglot, choice of the checkpoint by labels, trainings."""
    results = [result for trainings in by_task.values() for result in trainings]
    notes = [_modes(by_task)]
    splits = {str(result.images.options.get("split", "")) for result in results if result.images.name == "omniglot"}
    notes += [OMNIGLOT_SPLITS.get(split) or markdown_text(split) for split in sorted(splits) if split]
    if any(result.trained.get("selected_by") for result in results):
        notes.append("checkpoint chosen with validation labels")
    trainings = max(map(len, by_task.values()))
    if trainings > 1:
        notes.append(f"{trainings} trainings")
    elif len({result.state for result in results}) > 1:
        notes.append("columns of different trainings")
    return f" ({', '.join(notes)})"


def _modes(by_task: Mapping[Task, Sequence[RecordedAccuracy]]) -> str:
    rows = [result for results in by_task.values() for result in results]
    unbalanced = ["unbalanced queries"] if any(result.unbalanced for result in rows) else []
    alphas = sorted({result.dirichlet for result in rows if result.dirichlet is not None})
    unbalanced += [f"Dirichlet({alpha:g}) queries" for alpha in alphas]
    return ", ".join(sorted({result.mode for result in rows}) + unbalanced)


def _cells(by_task: Mapping[Task, Sequence[RecordedAccuracy]], tasks: Sequence[Task]) -> list[str]:
    return [accuracy_cell(by_task.get(task, ())) for task in tasks]


def accuracy_cell(results: Sequence[RecordedAccuracy]) -> str:
    """Format accuracy ± 95% interval of one training, or mean ± standard deviation over several."""
    if not results:
        return ""
    accuracies = [result.accuracy for result in results]
    spread = results[0].ci95 if len(results) == 1 else statistics.stdev(accuracies)
    return percent(statistics.fmean(accuracies), spread)
