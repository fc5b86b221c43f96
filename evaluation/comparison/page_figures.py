"""Pictures of a comparison as data URIs: curves side by side, reliability, and what each model makes of an episode.

Nothing of what stands in them comes from outside but numbers: names are left to the page, which escapes them and has a
font for them.
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

from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.metrics import Reliability
from metagmvae.evaluation.figures import plots
from metagmvae.evaluation.figures.gallery import episode_figures
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.package import LoadedModel

COLOURS = [*plots.COLOURS[:6], "#999933", "#882255"]
THEMES = {"light": ("#1c1e21", "#d5d8dc"), "dark": ("#e6e8eb", "#4a4f57")}
"""Of each theme the colours of text and of lines behind the data; the ground is the page's."""

SQUARES = 2.2
"""Width over height of two square panels with a title."""


@dataclass(frozen=True)
class PageImage:
    """An image for light and for dark pages, with what it shows."""

    caption: str
    light: str
    """Data URI."""
    dark: str
    columns: Literal[1, 2, 3] = 1
    """How much of the width of a wide page it takes."""


@dataclass(frozen=True)
class Curve:
    """Metric lines of one training."""

    name: str
    lines: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ModelPage:
    """A model and what it was judged by."""

    name: str
    loaded: LoadedModel
    results: Mapping[tuple[int, int], EpisodeResults]


@dataclass(frozen=True)
class ModelImages:
    """What a page shows of one model."""

    name: str
    pictures: tuple[PageImage, ...]
    errors: Mapping[tuple[int, int], float]
    """Expected calibration error of each task, a share in [0, 1]."""


def draw_models(pages: Sequence[ModelPage], dataset: Dataset, split: str) -> list[ModelImages]:
    """Reliability, the latent map, and an episode of a split, of every model."""
    answer = []
    for page in pages:
        known = {task: result.reliability for task, result in page.results.items() if result.reliability is not None}
        pictures = [draw_reliability(known)] if known else []
        nameless = replace(page.loaded, settings=page.loaded.settings.model_copy(update={"name": "model"}))
        # The latent map fits beside the reliability diagram, the grid of an episode takes a row.
        drawn = sorted(episode_figures(nameless, dataset, split).items(), key=lambda item: _aspect(item[1]))
        pictures += [_on_white(caption, figure) for caption, figure in drawn]
        answer.append(ModelImages(page.name, tuple(pictures), {task: one.error for task, one in known.items()}))
    return answer


def draw_curves(curves: Sequence[Curve]) -> list[PageImage]:
    """Validation accuracy over steps and over seconds, a picture for each task, and the loss of meta-training."""
    tasks = sorted(
        {
            k
            for curve in curves
            for line in curve.lines
            for k in line
            if k.startswith("validation/") and "_ci95" not in k
        }
    )
    answer = []
    for task in tasks:
        for key, label in (("global_step", "step"), ("elapsed_s", "seconds of training")):
            caption = f"Validation accuracy, {task.removeprefix('validation/')}, over {label}"
            answer.append(_themed(caption, partial(_accuracy, curves, task, key, label)))
    if any("loss" in line and line.get("stage") == "meta" for curve in curves for line in curve.lines):
        answer.append(_themed("Loss of meta-training over step", partial(_loss, curves)))
    return answer


def _accuracy(curves: Sequence[Curve], task: str, key: str, label: str) -> Figure:
    figure, axes = _panel(label, "accuracy, %")
    for number, curve in enumerate(curves):
        rows = [line for line in curve.lines if task in line]
        x, accuracy = [row[key] for row in rows], 100 * np.array([row[task] for row in rows])
        ci95 = 100 * np.array([row.get(f"{task}_ci95", 0.0) for row in rows])
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(x, accuracy, marker="o", markersize=3.5, color=colour)
        axes.fill_between(x, accuracy - ci95, accuracy + ci95, alpha=0.2, color=colour, linewidth=0)
    return figure


def _loss(curves: Sequence[Curve]) -> Figure:
    figure, axes = _panel("step", "loss")
    for number, curve in enumerate(curves):
        rows = [line for line in curve.lines if line.get("stage") == "meta" and "loss" in line]
        x, loss = [row["global_step"] for row in rows], [row["loss"] for row in rows]
        axes.plot(x, loss, color=COLOURS[number % len(COLOURS)])
    return figure


def draw_reliability(tasks: Mapping[tuple[int, int], Reliability]) -> PageImage:
    """Accuracy over confidence, a line for each task; on the diagonal the model knows what it knows."""

    def draw() -> Figure:
        figure, axes = _panel("confidence, %", "accuracy, %")
        axes.plot([0, 100], [0, 100], color=matplotlib.rcParams["grid.color"], linewidth=1.2, zorder=0)
        for number, ((way, shot), one) in enumerate(sorted(tasks.items())):
            filled = one.count > 0
            confidence, right = (
                100 * total[filled] / one.count[filled] for total in (one.confidence, one.right.astype(float))
            )
            sizes = 12 + 90 * one.count[filled] / one.count.max()
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(confidence, right, color=colour, linewidth=1, label=f"({way},{shot})")
            axes.scatter(confidence, right, s=sizes, color=colour, alpha=0.7, linewidths=0)
        axes.set(xlim=(0, 102), ylim=(0, 102))
        axes.legend(frameon=False, fontsize=9)
        return figure

    return _themed("Reliability: accuracy over confidence; larger dots hold more queries", draw)


def _panel(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    """One small panel: pages put them side by side, or below one another on a phone."""
    figure = Figure(figsize=(4.4, 3.1), layout="constrained")
    axes = figure.subplots(1, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _themed(caption: str, draw: Callable[[], Figure]) -> PageImage:
    """Draw twice, in the colours of both themes, on no ground of its own."""
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
    """A picture of images, which stands on white in both themes."""
    buffer = io.BytesIO()
    plots.write_png(figure, buffer)
    uri = _uri("png", buffer.getvalue())
    return PageImage(caption, uri, uri, 2 if _aspect(figure) <= SQUARES else 3)


def _aspect(figure: Figure) -> float:
    """Width over height."""
    width, height = figure.get_size_inches()
    return float(width / height)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
