"""Figures of a sweep: its trials on parallel axes, accuracy over cost, accuracy by setting, importance.

Each function returns a matplotlib Figure of its own, as in `figures`. Accuracies are in percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from metagmvae.evaluation.figures.plots import COLOURS, GREY
from metagmvae.evaluation.sweeps.importance import Importance
from metagmvae.evaluation.sweeps.ranking import TrialGroup, TrialsAtStep, best_trial, parts_of
from metagmvae.evaluation.sweeps.record import Axis, SweepRecord
from metagmvae.evaluation.sweeps.trials import Trial

Array = np.ndarray
MOST_LINES = 400
"""Trials that a picture draws as lines: more are a grey mass. The best are always among them."""
MOST_POINTS = 3000
BEST = 40
LIGHT = "#C8C8C8"
SMOOTH = 24
"""Points of a line between two parallel axes."""


def drawn(trials: Sequence[Trial], most: int) -> list[Trial]:
    """At most so many trials, in their order: the best, and a seeded draw of the rest."""
    if len(trials) <= most:
        return list(trials)
    by_accuracy = sorted(range(len(trials)), key=lambda row: -(trials[row].curve[-1].accuracy))
    rest = np.random.default_rng(0).choice(by_accuracy[BEST:], most - BEST, replace=False)
    return [trials[row] for row in sorted([*by_accuracy[:BEST], *(int(row) for row in rest)])]


def parallel_coordinates(sweep: SweepRecord) -> Figure:
    """One line a trial over the axes of all settings, ending at its accuracy; the best one is drawn over all others."""
    judged = [trial for trial in sweep.trials if trial.last is not None]
    shown, best = drawn(judged, MOST_LINES), best_trial(judged)
    accuracy = 100 * np.array([trial.curve[-1].accuracy for trial in shown])
    low, high = _limits(accuracy)
    figure = Figure(figsize=(1.75 * (len(sweep.axes) + 1), 4.2), layout="constrained")
    axes = figure.subplots(1, 1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    heights = np.column_stack((_spread(sweep, shown), (accuracy - low) / (high - low)))
    scale = _lines(axes, shown, heights, accuracy, best)
    for place, axis in enumerate(sweep.axes):
        _upright(axes, place, axis.short, *axis.ticks())
    last, (bottom, top) = len(sweep.axes), ((end - low) / (high - low) for end in (scale.vmin, scale.vmax))
    around = (last, last + 0.04, bottom, top)
    strip = np.linspace(0, 1, 256)[:, None]
    axes.imshow(strip, cmap="viridis_r", aspect="auto", origin="lower", extent=around, zorder=6)
    axes.set(xlim=(-0.25, last + 0.3), ylim=(-0.04, 1.04))
    ticks = _round_ticks(low, high)
    _upright(axes, last, "accuracy, %", [(tick - low) / (high - low) for tick in ticks], _texts(ticks))
    part = "" if len(shown) == len(judged) else f", {len(shown):,} of them drawn"
    lead = "" if best is None else f"; bold: trial {best.number}"
    axes.set_title(f"{sweep.name}: {len(judged):,} trials{part}; grey: not trained to the end{lead}", fontsize=10)
    return figure


def _lines(axes: Any, trials: Sequence[Trial], heights: Array, accuracy: Array, best: Trial | None) -> Any:
    """Draw trials at their heights, (trials, axes + 1); return the scale of the colours."""
    ended = np.array([trial.status == "finished" for trial in trials], bool)
    # Only trials of one budget are told apart by colour; where none has ended yet, all of them.
    coloured = ended if ended.any() else ~ended
    # A few bad ones shall not take the colours from all others.
    lowest, highest = (float(np.quantile(accuracy[coloured], share)) for share in (0.1, 1.0))
    scale, colours = Normalize(*_limits(np.array([lowest, highest])), clip=True), colormaps["viridis_r"]
    for row in np.lexsort((accuracy, coloured)):  # the better ones above the others
        look: dict[str, Any] = {"color": LIGHT, "alpha": 0.5, "linewidth": 0.7}
        if coloured[row]:
            look = {"color": colours(scale(accuracy[row])), "alpha": 0.8, "linewidth": 1.2}
        if best is not None and trials[row].number == best.number:
            look |= {"alpha": 1.0, "linewidth": 3.0, "zorder": 5}
        axes.plot(*_smooth(heights[row]), solid_capstyle="round", **look)
    return scale


def _spread(sweep: SweepRecord, trials: Sequence[Trial]) -> Array:
    """Places on the axes, those of listed values a little apart so that lines do not lie on each other."""
    places = sweep.places(trials)
    for column, axis in enumerate(sweep.axes):
        if axis.levels:
            room = 0.5 / len(axis.levels)
            places[:, column] += np.random.default_rng(column).uniform(-1, 1, len(trials)) * min(0.6 * room, 0.02)
    return places


def _smooth(heights: Array) -> tuple[Array, Array]:
    """A line through the heights over 0, 1, …, flat where it crosses an axis."""
    share = np.linspace(0, 1, SMOOTH, endpoint=False)
    bend = share**2 * (3 - 2 * share)
    y = (heights[:-1, None] + np.diff(heights)[:, None] * bend).ravel()
    x = (np.arange(len(heights) - 1)[:, None] + share).ravel()
    return np.append(x, len(heights) - 1), np.append(y, heights[-1])


def _upright(axes: Any, place: int, name: str, ticks: Sequence[float], texts: Sequence[str]) -> None:
    axes.plot([place, place], [0, 1], color="black", linewidth=0.9, zorder=6)
    axes.text(place, -0.06, name, ha="center", va="top", fontsize=9)
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    for tick, text in zip(ticks, texts, strict=True):
        axes.plot([place - 0.02, place + 0.02], [tick, tick], color="black", linewidth=0.9, zorder=6)
        axes.text(place + 0.05, tick, text, va="center", fontsize=7.5, zorder=7, bbox=box)


def accuracy_over_cost(sweep: SweepRecord) -> Figure:
    """Left: each trial over the seconds that it trained. Right: the best so far over the time of all trials."""
    judged = [trial for trial in sweep.trials if trial.last is not None]
    shown, best = drawn(judged, MOST_LINES), best_trial(judged)
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    unit, seconds = time_unit(max((trial.curve[-1].seconds for trial in judged), default=0.0))
    for trial in shown:
        at, accuracy = _curve(trial)
        ended = trial.status == "finished"
        look: dict[str, Any] = {"color": COLOURS[0] if ended else LIGHT, "alpha": 0.45 if ended else 0.6}
        if best is not None and trial.number == best.number:
            look = {"color": COLOURS[1], "linewidth": 2.2, "zorder": 4, "label": f"trial {trial.number}, the best"}
        left.plot(at / seconds, accuracy, **{"linewidth": 0.9, "zorder": 2 + ended, **look})
    for colour, text in ((COLOURS[0], "trained to the end"), (LIGHT, "stopped or failed")):
        left.plot([], [], color=colour, label=text)
    left.set(xlabel=f"{unit} that a trial trained", ylabel="validation accuracy, %")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    _best_so_far(right, sweep.trials)
    figure.suptitle(f"{sweep.name}: {len(judged):,} trials with an accuracy", fontsize=10)
    return figure


def _curve(trial: Trial) -> tuple[Array, Array]:
    return (
        np.array([point.seconds for point in trial.curve]),
        100 * np.array([point.accuracy for point in trial.curve]),
    )


def _best_so_far(axes: Any, trials: Sequence[Trial]) -> None:
    """Newest accuracies of trials as they ended, over the time that all trials took together, and the best so far."""
    spent = np.cumsum([trial.seconds for trial in trials])
    unit, seconds = time_unit(float(spent[-1]) if len(spent) else 0.0)
    rows = [row for row, trial in enumerate(trials) if trial.last is not None]
    last = 100 * np.array([trials[row].curve[-1].accuracy for row in rows])
    ended = np.array([trials[row].status == "finished" for row in rows], bool)
    at = spent[rows] / seconds
    for which, colour in ((~ended, LIGHT), (ended, COLOURS[0])):
        axes.scatter(at[which], last[which], s=12, color=colour, alpha=0.6, linewidths=0)
    # Of trials that trained to the end, as everywhere: only these have the same budget.
    axes.step(at[ended], np.maximum.accumulate(last[ended]), where="post", color=COLOURS[1], linewidth=2)
    axes.set(xlabel=f"{unit} of all trials together, in the order in which they ended", xlim=(0, None))
    if ended.any():
        axes.set_title("line: the best so far of those trained to the end", fontsize=8, color=GREY)


def settings_against_accuracy(
    sweep: SweepRecord, judged: TrialsAtStep, means: Mapping[str, Sequence[TrialGroup]]
) -> Figure:
    """One panel a setting: every trial at the common budget, means of values or parts of a range with 95% intervals."""
    columns = min(3, len(sweep.axes))
    rows = math.ceil(len(sweep.axes) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    places, accuracy = sweep.places(judged.trials), 100 * judged.accuracy
    some = np.random.default_rng(0).permutation(len(accuracy))[:MOST_POINTS]
    alpha = float(np.clip(4 / np.sqrt(len(some) + 1), 0.12, 0.4))
    for column, (axes, axis) in enumerate(zip(panels, sweep.axes, strict=False)):
        axes.spines[["top", "right"]].set_visible(False)
        room = 0.2 / len(axis.levels) if axis.levels else 0.0
        nudged = places[:, column] + np.random.default_rng(column).uniform(-room, room, len(accuracy))
        axes.scatter(nudged[some], accuracy[some], s=11, color=COLOURS[0], alpha=alpha, linewidths=0)
        _means(axes, axis, places[:, column], means[axis.name])
        ticks, texts = axis.ticks()
        axes.set_xticks(ticks, texts, fontsize=8)
        axes.set(xlim=(-0.03, 1.03))
        axes.set_xlabel(axis.name, fontsize=9)
    for axes in panels[len(sweep.axes) :]:
        axes.axis("off")
    for axes in panels[::columns]:
        axes.set_ylabel("validation accuracy, %", fontsize=9)
    title = f"{sweep.name}: {len(accuracy):,} trials at step {judged.step:,}; bars: means with 95% intervals"
    figure.suptitle(title, fontsize=10)
    return figure


def _means(axes: Any, axis: Axis, places: Array, means: Sequence[TrialGroup]) -> None:
    parts = parts_of(axis)
    filled = np.unique(np.minimum((places * parts).astype(int), parts - 1))
    for part, group in zip(filled, means, strict=True):
        low, high = (part + 0.08) / parts, (part + 0.92) / parts
        for colour, width in (("white", 4), (COLOURS[1], 2)):
            axes.plot([low, high], [100 * group.mean] * 2, color=colour, linewidth=width, zorder=4)
        if group.ci95 is not None:
            around = 100 * np.array([group.mean - group.ci95, group.mean + group.ci95])
            axes.fill_between([low, high], *around, color=COLOURS[1], alpha=0.25, linewidth=0, zorder=3)


def importance_bars(sweep: SweepRecord, importance: Importance, pairs: int = 3) -> Figure:
    """Importance of each setting with its interval and what chance gives, and the largest interactions."""
    shares = [*importance.settings, *[pair for pair in importance.pairs[:pairs] if pair.importance > 0.005]]
    figure = Figure(figsize=(6.6, 0.36 * len(shares) + 1.5), layout="constrained")
    axes = figure.subplots(1, 1)
    axes.spines[["top", "right"]].set_visible(False)
    y, values = np.arange(len(shares)), 100 * np.array([share.importance for share in shares])
    reach = np.abs(100 * np.array([[share.low, share.high] for share in shares]).T - values)
    colours = [COLOURS[0] if share.matters else COLOURS[3] if len(share.names) > 1 else LIGHT for share in shares]
    bars = {"ecolor": GREY, "elinewidth": 1, "capsize": 2}
    axes.barh(y, values, xerr=reach, color=colours, height=0.66, error_kw=bars)
    for row, share in enumerate(shares):
        if share.chance is not None:
            axes.plot([100 * share.chance] * 2, [row - 0.4, row + 0.4], color=COLOURS[1], linewidth=1.6)
    axes.plot([], [], color=COLOURS[1], linewidth=1.6, label="the most that chance gave")
    kinds = (COLOURS[0], "more than chance"), (LIGHT, "not told from chance"), (COLOURS[3], "two together, beyond each")
    for colour, text in kinds:
        axes.bar(0, 0, color=colour, label=text)
    axes.set_yticks(y, [" with ".join(_short(share.names)) for share in shares], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 103), xlabel="share of the variance of accuracy over the space, %")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    explained = f"settings explain {100 * max(0.0, importance.explained):.0f}% of what differs between trials"
    axes.set_title(f"{sweep.name}: {importance.trials:,} trials at step {importance.step:,}; {explained}", fontsize=9)
    return figure


def _short(names: Sequence[str]) -> list[str]:
    """A setting by its whole name, two by their last parts."""
    return list(names) if len(names) == 1 else [name.rpartition(".")[2] for name in names]


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that suits a length of time, and its seconds."""
    return ("hours", 3600.0) if seconds > 2 * 3600 else ("minutes", 60.0) if seconds > 180 else ("seconds", 1.0)


def _limits(accuracy: Array) -> tuple[float, float]:
    """Ends of the axis of accuracies, never one point."""
    low, high = (float(accuracy.min()), float(accuracy.max())) if accuracy.size else (0.0, 100.0)
    return (low, high) if high - low > 0.1 else (low - 0.05, high + 0.05)


def _round_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    inside = [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    return inside or [low, high]


def _texts(ticks: Sequence[float]) -> list[str]:
    return [f"{tick:g}" if abs(tick - round(tick, 1)) < 1e-9 else f"{tick:.2f}" for tick in ticks]
