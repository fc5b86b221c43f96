"""Figures: training curves, reconstructions, mixture modes (Fig. 3), latent map (Fig. 4), predictions.

Each function takes arrays and returns a new matplotlib Figure; pyplot and its global state are not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from metagmvae.evaluation.figures.mixture_modes import MixtureMode
from metagmvae.pipelines.files import atomic_file

Array = np.ndarray
GREY = "#666666"
COLOURS = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB"]
"""Tol's bright scheme, which people with colour vision deficiencies can distinguish."""
GAP = 2
"""Pixels between the images of a mosaic."""


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure to a PNG file; if that fails, no file is left."""
    with atomic_file(path) as file:
        write_png(figure, file)


def write_png(figure: Figure, file: IO[bytes]) -> None:
    """Write a figure as PNG to an open binary file."""
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names of runs may contain dollar signs
    figure.savefig(file, format="png", dpi=140, bbox_inches="tight", metadata={"Software": None})


def curves(lines: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Plot the loss of each stage, one panel per stage, and the validation accuracy, over the global steps of a run."""
    stages = list(dict.fromkeys(str(line["stage"]) for line in lines if "loss" in line))
    tasks = validated_tasks(lines)
    figure = Figure(figsize=(4.2 * (len(stages) + bool(tasks)), 3.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, len(stages) + bool(tasks), squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel="step")
    for axes, stage in zip(panels, stages, strict=False):
        rows = [line for line in lines if line["stage"] == stage]
        axes.plot([row["global_step"] for row in rows], [row["loss"] for row in rows], color=COLOURS[0])
        axes.set(ylabel=f"loss ({stage})")
    for colour, task in zip(COLOURS, tasks, strict=False):
        rows = [line for line in lines if task in line]
        steps = [row["global_step"] for row in rows]
        accuracy = 100 * np.array([row[task] for row in rows])
        ci95 = 100 * np.array([row.get(f"{task}_ci95", 0.0) for row in rows])  # probes have no interval
        name = task.removeprefix("validation/")
        panels[-1].plot(steps, accuracy, marker="o", markersize=3, label=name, color=colour)
        panels[-1].fill_between(steps, accuracy - ci95, accuracy + ci95, alpha=0.2, color=colour, linewidth=0)
    if tasks:
        panels[-1].set(ylabel="validation accuracy, %")
        panels[-1].legend(frameon=False, fontsize=8)
    return figure


def validated_tasks(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys of the validation accuracies in metric lines, by numbers of classes and of labelled images."""
    keys = {k for line in lines for k in line if k.startswith("validation/") and not k.endswith("_ci95")}
    return sorted(keys, key=lambda key: ([int(number) for number in re.findall(r"\d+", key)], key))


def reconstructions(images: Array, decoded: Array, label: str, *, negative: bool = False) -> Figure:
    """Show images (uint8) above their reconstructions; `label` names the row of the reconstructions.

    `negative`: as in `predictions`.
    """
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots(1, 1)
    _mosaic(axes, [list(images), list(decoded)], negative)
    _row_labels(axes, ["image", label], images.shape[-2])
    return figure


def mode_grids(grids: Sequence[tuple[str, Sequence[MixtureMode]]], generated: str, *, negative: bool = False) -> Figure:
    """Draw Fig. 3: the modes of each set below each other, with a title.

    A mode is a row: labelled images, images that EM assigns to it, generated images. `generated` is the title of the
    column of generated images; `negative` is as in `predictions`.
    """
    widest = max(sum(_panel_widths(modes)) for _, modes in grids)
    heights = [0.6 * len(modes) + 0.7 for _, modes in grids]
    figure = Figure(figsize=(0.55 * widest + 0.8, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (title, modes) in zip(parts, grids, strict=True):
        part.suptitle(title, fontsize=10)
        columns = {"support": "support", "obtained": "obtained by EM", "generated": generated}
        shown = {key: [list(getattr(mode, key)) for mode in modes] for key in columns}
        shown = {key: rows for key, rows in shown.items() if any(rows)}
        axes_by_key = part.subplots(1, len(shown), width_ratios=_panel_widths(modes), squeeze=False)[0]
        for axes, (key, rows) in zip(axes_by_key, shown.items(), strict=True):
            _mosaic(axes, rows, negative)
            axes.set_title(columns[key], fontsize=9, color=GREY)
        height = next(image.shape[-2] for rows in shown.values() for row in rows for image in row)
        _row_labels(axes_by_key[0], [str(number) for number in range(1, len(modes) + 1)], height)
    return figure


def _panel_widths(modes: Sequence[MixtureMode]) -> list[int]:
    """Images in the longest row of each panel that has any."""
    counts = ([len(getattr(mode, key)) for mode in modes] for key in ("support", "obtained", "generated"))
    return [max(numbers) for numbers in counts if any(numbers)]


@dataclass(frozen=True)
class LatentPanel:
    """Latents of one set in two dimensions."""

    title: str
    xy: Array
    """(T, 2)."""
    label: Array
    """Class or mode of each point, (T,)."""
    is_support: Array
    """Whether a point is labelled, (T,)."""
    centre_xy: Array
    """Means of the mixture, (K, 2)."""


def latent_map(panels: Sequence[LatentPanel], title: str) -> Figure:
    """Draw Fig. 4, latents of sets in two dimensions, one panel per set; the colour is the class or mode."""
    figure = Figure(figsize=(3.6 * len(panels), 4.0), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        labels = np.unique(panel.label)
        colours = COLOURS if len(labels) <= len(COLOURS) else colormaps["tab20"].colors  # type: ignore[attr-defined]
        for number, k in enumerate(labels):
            colour = colours[number % len(colours)]
            is_k = panel.label == k
            axes.scatter(*panel.xy[is_k & ~panel.is_support].T, s=14, color=colour, alpha=0.7, linewidths=0)
            axes.scatter(
                *panel.xy[is_k & panel.is_support].T, s=90, color=colour, marker="*", edgecolors="black", linewidths=0.6
            )
        axes.scatter(*panel.centre_xy.T, s=28, color="black", marker="x", linewidths=1.2)
        axes.set(xticks=[], yticks=[])
        axes.set_title(panel.title, fontsize=9, color=GREY)
    marks = {"o": "image", "x": "mean of a mode"} | (
        {"*": "labelled image"} if any(p.is_support.any() for p in panels) else {}
    )
    handles = [Line2D([], [], color=GREY, marker=mark, linestyle="", label=name) for mark, name in marks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=8)
    return figure


def predictions(
    support: Sequence[Array],
    names: Sequence[str],
    query: Array,
    probabilities: Array,
    note: str = "",
    *,
    negative: bool = False,
) -> Figure:
    """Show the labelled images of each class, and beside them the 8 most probable queries of those predicted as it.

    Args:
        support: labelled images of each class, (S, C, H, W).
        names: of the classes.
        query: (P, C, H, W).
        probabilities: (P, K); that of the predicted class is written above the query.
        note: what the figure leaves out, for its title.
        negative: whether the images are inverted (`Preprocessing.invert`); they are shown as they were before.
    """
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    rows_by_class = [np.flatnonzero(predicted == k) for k in range(len(names))]
    rows_by_class = [rows[np.argsort(-confidence[rows], kind="stable")][:8] for rows in rows_by_class]
    shots = max(len(images) for images in support)
    widest = max(1, max(len(rows) for rows in rows_by_class))
    figure = Figure(figsize=(1.8 + 0.75 * (shots + widest), 0.95 * len(names) + 0.5), layout="constrained")
    grid = figure.subplots(len(names), shots + widest, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for k, name in enumerate(names):
        for column, image in enumerate(support[k]):
            _show(grid[k, column], image, negative)
        beside = {"transform": grid[k, 0].transAxes, "ha": "right", "va": "center"}
        grid[k, 0].text(-0.1, 0.5, _short(name), fontsize=7, fontweight="bold", **beside)
        for column, row in enumerate(rows_by_class[k]):
            _show(grid[k, shots + column], query[row], negative)
            grid[k, shots + column].set_title(_percent(confidence[row]), fontsize=7, color=GREY)
    title = "labelled images (left), most certain predictions (right)"
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=9)
    return figure


def _percent(probability: float) -> str:
    """A probability below 1 is never shown as 100%."""
    return f"{100 * probability:.0f}%" if probability < 0.99 or probability == 1 else f"{min(probability, 0.999):.1%}"


def _short(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def _show(axes: Any, image: Array, negative: bool) -> None:
    pixels = _to_unit_range(image, negative)
    axes.imshow(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)


def _to_unit_range(image: Array, negative: bool) -> Array:
    pixels = image / 255 if image.dtype == np.uint8 else image
    return 1 - pixels if negative else pixels


def _mosaic(axes: Any, rows: Sequence[Sequence[Array]], negative: bool) -> None:
    """Draw rows of images, each (C, H, W), as one image; missing images stay white."""
    channels, height, width = next(image.shape for row in rows for image in row)
    columns = max(len(row) for row in rows)
    canvas = np.ones((len(rows) * (height + GAP), columns * (width + GAP), channels))
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * (height + GAP), c * (width + GAP)
            canvas[top : top + height, left : left + width] = _to_unit_range(image, negative).transpose(1, 2, 0)
    axes.imshow(canvas[..., 0] if channels == 1 else canvas, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _row_labels(axes: Any, names: Sequence[str], height: int) -> None:
    axes.set_yticks([r * (height + GAP) + height / 2 for r in range(len(names))], names, fontsize=8)
    axes.tick_params(length=0)
