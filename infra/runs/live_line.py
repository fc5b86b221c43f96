"""The progress of a run while it trains: a live line on a terminal, else a log line every 30 s."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from metagmvae.infra.runs.run_folder import METRICS, read_lines
from metagmvae.training.trainer.context import MetricLine

LOG = logging.getLogger(__name__)
REFRESH_S = 0.5
LOG_S = 30.0


def progress_text(line: MetricLine, total_steps: int, accuracies: dict[str, float]) -> str:
    """Format stage, step, loss, validation accuracies, images per second and remaining time.

    `accuracies` are the newest validation accuracies by task, between 0 and 1.
    """
    done = int(line["global_step"])
    elapsed = float(line["elapsed_s"])
    remaining_s = elapsed / done * (total_steps - done) if done else 0.0
    parts = [
        f"{line['stage']} {int(line['step']):,}/{int(line['steps']):,}",
        f"loss {float(line['loss']):.4g}" if "loss" in line else "",
        " ".join(f"{task} {100 * value:.1f}%" for task, value in accuracies.items()),
        f"{float(line['images_per_s']):,.0f} images/s" if "images_per_s" in line else "",
        f"{_clock(remaining_s)} left",
    ]
    return "  ".join(part for part in parts if part)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class LiveLine:
    """Follows the metric lines of a run in a thread, whichever engine writes them.

    A terminal shows the newest line; elsewhere it is logged every 30 s. Where no metric lines come, because features
    are computed or the trained model is evaluated, the text says so, and for how long.
    """

    def __init__(self, run_dir: Path, total_steps: int, *, quiet: bool = False) -> None:
        self.path = run_dir / METRICS
        self.total_steps = total_steps
        self.terminal = sys.stderr.isatty()
        self.active = not (self.terminal and quiet)
        self._work = ""
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="live-line", daemon=True)

    @contextmanager
    def working_on(self, work: str) -> Iterator[None]:
        """Show this text instead of the newest metric line inside the block: work that follows the training steps."""
        self._work, self._since = work, time.monotonic()
        try:
            yield
        finally:
            self._work = ""

    def __enter__(self) -> LiveLine:
        if self.active:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self.active:
            self._thread.join()

    def _follow(self) -> None:
        if not self.terminal:
            for text in self._texts(LOG_S):
                LOG.info("%s", text)
            return
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            for text in self._texts(REFRESH_S):
                status.update(text)

    def _texts(self, interval_s: float) -> Iterator[str]:
        """Yield what the run does, every `interval_s` seconds until it ends: the newest metric line, or other work."""
        accuracies: dict[str, float] = {}
        newest: MetricLine = {}
        while not self._stop.wait(interval_s):
            lines = read_lines(self.path)
            for line in lines:
                accuracies |= {
                    key.removeprefix("validation/"): float(value)
                    for key, value in line.items()
                    if key.startswith("validation/") and not key.endswith("_ci95")
                }
            if lines and lines[-1] != newest:
                newest = lines[-1]
                if not self._work:
                    self._since = time.monotonic()
            waiting_s = time.monotonic() - self._since
            so_far = f"{_clock(waiting_s)} so far"
            if self._work:
                yield f"{self._work}, {so_far}"
            elif newest:
                text = progress_text(newest, self.total_steps, accuracies)
                stage_is_done = newest["step"] == newest["steps"] and int(newest["global_step"]) < self.total_steps
                if stage_is_done:
                    text = f"{newest['stage']} {int(newest['steps']):,} steps done, preparing the next stage, {so_far}"
                elif waiting_s >= LOG_S:
                    text += f"  (no new numbers for {_clock(waiting_s)})"
                yield text
