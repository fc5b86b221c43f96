"""The live progress line of a training."""

import io
import logging
import threading
import time

from metagmvae.infra.runs.live_line import LiveLine, progress_text
from metagmvae.infra.runs.run_folder import METRICS, append_lines

LINE = {
    "stage": "meta",
    "step": 1_500,
    "steps": 6_000,
    "global_step": 1_900,
    "loss": 123.456,
    "images_per_s": 1652.2,
    "elapsed_s": 190.0,
    "validation/5w1s": 0.8123,
}


def test_line_shows_stage_step_loss_accuracy_speed_and_remaining_time():
    line = progress_text(LINE, 6_400, {"5w1s": 0.8123})
    assert line == "meta 1,500/6,000  loss 123.5  5w1s 81.2%  1,652 images/s  0:07:30 left"


def test_without_a_terminal_a_line_is_logged_now_and_then(tmp_path, monkeypatch, caplog):
    append_lines(tmp_path / METRICS, [LINE])
    with caplog.at_level(logging.INFO, "metagmvae"):
        with LiveLine(tmp_path, 6_400):
            pass
        assert caplog.messages == []
        monkeypatch.setattr("metagmvae.infra.runs.live_line.LOG_S", 0.01)
        with LiveLine(tmp_path, 6_400):
            while not caplog.messages:
                time.sleep(0.01)
    assert caplog.messages[0] == "meta 1,500/6,000  loss 123.5  5w1s 81.2%  1,652 images/s  0:07:30 left"


def test_line_is_shown_for_a_file_created_later_and_the_thread_ends(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("metagmvae.infra.runs.live_line.REFRESH_S", 0.01)
    shown = threading.Event()
    monkeypatch.setattr("metagmvae.infra.runs.live_line.progress_text", lambda *_: shown.set() or "text")
    live = LiveLine(tmp_path, 6_400)
    with live:
        append_lines(tmp_path / METRICS, [LINE])
        assert shown.wait(10)
    assert not live._thread.is_alive()
    quiet = LiveLine(tmp_path, 6_400, quiet=True)
    with quiet:
        assert not quiet._thread.is_alive()


def texts(live: LiveLine, count: int, between: list) -> list[str]:
    """The first texts, without waiting; after each one an action is done."""
    live._stop.wait = lambda _: False
    following, shown = live._texts(0.0), []
    for _, action in zip(range(count), between, strict=True):
        shown.append(next(following))
        action()
    return shown


def test_text_says_what_happens_where_no_metric_lines_come(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("metagmvae.infra.runs.live_line.time.monotonic", lambda: now[0])
    pretrain = {"stage": "pretrain", "step": 400, "steps": 400, "global_step": 400, "loss": 2.0, "elapsed_s": 40.0}
    append_lines(tmp_path / METRICS, [LINE])
    live = LiveLine(tmp_path, 6_400)
    stopped = live.working_on("drawing figures")

    def wait(seconds: float) -> None:
        now[0] += seconds

    shown = texts(
        live,
        7,
        [
            lambda: wait(29),
            lambda: wait(62),
            lambda: append_lines(tmp_path / METRICS, [pretrain]),
            lambda: wait(125),
            lambda: (stopped.__enter__(), wait(5)),
            lambda: (stopped.__exit__(None, None, None), append_lines(tmp_path / METRICS, [LINE])),
            lambda: None,
        ],
    )
    line = "meta 1,500/6,000  loss 123.5  5w1s 81.2%  1,652 images/s  0:07:30 left"
    assert shown == [
        line,
        line,
        f"{line}  (no new numbers for 0:01:31)",
        "pretrain 400 steps done, preparing the next stage, 0:00:00 so far",
        "pretrain 400 steps done, preparing the next stage, 0:02:05 so far",
        "drawing figures, 0:00:05 so far",
        line,
    ]
