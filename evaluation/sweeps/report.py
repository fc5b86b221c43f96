"""What a sweep says: `summary.json`, `report.md` and four pictures, of as many trials as have ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from matplotlib.figure import Figure

from metagmvae.evaluation.figures.plots import save
from metagmvae.evaluation.sweeps import sweep_figures
from metagmvae.evaluation.sweeps.importance import Importance, ImportanceShare, importance_of
from metagmvae.evaluation.sweeps.ranking import (
    TrialGroup,
    TrialsAtStep,
    agreement,
    best_trial,
    groups,
    trials_at_common_step,
)
from metagmvae.evaluation.sweeps.record import SweepRecord, read_sweep, shown_value
from metagmvae.evaluation.sweeps.trials import Status, Trial
from metagmvae.pipelines.files import atomic_file, write_json

SUMMARY, REPORT = "summary.json", "report.md"
REASONS = 5
"""Reasons of failures that the report lists, the most frequent."""


def write_report(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Write what the trials of a sweep say; a sweep that still runs is told as far as it has come.

    Pictures that the trials do not carry yet (none with an accuracy, too few for importance) are not drawn.

    Args:
        folder: of the sweep, with `sweep.json` and `trials.jsonl`.
        out: folder of the files; the sweep's own by default.

    Returns:
        What `summary.json` holds.

    Raises:
        DataError: no sweep there, a broken line, a trial that does not fit the space, or a folder that cannot be
            written.
    """
    sweep, out = read_sweep(folder), out or folder
    judged = trials_at_common_step(sweep.trials)
    importance, means = importance_of(sweep, judged), groups(sweep, judged)
    pictures = _pictures(sweep, judged, importance, means)
    for name, draw in pictures.items():
        save(draw(), out / name)
    summary = _summary(sweep, judged, importance, means) | {"figures": list(pictures)}
    write_json(out / SUMMARY, summary)
    with atomic_file(out / REPORT) as file:
        file.write(_markdown(sweep, judged, importance, means, list(pictures)).encode())
    return summary


def _pictures(
    sweep: SweepRecord, judged: TrialsAtStep, importance: Importance, means: Mapping[str, Sequence[TrialGroup]]
) -> dict[str, Callable[[], Figure]]:
    drawn: dict[str, Callable[[], Figure]] = {}
    if best_trial(sweep.trials):
        drawn["parallel-coordinates.png"] = lambda: sweep_figures.parallel_coordinates(sweep)
        drawn["accuracy-over-cost.png"] = lambda: sweep_figures.accuracy_over_cost(sweep)
    if judged.trials:
        drawn["settings.png"] = lambda: sweep_figures.settings_against_accuracy(sweep, judged, means)
    if not importance.too_few:
        drawn["importance.png"] = lambda: sweep_figures.importance_bars(sweep, importance)
    return drawn


def _summary(
    sweep: SweepRecord, judged: TrialsAtStep, importance: Importance, means: Mapping[str, Sequence[TrialGroup]]
) -> dict[str, Any]:
    best = best_trial(sweep.trials)
    return {
        "name": sweep.name,
        "task": sweep.task,
        "trials": len(sweep.trials),
        "by_status": _by_status(sweep.trials),
        "seconds": sum(trial.seconds for trial in sweep.trials),
        "best": None if best is None else _notes(best),
        "judged_at_step": judged.step,
        "judged": len(judged.trials),
        "left_out": judged.left_out,
        "rank_agreement_with_end": agreement(judged)[0],
        "settings": {
            name: {"best": _best(found).summary(), "groups": [group.summary() for group in found]}
            for name, found in means.items()
            if found
        },
        "importance": importance.summary(),
    }


def _notes(trial: Trial) -> dict[str, Any]:
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


def _by_status(trials: Sequence[Trial]) -> dict[str, int]:
    counts = Counter(trial.status for trial in trials)
    return {status: counts[status] for status in get_args(Status)}


def _best(found: Sequence[TrialGroup]) -> TrialGroup:
    return max(found, key=lambda group: group.mean)


def _markdown(
    sweep: SweepRecord,
    judged: TrialsAtStep,
    importance: Importance,
    means: Mapping[str, Sequence[TrialGroup]],
    pictures: Sequence[str],
) -> str:
    unit, seconds = sweep_figures.time_unit(sum(trial.seconds for trial in sweep.trials))
    spent = sum(trial.seconds for trial in sweep.trials) / seconds
    counts = ", ".join(f"{count:,} {status}" for status, count in _by_status(sweep.trials).items() if count)
    parts = [
        f"# Sweep {sweep.name}",
        f"{len(sweep.trials):,} trials ({counts or 'none has ended'}), {spent:,.1f} {unit} of all together. "
        f"Accuracy is that of {sweep.task} episodes of validation classes.",
        *_about_best(best_trial(sweep.trials)),
        *_about_settings(sweep, judged, importance, means),
        *_about_pairs(importance),
        *_about_failures(sweep.trials),
        *[f"![{Path(name).stem.replace('-', ' ')}]({name})" for name in pictures],
    ]
    return "\n\n".join(parts) + "\n"


def _about_best(best: Trial | None) -> list[str]:
    if best is None:
        return ["No trial has an accuracy yet."]
    point = best.curve[-1]
    rows = [f"| {name} | {shown_value(value)} |" for name, value in best.settings.items()]
    less = "" if best.status == "finished" else f" ({best.status}: none trained to the end)"
    return [
        f"Best: trial {best.number}{less}, {100 * point.accuracy:.2f} ± {100 * point.ci95:.2f}% at step "
        f"{point.step:,}. The best of many is lucky too: judge it on other episodes before believing the number.",
        "\n".join(["| setting | best trial |", "| --- | --- |", *rows]),
    ]


def _about_settings(
    sweep: SweepRecord, judged: TrialsAtStep, importance: Importance, means: Mapping[str, Sequence[TrialGroup]]
) -> list[str]:
    if not judged.trials:
        return []
    left = f"; {judged.left_out:,} that ended earlier are left out" if judged.left_out else ""
    shares = {share.names[0]: share for share in importance.settings}
    order = list(shares) or [axis.name for axis in sweep.axes]
    rows = [_row(name, shares.get(name), means[name]) for name in order]
    head = ["| setting | importance | chance | best on average | worst on average |", "| --- | --- | --- | --- | --- |"]
    told = (
        f"No importance: {importance.too_few}."
        if importance.too_few
        else f"Importance is a share of the variance of accuracy over the space (functional ANOVA on a random forest, "
        f"95% of its trees in brackets); chance is the most that the setting got in shuffled trials. The settings "
        f"explain {100 * max(0.0, importance.explained):.0f}% of what differs between trials."
    )
    return [
        f"Settings are compared at step {judged.step:,}, which {len(judged.trials):,} trials have reached{left}. "
        f"{_about_agreement(judged)}{told}",
        "\n".join([*head, *rows]),
    ]


def _about_agreement(judged: TrialsAtStep) -> str:
    rank, count = agreement(judged)
    if rank is None:
        return ""
    return (
        f"What is good there need not be good in the end: among the {count} trials that trained to the end, the ranks "
        f"at that step and at the end have a correlation of {rank:.2f} (Spearman). "
    )


def _row(name: str, share: ImportanceShare | None, found: Sequence[TrialGroup]) -> str:
    cells = ["", ""]
    if share is not None and share.chance is not None:
        bold = "**" if share.matters else ""
        numbers = f"{100 * share.importance:.1f}% ({100 * share.low:.1f} to {100 * share.high:.1f})"
        cells = [f"{bold}{numbers}{bold}", f"{100 * share.chance:.1f}%"]
    ends = [_best(found), min(found, key=lambda group: group.mean)]
    return " | ".join([f"| {name}", *cells, *map(_mean, ends)]) + " |"


def _mean(group: TrialGroup) -> str:
    half = "" if group.ci95 is None else f" ± {100 * group.ci95:.2f}"
    return f"{group.label}: {100 * group.mean:.2f}{half}% ({group.trials:,})"


def _about_pairs(importance: Importance) -> list[str]:
    told = [pair for pair in importance.pairs[:3] if pair.importance >= 0.01]
    rows = [f"{' with '.join(pair.names)} {100 * pair.importance:.1f}%" for pair in told]
    return [f"Two settings together, beyond what each does alone: {'; '.join(rows)}."] if rows else []


def _about_failures(trials: Sequence[Trial]) -> list[str]:
    reasons = Counter((trial.status, trial.reason) for trial in trials if trial.status in ("failed", "refused"))
    if not reasons:
        return []
    rows = [
        f"- {count:,} {status}: {reason or 'no reason'}" for (status, reason), count in reasons.most_common(REASONS)
    ]
    more = len(reasons) - len(rows)
    return ["\n".join([*rows, *([f"- {more:,} further reasons"] if more > 0 else [])])]
