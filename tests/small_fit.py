"""Calls `metagmvae fit` on generated drawings, with as few steps as possible."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from called_commands import called
from PIL import Image

from metagmvae.infra.fitting import fit_schedule
from metagmvae.infra.runs import training_speed
from metagmvae.pipelines.sources.glyphs import open_glyphs


@contextlib.contextmanager
def few_steps() -> Iterator[None]:
    """As few steps and episodes as possible, inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_schedule, "LEAST_STEPS", 4)
        patch.setattr(fit_schedule, "LEAST_EPISODES", 6)
        patch.setattr(training_speed, "MEASURED_STEPS", (3, 3))
        yield


def write_glyphs(root: Path, classes: int, drawings: int, *, flat: bool = False) -> Path:
    """Dark drawings on a bright background, in class folders, or in one folder in the order of their classes."""
    source = open_glyphs(classes=(classes, 0, 0), drawings=drawings)
    for number, record in enumerate(source.splits["train"]):
        path = root / (f"{number:03d}.png" if flat else f"{record.class_name}/{number:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - record.load()[0]).save(path)
    return root


def fit(*words):
    """Exit code, answer and lines on standard error."""
    code, out, said = called("fit", *words, "--budget", "2s", "--json")
    return code, json.loads(out or "null"), said.splitlines()


def commands(lines):
    """Names of the commands that were run."""
    return [line.removeprefix("$ metagmvae ").split()[0] for line in lines if line.startswith("$ metagmvae ")]
