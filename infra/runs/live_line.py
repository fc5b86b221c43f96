"""A live line while a run trains, on stderr, when a person watches; nothing otherwise."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType

from metagmvae.infra.runs.run_folder import METRICS, read_lines
from metagmvae.training.trainer.context import MetricLine

REFRESH_S = 0.5


def describe(line: MetricLine, total_steps: int, seen: dict[str, float]) -> str:
    """One line of text: stage, step, loss, validation accuracy, rate, waiting share, time left."""
    done = int(line["global_step"])
    elapsed = float(line["elapsed_s"])
    left = elapsed / done * (total_steps - done) if done else 0.0
    accuracy = " ".join(f"{task} {100 * value:.1f}%" for task, value in seen.items())
    parts = [
        f"{line['stage']} {int(line['step']):,}/{int(line['steps']):,}",
        f"loss {float(line['loss']):.4g}",
        accuracy,
        f"{float(line['images_per_s']):,.0f} images/s",
        f"{_clock(left)} left",
    ]
    return "  ".join(part for part in parts if part)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class LiveLine:
    """Follows a run's `metrics.jsonl` in a thread; works for every engine, wherever the lines come from."""

    def __init__(self, run_dir: Path, total_steps: int, *, quiet: bool = False) -> None:
        self.path = run_dir / METRICS
        self.total_steps = total_steps
        self.active = sys.stderr.isatty() and not quiet
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="live-line", daemon=True)

    def __enter__(self) -> LiveLine:
        if self.active:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        if self.active:
            self._thread.join()

    def _follow(self) -> None:
        from rich.console import Console

        seen: dict[str, float] = {}
        with Console(stderr=True).status("starting") as status:
            while not self._ending.wait(REFRESH_S):
                lines = read_lines(self.path)
                for line in lines:
                    seen |= {
                        key.removeprefix("validation/"): float(value)
                        for key, value in line.items()
                        if key.startswith("validation/") and not key.endswith("_ci95")
                    }
                if lines:
                    status.update(describe(lines[-1], self.total_steps, seen))
