"""Figures of a sweep: parallel coordinates, accuracy over cost, accuracy by setting, importance of settings.

Each function returns a new matplotlib Figure. Accuracies are in percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from metagmvae.configs.dimensions import Dimension
from metagmvae.evaluation.comparison.formatting import counted
from metagmvae.evaluation.figures.plots import COLOURS, GREY
from metagmvae.evaluation.sweeps.importance import Importance
from metagmvae.evaluation.sweeps.ranking import TrialGroup, TrialsAtStep, best_trial, part_count, part_indices
from metagmvae.evaluation.sweeps.record import SweepRecord
from metagmvae.evaluation.sweeps.trials import Trial

Array = np.ndarray
MAX_LINES = 400
"""Trials drawn as lines. More lines would hide each other; the best trials are always among those drawn."""
MAX_POINTS = 3000
BEST = 40
"""Number of best trials that are always drawn."""
LIGHT = "#C8C8C8"
CURVE_POINTS = 24
"""Points of a curve between two parallel axes."""


def sample_trials(trials: Sequence[Trial], maximum: int) -> list[Trial]:
    """The best trials and a seeded random sample of the others, at most `maximum` in all, in the given order."""
    if len(trials) <= maximum:
        return list(trials)
    by_accuracy = sorted(range(len(trials)), key=lambda row: -(trials[row].curve[-1].accuracy))
    others = np.random.default_rng(0).choice(by_accuracy[BEST:], maximum - BEST, replace=False)
    return [trials[row] for row in sorted([*by_accuracy[:BEST], *(int(row) for row in others)])]


def parallel_coordinates(sweep: SweepRecord) -> Figure:
    """One curve per trial across the axes of all settings to its accuracy; the best trial is drawn in bold."""
    validated = [trial for trial in sweep.trials if trial.curve]
    trials, best = sample_trials(validated, MAX_LINES), best_trial(validated)
    accuracy = 100 * np.array([trial.curve[-1].accuracy for trial in trials])
    low, high = _limits(accuracy)
    figure = Figure(figsize=(1.75 * (len(sweep.dimensions) + 1), 4.2), layout="constrained")
    axes = figure.subplots(1, 1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    heights = np.column_stack((_jittered_positions(sweep, trials), (accuracy - low) / (high - low)))
    scale = _draw_lines(axes, trials, heights, accuracy, best)
    for x, dimension in enumerate(sweep.dimensions):
        _draw_vertical_axis(axes, x, dimension.short_name, *dimension.ticks())
    last, (bottom, top) = len(sweep.dimensions), ((end - low) / (high - low) for end in (scale.vmin, scale.vmax))
    colour_bar = np.linspace(0, 1, 256)[:, None]
    extent = (last, last + 0.04, bottom, top)
    axes.imshow(colour_bar, cmap="viridis_r", aspect="auto", origin="lower", extent=extent, zorder=6)
    axes.set(xlim=(-0.25, last + 0.3), ylim=(-0.04, 1.04))
    ticks = _round_ticks(low, high)
    _draw_vertical_axis(axes, last, "accuracy, %", [(tick - low) / (high - low) for tick in ticks], _labels(ticks))
    drawn = "" if len(trials) == len(validated) else f" ({len(trials):,} drawn)"
    bold = "" if best is None else f"; bold: trial {best.number}, the best"
    axes.set_title(
        f"{sweep.name}: {counted(len(validated), 'trial')}{drawn}; grey: stopped or failed{bold}", fontsize=10
    )
    return figure


def _draw_lines(axes: Any, trials: Sequence[Trial], heights: Array, accuracy: Array, best: Trial | None) -> Any:
    """Draw trials at their heights, (trials, axes + 1); return the colour scale."""
    finished = np.array([trial.status == "finished" for trial in trials], bool)
    # Colour distinguishes only trials with equal budgets, or all trials if none has finished.
    coloured = finished if finished.any() else ~finished
    # The scale starts at the 10% quantile: otherwise a few bad trials would take most of the colours.
    lowest, highest = (float(np.quantile(accuracy[coloured], quantile)) for quantile in (0.1, 1.0))
    scale, colours = Normalize(*_limits(np.array([lowest, highest])), clip=True), colormaps["viridis_r"]
    for row in np.lexsort((accuracy, coloured)):  # better trials are drawn last, on top
        style: dict[str, Any] = {"color": LIGHT, "alpha": 0.5, "linewidth": 0.7}
        if coloured[row]:
            style = {"color": colours(scale(accuracy[row])), "alpha": 0.8, "linewidth": 1.2}
        if best is not None and trials[row].number == best.number:
            style |= {"alpha": 1.0, "linewidth": 3.0, "zorder": 5}
        axes.plot(*_smooth_curve(heights[row]), solid_capstyle="round", **style)
    return scale


def _jittered_positions(sweep: SweepRecord, trials: Sequence[Trial]) -> Array:
    """Positions on the axes. Levels get a small jitter so that curves do not cover each other."""
    positions = sweep.positions(trials)
    for column, dimension in enumerate(sweep.dimensions):
        if dimension.levels:
            jitter = min(0.6 * 0.5 / len(dimension.levels), 0.02)
            positions[:, column] += np.random.default_rng(column).uniform(-1, 1, len(trials)) * jitter
    return positions


def _smooth_curve(heights: Array) -> tuple[Array, Array]:
    """x and y of a curve through the heights at x = 0, 1, …, horizontal where it crosses an axis (smoothstep)."""
    t = np.linspace(0, 1, CURVE_POINTS, endpoint=False)
    y = (heights[:-1, None] + np.diff(heights)[:, None] * t**2 * (3 - 2 * t)).ravel()
    x = (np.arange(len(heights) - 1)[:, None] + t).ravel()
    return np.append(x, len(heights) - 1), np.append(y, heights[-1])


def _draw_vertical_axis(axes: Any, x: int, name: str, ticks: Sequence[float], labels: Sequence[str]) -> None:
    axes.plot([x, x], [0, 1], color="black", linewidth=0.9, zorder=6)
    axes.text(x, -0.06, name, ha="center", va="top", fontsize=9)
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    for tick, label in zip(ticks, labels, strict=True):
        axes.plot([x - 0.02, x + 0.02], [tick, tick], color="black", linewidth=0.9, zorder=6)
        axes.text(x + 0.05, tick, label, va="center", fontsize=7.5, zorder=7, bbox=box)


def accuracy_over_cost(sweep: SweepRecord) -> Figure:
    """Left: accuracy of each trial over its training time. Right: best accuracy so far over the total time."""
    validated = [trial for trial in sweep.trials if trial.curve]
    trials, best = sample_trials(validated, MAX_LINES), best_trial(validated)
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    unit, seconds = time_unit(max((trial.curve[-1].seconds for trial in validated), default=0.0))
    for trial in trials:
        finished = trial.status == "finished"
        style: dict[str, Any] = {"color": COLOURS[0] if finished else LIGHT, "alpha": 0.45 if finished else 0.6}
        if best is not None and trial.number == best.number:
            style = {"color": COLOURS[1], "linewidth": 2.2, "zorder": 4, "label": f"best (trial {trial.number})"}
        times = [point.seconds / seconds for point in trial.curve]
        accuracies = [100 * point.accuracy for point in trial.curve]
        left.plot(times, accuracies, **{"linewidth": 0.9, "zorder": 2 + finished, **style})
    for colour, label in ((COLOURS[0], "finished"), (LIGHT, "stopped or failed")):
        left.plot([], [], color=colour, label=label)
    left.set(xlabel=f"training time of a trial, {unit}", ylabel="validation accuracy, %")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    _draw_best_so_far(right, sweep.trials)
    figure.suptitle(f"{sweep.name}: {counted(len(validated), 'trial')} with an accuracy", fontsize=10)
    return figure


def _draw_best_so_far(axes: Any, trials: Sequence[Trial]) -> None:
    """Latest accuracies over the summed time of the trials, in the order in which they ended, and the best so far."""
    total = np.cumsum([trial.seconds for trial in trials])
    unit, seconds = time_unit(float(total[-1]) if len(total) else 0.0)
    rows = [row for row, trial in enumerate(trials) if trial.curve]
    latest = 100 * np.array([trials[row].curve[-1].accuracy for row in rows])
    finished = np.array([trials[row].status == "finished" for row in rows], bool)
    times = total[rows] / seconds
    for mask, colour in ((~finished, LIGHT), (finished, COLOURS[0])):
        axes.scatter(times[mask], latest[mask], s=12, color=colour, alpha=0.6, linewidths=0)
    # The line includes only finished trials, because only these have equal budgets.
    axes.step(times[finished], np.maximum.accumulate(latest[finished]), where="post", color=COLOURS[1], linewidth=2)
    axes.set(xlabel=f"summed time of all trials, {unit}", xlim=(0, None))
    if finished.any():
        axes.set_title("line: best finished trial so far", fontsize=8, color=GREY)


def settings_against_accuracy(
    sweep: SweepRecord, compared: TrialsAtStep, groups: Mapping[str, Sequence[TrialGroup]]
) -> Figure:
    """One panel per setting: all trials at the common step, and the mean and 95% interval of each group."""
    columns = min(3, len(sweep.dimensions))
    rows = math.ceil(len(sweep.dimensions) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    positions, accuracy = sweep.positions(compared.trials), 100 * compared.accuracy
    drawn = np.random.default_rng(0).permutation(len(accuracy))[:MAX_POINTS]
    alpha = float(np.clip(4 / np.sqrt(len(drawn) + 1), 0.12, 0.4))
    for column, (axes, dimension) in enumerate(zip(panels, sweep.dimensions, strict=False)):
        axes.spines[["top", "right"]].set_visible(False)
        jitter = 0.2 / len(dimension.levels) if dimension.levels else 0.0
        x = positions[:, column] + np.random.default_rng(column).uniform(-jitter, jitter, len(accuracy))
        axes.scatter(x[drawn], accuracy[drawn], s=11, color=COLOURS[0], alpha=alpha, linewidths=0)
        _draw_group_means(axes, dimension, positions[:, column], groups[dimension.name])
        ticks, labels = dimension.ticks()
        axes.set_xticks(ticks, labels, fontsize=8)
        axes.set(xlim=(-0.03, 1.03))
        axes.set_xlabel(dimension.name, fontsize=9)
    for axes in panels[len(sweep.dimensions) :]:
        axes.axis("off")
    for axes in panels[::columns]:
        axes.set_ylabel("validation accuracy, %", fontsize=9)
    # The interval of a mean over two or three trials can exceed the range of an accuracy.
    bottom, top = panels[0].get_ylim()
    panels[0].set_ylim(max(bottom, -2), min(top, 102))
    title = f"{sweep.name}: {counted(len(accuracy), 'trial')} at step {compared.step:,}; bars: means with 95% intervals"
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_group_means(axes: Any, dimension: Dimension, positions: Array, groups: Sequence[TrialGroup]) -> None:
    parts = part_count(dimension)
    for part, group in zip(np.unique(part_indices(dimension, positions)), groups, strict=True):
        low, high = (part + 0.08) / parts, (part + 0.92) / parts
        for colour, width in (("white", 4), (COLOURS[1], 2)):
            axes.plot([low, high], [100 * group.mean] * 2, color=colour, linewidth=width, zorder=4)
        if group.ci95 is not None:
            interval = 100 * np.array([group.mean - group.ci95, group.mean + group.ci95])
            axes.fill_between([low, high], *interval, color=COLOURS[1], alpha=0.25, linewidth=0, zorder=3)


def importance_bars(sweep: SweepRecord, importance: Importance) -> Figure:
    """Importance of each setting with the interval over the trees, and its importance by chance."""
    settings = importance.settings
    figure = Figure(figsize=(6.6, 0.36 * len(settings) + 1.5), layout="constrained")
    axes = figure.subplots(1, 1)
    axes.spines[["top", "right"]].set_visible(False)
    y, values = np.arange(len(settings)), 100 * np.array([setting.importance for setting in settings])
    errors = np.abs(100 * np.array([[setting.low, setting.high] for setting in settings]).T - values)
    colours = [COLOURS[0] if setting.matters else LIGHT for setting in settings]
    error_style = {"ecolor": GREY, "elinewidth": 1, "capsize": 2}
    axes.barh(y, values, xerr=errors, color=colours, height=0.66, error_kw=error_style)
    for row, setting in enumerate(settings):
        axes.plot([100 * setting.chance] * 2, [row - 0.4, row + 0.4], color=COLOURS[1], linewidth=1.6)
    axes.plot([], [], color=COLOURS[1], linewidth=1.6, label="chance (shuffled values)")
    for colour, label in ((COLOURS[0], "more than chance"), (LIGHT, "not more than chance")):
        axes.bar(0, 0, color=colour, label=label)
    axes.set_yticks(y, [setting.name for setting in settings], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 103), xlabel="importance: fraction of the variance of accuracy, % (fANOVA, Optuna)")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    explained = f"settings explain {100 * max(0.0, importance.explained):.0f}% of the variance"
    axes.set_title(
        f"{sweep.name}: {counted(importance.trials, 'trial')} at step {importance.step:,}; {explained}", fontsize=9
    )
    return figure


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which to show a duration, and its length in seconds."""
    return ("hours", 3600.0) if seconds > 2 * 3600 else ("minutes", 60.0) if seconds > 180 else ("seconds", 1.0)


def _limits(accuracy: Array) -> tuple[float, float]:
    """Ends of the accuracy axis, at least 0.1 percentage points apart."""
    low, high = (float(accuracy.min()), float(accuracy.max())) if accuracy.size else (0.0, 100.0)
    return (low, high) if high - low > 0.1 else (low - 0.05, high + 0.05)


def _round_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    inside = [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    return inside or [low, high]


def _labels(ticks: Sequence[float]) -> list[str]:
    return [f"{tick:g}" if abs(tick - round(tick, 1)) < 1e-9 else f"{tick:.2f}" for tick in ticks]
