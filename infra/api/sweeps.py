"""Sweeps in Python: what `metagmvae tune` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metagmvae.infra.api.call_command import call_command, setting_words
from metagmvae.infra.api.functions import Reference
from metagmvae.infra.api.results import SweepResult


def tune(
    config: Reference,
    overrides: Mapping[str, Any] | None = None,
    *,
    space: Reference,
    out: Reference | None = None,
    resume: bool = False,
    **options: Any,
) -> SweepResult:
    """Search for good settings with many short trainings on Ray, as `metagmvae tune` does.

    >>> import metagmvae
    >>> changes = {"data.uri": "data/glyphs"}
    >>> sweep = metagmvae.tune("glyphs-demo", changes, space="core", trials=8, steps=200)  # doctest: +SKIP
    >>> run = metagmvae.train(sweep.best_settings)  # doctest: +SKIP

    Args:
        config: settings of all trials, as for `train`.
        overrides: values by dotted key, as for `train`.
        space: TOML file, or name of a search space: `core` or `wide`.
        out: folder of the sweep; None: `runs/CONFIG-SPACE`.
        resume: continue the sweep in the folder.
        options: as in `metagmvae tune --help`: `trials=40`, `search="tpe"`, `hours=2`, `steps=400`, `task="5w1s"`.

    Raises:
        SettingsError: an option, setting or search space is wrong, or the sweep to resume has another plan.
        DataError: the data set or the folder cannot be used.
    """
    words = setting_words(overrides or {})
    answer = call_command("tune", config, space=space, out=out, set=words, resume=resume, **options)
    report = answer.get("report")
    return SweepResult.from_answer(answer, sweep=Path(answer["sweep"]), report=Path(report) if report else None)
