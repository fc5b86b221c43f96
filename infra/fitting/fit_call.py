"""One call of `metagmvae fit`: it runs commands, and keeps its state in the output folder."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from metagmvae.infra.fitting.fit_plan import FitPlan, episode_sizes
from metagmvae.infra.fitting.fit_state import STATE, FitState
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.sampling.group_draw import group_sizes
from metagmvae.pipelines.shards.dataset import Dataset

LOG = logging.getLogger(__name__)
RunCommand = Callable[[Sequence[str]], Mapping[str, Any]]
"""Runs a command of metagmvae from its words; returns its answer."""


@dataclass
class FitCall:
    """One call. `state` is written after each part."""

    out: Path
    state: FitState
    run_command: RunCommand
    started: float
    """`time.monotonic` at the start, moved back by the seconds of earlier calls."""

    @property
    def plan(self) -> FitPlan:
        """What was decided."""
        return self.state.plan

    def command(self, *words: str) -> Mapping[str, Any]:
        """Print and run a command, and record it."""
        line = self.record_command(*words)
        LOG.info(f"$ {line}")
        return self.run_command(words)

    def record_command(self, *words: str) -> str:
        """Record a command for the report; return its line."""
        line = shlex.join(["metagmvae", *words])
        if line not in self.state.commands:
            self.state.commands.append(line)
            self.save()
        return line

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of a block to those of a part, also if it is interrupted, and save the state at its end."""
        begin = time.monotonic()
        try:
            yield
        except BaseException:
            self.state.seconds[f"{part}, interrupted"] = time.monotonic() - begin
            raise
        finally:
            self.save()
        self.state.seconds[part] = time.monotonic() - begin
        self.save()

    def save(self) -> None:
        """Write the state."""
        write_json(self.out / STATE, self.state.model_dump(mode="json"))


def is_labelled(dataset: Dataset, split: Literal["validation", "test"]) -> bool:
    """Whether a split has at least two classes; with groups `check_held_out` checks before that they suffice."""
    part = dataset.manifest["splits"].get(split)
    return part is not None and part["classes"] >= 2


def tasks_of(dataset: Dataset, split: str) -> tuple[int, list[int], int]:
    """Way, shots and queries per class of a split."""
    return episode_sizes(list(group_sizes(dataset.episode_labels(split)).values()))
