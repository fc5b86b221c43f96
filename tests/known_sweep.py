"""Trials of a sweep whose accuracy is a known function of the settings, for tests of ranking, importance and report."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metagmvae.configs.dimensions import parse_dimension
from metagmvae.evaluation.sweeps.record import SweepRecord
from metagmvae.evaluation.sweeps.trials import CurvePoint, Trial, to_json_lines

SPACE = {
    "train.learning_rate": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    "train.em_iterations": {"kind": "int", "low": 1, "high": 20, "step": 1},
    "train.set_size": {"kind": "choice", "values": [50, 100, 200, 300]},
    "train.schedule": {"kind": "choice", "values": ["constant", "cosine"]},
}
DIMENSIONS = tuple(parse_dimension(name, description) for name, description in SPACE.items())


def known_trials(
    count: int, *, seed: int = 0, noise: float = 0.01, halving: bool = False, fail_every: int = 0
) -> list[Trial]:
    """Randomly drawn trials, validated at steps 100, 200, …, 900.

    Accuracy depends on the learning rate (mostly) and on the set size. The other two settings have no effect. All
    curves have the same shape, so the order at any step is the order at the end.

    Args:
        count: number of trials.
        seed: of the settings and the noise.
        noise: standard deviation of a constant offset of each curve.
        halving: stop the worse two thirds of the trials at step 100.
        fail_every: every so many trials one fails after step 400; 0: none.
    """
    rng = np.random.default_rng(seed)
    settings = [{d.name: d.value_at(rng.random()) for d in DIMENSIONS} for _ in range(count)]
    offsets = rng.normal(0.0, noise, count)
    curves = [_curve(values, offset) for values, offset in zip(settings, offsets, strict=True)]
    first = sorted((curve[0].accuracy for curve in curves), reverse=True)[math.ceil(count / 3) - 1]
    trials = []
    for number, (values, curve) in enumerate(zip(settings, curves, strict=True)):
        more = {"status": "finished", "curve": curve}
        if halving and curve[0].accuracy < first:
            more = {"status": "stopped", "curve": curve[:1]}
        if fail_every and number % fail_every == 0:
            more = {"status": "failed", "curve": curve[:4], "reason": "loss is not finite"}
        seconds = more["curve"][-1].seconds + 2.0
        trials.append(Trial(number=number, settings=values, seconds=seconds, **more))
    return trials


def _curve(values: dict, offset: float) -> tuple[CurvePoint, ...]:
    decades = math.log10(values["train.learning_rate"]) + 3.0
    final = 0.85 - 0.25 * decades**2 + 0.08 * math.log2(values["train.set_size"] / 50) / math.log2(6)
    points = []
    for step in range(100, 1000, 100):
        accuracy = 0.2 + (final - 0.2) * (1 - math.exp(-3 * step / 900)) + offset
        points.append(CurvePoint(step=step, accuracy=accuracy, ci95=0.012, seconds=step / 50))
    return tuple(points)


def record_of(trials: Sequence[Trial]) -> SweepRecord:
    """These trials as a sweep over SPACE."""
    return SweepRecord("known", "5w1s", DIMENSIONS, tuple(trials))


def write_sweep(folder: Path, trials: Sequence[Trial], space: object = None, **more: object) -> Path:
    """Write `sweep.json` and `trials.jsonl` of a sweep over a space, SPACE by default."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": folder.name, "task": "5w1s", "space": SPACE if space is None else space, "base": {}} | more
    (folder / "sweep.json").write_text(json.dumps(content))
    (folder / "trials.jsonl").write_text(to_json_lines(trials), encoding="utf-8")
    return folder
