"""Writes the results of a sweep: `summary.json`, `report.md` and up to four figures of the trials that have ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from matplotlib.figure import Figure

from metagmvae.configs.dimensions import format_value
from metagmvae.evaluation.comparison.formatting import counted, markdown_table, markdown_text, percent
from metagmvae.evaluation.figures.plots import save
from metagmvae.evaluation.sweeps import sweep_figures
from metagmvae.evaluation.sweeps.importance import (
    EVALUATOR,
    SHUFFLES,
    Importance,
    SettingImportance,
    compute_importance,
)
from metagmvae.evaluation.sweeps.ranking import (
    TrialGroup,
    TrialsAtStep,
    best_trial,
    group_trials,
    rank_correlation,
    trials_at_common_step,
)
from metagmvae.evaluation.sweeps.record import SweepRecord, read_sweep
from metagmvae.evaluation.sweeps.trials import Status, Trial
from metagmvae.pipelines.files import atomic_file, write_json

SUMMARY, REPORT = "summary.json", "report.md"
MAX_REASONS = 5
"""Number of failure reasons that the report lists, the most frequent first."""


@dataclass(frozen=True)
class SweepAnalysis:
    """Everything that the files show about a sweep."""

    sweep: SweepRecord
    compared: TrialsAtStep
    importance: Importance
    groups: Mapping[str, Sequence[TrialGroup]]
    """By setting."""


def write_report(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Write summary, report and figures of a sweep, which may still be running.

    A figure is left out if there are too few trials for it (none has an accuracy, too few for importance).

    Args:
        folder: of the sweep, with `sweep.json` and `trials.jsonl`.
        out: folder for the files; the sweep's own by default.

    Returns:
        The content of `summary.json`.

    Raises:
        DataError: the folder holds no sweep, a line is broken, a trial does not fit the space, or a file cannot be
            written.
    """
    sweep, out = read_sweep(folder), out or folder
    compared = trials_at_common_step(sweep.trials)
    analysis = SweepAnalysis(sweep, compared, compute_importance(sweep, compared), group_trials(sweep, compared))
    figures = _figures(analysis)
    for name, draw in figures.items():
        save(draw(), out / name)
    summary = _summary(analysis) | {"figures": list(figures)}
    write_json(out / SUMMARY, summary)
    with atomic_file(out / REPORT) as file:
        file.write(_markdown(analysis, list(figures)).encode())
    return summary


def _figures(analysis: SweepAnalysis) -> dict[str, Callable[[], Figure]]:
    """Functions that draw the figures for which there are enough trials, by file name."""
    sweep, compared, importance = analysis.sweep, analysis.compared, analysis.importance
    figures: dict[str, Callable[[], Figure]] = {}
    if best_trial(sweep.trials):
        figures["parallel-coordinates.png"] = lambda: sweep_figures.parallel_coordinates(sweep)
        figures["accuracy-over-cost.png"] = lambda: sweep_figures.accuracy_over_cost(sweep)
    if compared.trials:
        figures["settings.png"] = lambda: sweep_figures.settings_against_accuracy(sweep, compared, analysis.groups)
    if not importance.too_few:
        figures["importance.png"] = lambda: sweep_figures.importance_bars(sweep, importance)
    return figures


def _summary(analysis: SweepAnalysis) -> dict[str, Any]:
    sweep, compared = analysis.sweep, analysis.compared
    best = best_trial(sweep.trials)
    return {
        "name": sweep.name,
        "task": sweep.task,
        "trials": len(sweep.trials),
        "by_status": _count_by_status(sweep.trials),
        "seconds": sum(trial.seconds for trial in sweep.trials),
        "best": None if best is None else _trial_summary(best),
        "judged_at_step": compared.step,
        "judged": len(compared.trials),
        "left_out": compared.left_out,
        "rank_agreement_with_end": rank_correlation(compared)[0],
        "settings": {
            name: {"best": asdict(_best_group(groups)), "groups": [asdict(group) for group in groups]}
            for name, groups in analysis.groups.items()
            if groups
        },
        "importance": analysis.importance.summary(),
    }


def _trial_summary(trial: Trial) -> dict[str, Any]:
    point = trial.curve[-1]
    return {
        "number": trial.number,
        "status": trial.status,
        "settings": trial.settings,
        "accuracy": point.accuracy,
        "ci95": point.ci95,
        "step": point.step,
        "seconds": trial.seconds,
        "run_id": trial.run_id,
    }


def _count_by_status(trials: Sequence[Trial]) -> dict[str, int]:
    counts = Counter(trial.status for trial in trials)
    return {status: counts[status] for status in get_args(Status)}


def _best_group(groups: Sequence[TrialGroup]) -> TrialGroup:
    return max(groups, key=lambda group: group.mean)


def _markdown(analysis: SweepAnalysis, figures: Sequence[str]) -> str:
    trials = analysis.sweep.trials
    seconds = sum(trial.seconds for trial in trials)
    unit, unit_seconds = sweep_figures.time_unit(seconds)
    counts = ", ".join(f"{count:,} {status}" for status, count in _count_by_status(trials).items() if count)
    parts = [
        f"# Sweep {markdown_text(analysis.sweep.name)}",
        f"{counted(len(trials), 'trial')} ({counts or 'none has ended'}), {seconds / unit_seconds:,.1f} {unit} in "
        f"total. Accuracy is measured on {markdown_text(analysis.sweep.task)} episodes of the validation classes.",
        *_best_section(best_trial(trials)),
        *_settings_section(analysis),
        *_failures_section(trials),
        *[f"![{Path(name).stem.replace('-', ' ')}]({name})" for name in figures],
    ]
    return "\n\n".join(parts) + "\n"


def _best_section(best: Trial | None) -> list[str]:
    if best is None:
        return ["No trial has an accuracy yet."]
    point = best.curve[-1]
    rows = [[markdown_text(name), markdown_text(format_value(value))] for name, value in best.settings.items()]
    note = "" if best.status == "finished" else f" ({best.status}; no trial has finished)"
    return [
        f"Best: trial {best.number}{note}, {percent(point.accuracy, point.ci95)}% at step "
        f"{point.step:,}. The accuracy of the best of many trials is biased upwards: evaluate it on other episodes.",
        markdown_table(["setting", "best trial"], rows),
    ]


def _settings_section(analysis: SweepAnalysis) -> list[str]:
    compared, importance = analysis.compared, analysis.importance
    if not compared.trials:
        return []
    left_out = f"; {compared.left_out:,} that ended earlier are left out" if compared.left_out else ""
    by_name = {setting.name: setting for setting in importance.settings}
    names = list(by_name) or [dimension.name for dimension in analysis.sweep.dimensions]
    rows = [_setting_row(name, by_name.get(name), analysis.groups[name]) for name in names]
    head = ["setting", "importance", "chance", "best on average", "worst on average"]
    return [
        f"Settings are compared at step {compared.step:,}, which {counted(len(compared.trials), 'trial')} reached"
        f"{left_out}. {_correlation_sentence(compared)}{_importance_sentence(importance)}",
        markdown_table(head, rows),
    ]


def _importance_sentence(importance: Importance) -> str:
    if importance.too_few:
        return f"No importance: {importance.too_few}."
    return (
        f"Importance is the fraction of the variance of accuracy over the search space that a setting causes alone "
        f"(functional ANOVA on a random forest, {EVALUATOR}; in brackets the range of 95% of the trees). Chance is the "
        f"largest importance after shuffling the setting among the trials {SHUFFLES} times; bold settings exceed it. "
        f"The settings explain {100 * max(0.0, importance.explained):.0f}% of the variance between trials."
    )


def _correlation_sentence(compared: TrialsAtStep) -> str:
    correlation, count = rank_correlation(compared)
    if correlation is None:
        return ""
    return (
        f"The ranks at that step and at the end of training have a Spearman correlation of {correlation:.2f} among the "
        f"{count} finished trials. "
    )


def _setting_row(name: str, setting: SettingImportance | None, groups: Sequence[TrialGroup]) -> list[str]:
    cells = ["", ""]
    if setting is not None:
        bold = "**" if setting.matters else ""
        numbers = f"{100 * setting.importance:.1f}% ({100 * setting.low:.1f} to {100 * setting.high:.1f})"
        cells = [f"{bold}{numbers}{bold}", f"{100 * setting.chance:.1f}%"]
    extremes = [_best_group(groups), min(groups, key=lambda group: group.mean)]
    return [markdown_text(name), *cells, *map(_format_group, extremes)]


def _format_group(group: TrialGroup) -> str:
    return f"{markdown_text(group.label)}: {percent(group.mean, group.ci95)}% ({group.trials:,})"


def _failures_section(trials: Sequence[Trial]) -> list[str]:
    reasons = Counter((trial.status, trial.reason) for trial in trials if trial.status in ("failed", "refused"))
    if not reasons:
        return []
    rows = [
        f"- {count:,} {status}: {markdown_text(reason) or 'no reason'}"
        for (status, reason), count in reasons.most_common(MAX_REASONS)
    ]
    more = len(reasons) - len(rows)
    further = [f"- {more:,} further reasons"] if more > 0 else []
    return ["Failed and refused trials by reason:", "\n".join([*rows, *further])]
