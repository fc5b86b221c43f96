"""Seeded generator of images that resemble handwritten characters, for use without any download.

A class is a character of two to four connected strokes (lines, arcs, curves, dots). An image of the class is a random
variation of it: control points are moved, the character is slanted, rotated, stretched, shifted and smoothly warped,
and the pen width varies. Class and image depend on (seed, split, number) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from metagmvae.pipelines.files import sha256_json
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ImageRecord
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sources.source import ImageSource, check_integer

GENERATOR = 1
"""Part of the fingerprint. Increase it when the same seed gives other pixels."""
SIZE = 28
SPLITS = ("train", "validation", "test")

POINTS = 36
"""Points along a stroke, at most about 0.8 px apart."""
DOT_CHANCE = 0.12
JOIN_CHANCE = 0.6
"""Probability that a stroke starts on an earlier one."""

BOX = 17.0
"""Side of the square that an unvaried character fills, in pixels."""
JITTER = 0.05
"""Standard deviation of the control points, in units of the side."""
SLANT = 0.25
TURN = np.pi / 12
STRETCH = (0.75, 1.15)
SHIFT = 2.5
"""Largest shift in pixels."""
WARP = 0.8
"""Standard deviation of the amplitude of each warp wave, in pixels."""
PEN = (0.75, 1.5)
"""Range of half the pen width, in pixels."""
GRID = 64
"""Points are rounded to 1/64 px; the arithmetic after that is exact, so all machines give the same pixels."""

Strokes = tuple[np.ndarray, ...]
"""Control points (4, 2) of each stroke's cubic Bézier curve, in the unit square; a dot has four equal points."""


def open_glyphs(
    source: str | None = None,
    *,
    classes: tuple[int, int, int] = (400, 60, 100),
    drawings: int = 20,
    seed: int = 0,
) -> ImageSource:
    """Glyphs: uint8, (1, 28, 28), strokes 255 on background 0; classes `train-0000`, images `train-0000/00`.

    Args:
        source: must be None, because nothing is read.
        classes: numbers of classes for train, validation and test. A larger number adds classes and changes none.
        drawings: number of images per class.
        seed: seed of the classes and images.

    Raises:
        DataError: an option is invalid.
    """
    if source is not None:
        raise DataError(f"glyphs are generated; remove --source {source}")
    counts = tuple(classes) if isinstance(classes, Sequence) else ()
    if len(counts) != len(SPLITS) or not any(counts):
        raise DataError(f"classes is {classes!r}; give three counts, for train, validation and test")
    for count in counts:
        check_integer("a count in classes", count, 0)
    check_integer("drawings", drawings, 1)
    check_integer("seed", seed, 0)
    splits = {
        split: [_record(seed, split, number, drawing) for number in range(count) for drawing in range(drawings)]
        for split, count in zip(SPLITS, counts, strict=True)
    }
    options: dict[str, Any] = {"classes": list(counts), "drawings": drawings, "seed": seed}
    fingerprint = sha256_json({"source": "glyphs", "generator": GENERATOR, "options": options})
    # The drawn images are bright on dark and need no preprocessing; this is what other images need to resemble them.
    preprocessing = Preprocessing.of_shape((1, SIZE, SIZE), invert=False)
    return ImageSource("glyphs", (1, SIZE, SIZE), splits, fingerprint, {"options": options}, preprocessing)


def _record(seed: int, split: str, number: int, drawing: int) -> ImageRecord:
    name = f"{split}-{number:04d}"
    return ImageRecord(f"{name}/{drawing:02d}", name, partial(draw_glyph, seed, split, number, drawing))


def draw_glyph(seed: int, split: str, number: int, drawing: int) -> np.ndarray:
    """One image of a class: uint8, (1, 28, 28)."""
    rng = keyed_rng("glyph drawing", seed, split, number, drawing)
    strokes = [
        _curve(points + rng.normal(0, JITTER, (1, 2)) / 2 + _jitter(points, rng))
        for points in class_strokes(seed, split, number)
    ]
    pen = rng.uniform(*PEN)
    return _render(_vary(np.concatenate(strokes), rng), pen)


def _jitter(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Independent shifts of the control points; zero for a dot, whose points stay together."""
    moves = rng.normal(0, JITTER, points.shape)
    return np.zeros_like(points) if np.ptp(points, axis=0).max() == 0 else moves


@lru_cache(maxsize=4096)
def class_strokes(seed: int, split: str, number: int) -> Strokes:
    """The strokes of a class, centred at 0 and scaled to the unit square."""
    rng = keyed_rng("glyph class", seed, split, number)
    strokes: list[np.ndarray] = []
    for _ in range(rng.integers(2, 5)):
        strokes.append(_stroke(strokes, rng))
    lines = np.concatenate([_curve(points) for points in strokes])
    low, high = lines.min(axis=0), lines.max(axis=0)
    return tuple((points - (low + high) / 2) / (high - low).max() for points in strokes)


def _stroke(earlier: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Control points of a new stroke, which often starts on an earlier one: (4, 2)."""
    if earlier and rng.random() < DOT_CHANCE:
        return np.repeat(rng.uniform(0, 1, (1, 2)), 4, axis=0)
    start = rng.uniform(0, 1, 2)
    if earlier and rng.random() < JOIN_CHANCE:
        start = _curve(earlier[rng.integers(len(earlier))])[rng.choice([0, POINTS // 2, POINTS - 1])]
    end = rng.uniform(0, 1, 2)
    while np.linalg.norm(end - start) < 0.45:
        end = rng.uniform(0, 1, 2)
    along = end - start
    across = np.array([-along[1], along[0]])
    # Distances of the two middle control points from the chord.
    bends = {
        "line": (0.0, 0.0),
        "arc": (0.8, 0.8),
        "hook": (0.0, 1.2),
        "wave": (1.1, -1.1),
    }[str(rng.choice(["line", "arc", "hook", "wave"], p=[0.35, 0.35, 0.15, 0.15]))]
    side = rng.choice([-1.0, 1.0]) * rng.uniform(0.7, 1.3)
    middle = [start + along * t + across * side * bend for t, bend in zip((1 / 3, 2 / 3), bends, strict=True)]
    return np.stack([start, *middle, end])


def _curve(points: np.ndarray) -> np.ndarray:
    """Points along a cubic Bézier curve: (4, 2) -> (POINTS, 2)."""
    return _BERNSTEIN @ points


def _bernstein() -> np.ndarray:
    t = np.linspace(0, 1, POINTS)[:, None]
    return np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)


_BERNSTEIN = _bernstein()


def _vary(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slant, stretch, rotate, warp and shift points; return pixel coordinates (x, y)."""
    slant = np.array([[1, rng.uniform(-SLANT, SLANT)], [0, 1]])
    stretch = np.diag(rng.uniform(*STRETCH, 2))
    angle = rng.uniform(-TURN, TURN)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    placed = points @ (turn @ slant @ stretch).T * BOX
    for _ in range(3):
        wave = rng.normal(0, 1, 2) * np.pi / BOX
        phase = rng.uniform(0, 2 * np.pi)
        placed = placed + rng.normal(0, WARP, 2) * np.sin(placed @ wave + phase)[:, None]
    return placed + (SIZE - 1) / 2 + rng.uniform(-SHIFT, SHIFT, 2)


def _render(points: np.ndarray, pen: float) -> np.ndarray:
    """Draw points with a round pen whose edge falls from 255 to 0 over one pixel: uint8, (1, 28, 28)."""
    rounded = (np.rint(points * GRID) / GRID).astype(np.float32)
    pixels = np.arange(SIZE, dtype=np.float32)[:, None]
    square = (pixels - rounded[:, 0]) ** 2, (pixels - rounded[:, 1]) ** 2
    distance = np.sqrt((square[1][:, None] + square[0][None]).min(axis=-1))
    ink = np.clip(np.float32(round(pen * GRID) / GRID + 0.5) - distance, 0, 1)
    return np.rint(ink * np.float32(255)).astype(np.uint8)[None]
