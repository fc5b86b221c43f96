"""Figures of the comparison page as data URIs: training curves, reliability diagrams, and one episode of each model.

The figures contain no names of models. The page shows these itself, escaped and in its own font.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from metagmvae.evaluation.comparison.formatting import Task, parse_task, task_name
from metagmvae.evaluation.comparison.validation_rows import ComparedItem, EvaluatedModel
from metagmvae.evaluation.figures import plots
from metagmvae.evaluation.figures.paper_figures import episode_figures
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.meta_gmvae import MetaGMVAE

COLOURS = [*plots.COLOURS[:6], "#999933", "#882255"]
THEMES = {"light": ("#1c1e21", "#d5d8dc"), "dark": ("#e6e8eb", "#4a4f57")}
"""Theme -> colours of text and of grid lines. The background is that of the page."""

TWO_PANELS = 2.2
"""Width divided by height of a figure with two square panels and a title."""


@dataclass(frozen=True)
class PageImage:
    """An image for light and dark pages, with its caption."""

    caption: str
    light: str
    """Data URI."""
    dark: str
    columns: Literal[1, 2, 3] = 1
    """Number of the page's three columns that it spans."""


@dataclass(frozen=True)
class ModelImages:
    """The figures and calibration errors of one model."""

    name: str
    images: tuple[PageImage, ...]
    calibration_errors: Mapping[Task, float]
    """Expected calibration error of each task, a fraction in [0, 1]."""


def draw_models(models: Sequence[EvaluatedModel], dataset: Dataset, split: str) -> list[ModelImages]:
    """Draw the reliability diagram, the latent map and one episode of the split for every model."""
    drawn = []
    for model in models:
        if not isinstance(model.loaded.model, MetaGMVAE):  # an encoder alone has neither latents nor probabilities
            continue
        known = {task: result.reliability for task, result in model.results.items() if result.reliability is not None}
        bins = {task: reliability.summary()["bins"] for task, reliability in known.items()}
        images = [draw_reliability(bins)] if known else []
        unnamed = replace(model.loaded, settings=model.loaded.settings.model_copy(update={"name": "model"}))
        # The latent map fits beside the reliability diagram; the grid of an episode fills a row.
        figures = sorted(episode_figures(unnamed, dataset, split).items(), key=lambda item: _aspect(item[1]))
        images += [_on_white(caption, figure) for caption, figure in figures]
        errors = {task: reliability.calibration_error for task, reliability in known.items()}
        drawn.append(ModelImages(model.name, tuple(images), errors))
    return drawn


def draw_curves(curves: Sequence[ComparedItem]) -> list[PageImage]:
    """Draw validation accuracy over steps and over seconds for each task, and the loss of meta-training."""
    tasks = plots.validated_tasks(line for curve in curves for line in curve.lines)
    images = []
    for task in tasks:
        for key, label in (("global_step", "training step"), ("elapsed_s", "training time, seconds")):
            name = task.removeprefix("validation/")
            way_shot = parse_task(name)
            caption = f"Validation accuracy, {task_name(way_shot) if way_shot else name}, by {label}"
            images.append(_themed(caption, partial(_accuracy, curves, task, key, label)))
    if any("loss" in line and line.get("stage") == "meta" for curve in curves for line in curve.lines):
        images.append(_themed("Meta-training loss by training step", partial(_loss, curves)))
    return images


def _accuracy(curves: Sequence[ComparedItem], task: str, key: str, label: str) -> Figure:
    figure, axes = _panel(label, "accuracy, %")
    for number, curve in enumerate(curves):
        rows = [line for line in curve.lines if task in line]
        x, accuracy = [row[key] for row in rows], 100 * np.array([row[task] for row in rows])
        ci95 = 100 * np.array([row.get(f"{task}_ci95", 0.0) for row in rows])
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(x, accuracy, ci95 if len(x) == 1 else None, marker="o", markersize=3.5, color=colour)
        axes.fill_between(x, accuracy - ci95, accuracy + ci95, alpha=0.2, color=colour, linewidth=0)
    return figure


def _loss(curves: Sequence[ComparedItem]) -> Figure:
    figure, axes = _panel("training step", "loss")
    for number, curve in enumerate(curves):
        rows = [line for line in curve.lines if line.get("stage") == "meta" and "loss" in line]
        x, loss = [row["global_step"] for row in rows], [row["loss"] for row in rows]
        # A single point has no line.
        axes.plot(x, loss, marker="o" if len(x) == 1 else None, markersize=3.5, color=COLOURS[number % len(COLOURS)])
    return figure


def draw_reliability(bins: Mapping[Task, Sequence[Mapping[str, float]]]) -> PageImage:
    """Draw accuracy over confidence, one line for each task; a calibrated model lies on the diagonal.

    Args:
        bins: `queries`, `confidence` and `accuracy` of each bin, as in `Reliability.summary`, by task.
    """

    def draw() -> Figure:
        figure, axes = _panel("confidence, %", "accuracy, %")
        axes.plot([0, 100], [0, 100], color=matplotlib.rcParams["grid.color"], linewidth=1.2, zorder=0)
        for number, (task, rows) in enumerate(sorted(bins.items())):
            confidence, accuracy = ([100 * row[key] for row in rows] for key in ("confidence", "accuracy"))
            count = np.array([row["queries"] for row in rows])
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(confidence, accuracy, color=colour, linewidth=1, label=task_name(task))
            sizes = 12 + 90 * count / count.max()
            axes.scatter(confidence, accuracy, s=sizes, color=colour, alpha=0.7, linewidths=0)
        axes.set(xlim=(0, 102), ylim=(0, 102))
        axes.legend(frameon=False, fontsize=9)
        return figure

    return _themed("Reliability diagram: accuracy over confidence; larger dots stand for more queries", draw)


def _panel(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    """Make one small panel. Wide pages show several side by side."""
    figure = Figure(figsize=(4.4, 3.1), layout="constrained")
    axes = figure.subplots(1, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _themed(caption: str, draw: Callable[[], Figure]) -> PageImage:
    """Draw twice, in the colours of both themes, with a transparent background."""
    uris = []
    for text, faint in THEMES.values():
        style: dict[str, Any] = {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), text),
            **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
            "grid.color": faint,
            "svg.hashsalt": "metagmvae",
        }
        with matplotlib.rc_context(style):
            buffer = io.BytesIO()
            FigureCanvasSVG(draw()).print_svg(buffer, metadata={"Date": None})
        uris.append(_uri("svg+xml", buffer.getvalue()))
    light, dark = uris
    return PageImage(caption, light, dark)


def _on_white(caption: str, figure: Figure) -> PageImage:
    """Encode a figure that contains images; its background is white in both themes."""
    buffer = io.BytesIO()
    plots.write_png(figure, buffer)
    uri = _uri("png", buffer.getvalue())
    return PageImage(caption, uri, uri, 2 if _aspect(figure) <= TWO_PANELS else 3)


def _aspect(figure: Figure) -> float:
    """Return width divided by height."""
    width, height = figure.get_size_inches()
    return float(width / height)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
