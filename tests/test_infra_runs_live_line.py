"""The live line says where a run stands, and says nothing when nobody watches."""

import io
import threading

from metagmvae.infra.runs.live_line import LiveLine, describe
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


def test_the_line_names_stage_step_loss_accuracy_rate_and_time_left():
    text = describe(LINE, 6_400, {"5w1s": 0.8123})
    assert text == "meta 1,500/6,000  loss 123.5  5w1s 81.2%  1,652 images/s  0:07:30 left"


def test_nobody_watches(tmp_path, monkeypatch, capsys):
    before = threading.active_count()
    with LiveLine(tmp_path, 10):
        assert threading.active_count() == before
    assert capsys.readouterr().err == ""


def test_somebody_watches_a_run_whose_file_appears_late_and_the_thread_ends(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("metagmvae.infra.runs.live_line.REFRESH_S", 0.01)
    seen = threading.Event()
    monkeypatch.setattr("metagmvae.infra.runs.live_line.describe", lambda *_: seen.set() or "described")
    live = LiveLine(tmp_path, 6_400)
    with live:
        append_lines(tmp_path / METRICS, [LINE])
        assert seen.wait(10)
    assert not live._thread.is_alive()
    quiet = LiveLine(tmp_path, 6_400, quiet=True)
    with quiet:
        assert not quiet._thread.is_alive()
