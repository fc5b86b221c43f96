"""What a sweep folder says: judging, groups, files, and what is wrong with it."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from metagmvae.evaluation.sweeps import importance
from metagmvae.evaluation.sweeps.ranking import agreement, best_trial, groups, trials_at_common_step
from metagmvae.evaluation.sweeps.record import Axis, SweepRecord, axes_of, read_sweep
from metagmvae.evaluation.sweeps.report import write_report
from metagmvae.evaluation.sweeps.simulation import SPACE, Simulated, simulate, write_simulated
from metagmvae.evaluation.sweeps.sweep_figures import BEST, MOST_LINES, drawn
from metagmvae.evaluation.sweeps.trials import CurvePoint, Trial, lines_of, read_trials
from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError

PICTURES = {"parallel-coordinates.png", "accuracy-over-cost.png", "settings.png", "importance.png"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(importance, "SHUFFLES", 1)


def trial(number, status="finished", *, steps=(10, 20, 30), accuracy=(0.3, 0.4, 0.5), **more):
    points = [CurvePoint(step=s, accuracy=a, ci95=0.02, seconds=s / 10) for s, a in zip(steps, accuracy, strict=False)]
    settings = {"train.samples": 4, "train.learning_rate": 1e-3}
    return Trial(**({"number": number, "settings": settings, "status": status, "curve": tuple(points)} | more))


def folder_of(path, trials, space=None, **changes):
    path.mkdir(exist_ok=True)
    space = space or {
        "train.samples": {"kind": "choice", "values": [4, 8]},
        "train.learning_rate": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    }
    about = {"name": "s", "task": "5w1s", "space": space, "base": {}} | changes
    (path / "sweep.json").write_text(json.dumps(about))
    (path / "trials.jsonl").write_text(lines_of(trials), encoding="utf-8")
    return path


def test_all_trials_are_judged_where_nobody_was_stopped():
    trials = [trial(n) for n in range(6)]
    trials += [trial(n, "stopped", steps=(10,), accuracy=(0.1 * n / 10,)) for n in range(6, 19)]
    trials += [trial(19, "stopped", steps=(5,), accuracy=(0.9,)), trial(20, "failed"), trial(21, "refused", curve=())]
    judged = trials_at_common_step(trials)
    assert (judged.step, judged.left_out) == (10, 1)  # the one at step 5 is less than a tenth
    assert [t.number for t in judged.trials] == list(range(19))
    assert judged.accuracy[:6] == pytest.approx([0.3] * 6)
    whole = trials_at_common_step(trials[:6])
    assert whole.step == 30
    assert whole.accuracy == pytest.approx([0.5] * 6)
    # Validated at other steps: on the line between two validations.
    other = trials_at_common_step([*trials[:6], trial(7, steps=(5, 15, 25, 30), accuracy=(0.1, 0.2, 0.4, 0.6))])
    assert other.accuracy[-1] == pytest.approx(0.6)
    assert trials_at_common_step([]).step == 0


def test_the_best_is_one_that_trained_to_the_end_if_any_did():
    early = trial(0, "stopped", accuracy=(0.9, 0.99))
    assert best_trial([early, trial(1), trial(2, accuracy=(0.6, 0.5, 0.7)), trial(3, accuracy=(0, 0, 0.7))]).number == 2
    assert best_trial([early, trial(4, "failed", accuracy=(0.2,)), trial(5, "refused", curve=())]).number == 0
    assert best_trial([trial(5, "refused", curve=())]) is None


def test_groups_are_means_of_values_and_parts_with_students_interval():
    trials = tuple(simulate(Simulated(trials=80, asha=False)))
    judged, sweep = trials_at_common_step(trials), SweepRecord("s", "t", axes_of(SPACE), trials)
    found = groups(sweep, judged)
    for value, group in zip([50, 100, 200, 300], found["train.set_size"], strict=True):
        inside = [a for t, a in zip(trials, judged.accuracy, strict=True) if t.settings["train.set_size"] == value]
        low, high = stats.t.interval(0.95, len(inside) - 1, np.mean(inside), stats.sem(inside))
        assert (group.value, group.trials, group.label) == (value, len(inside), str(value))
        assert (group.mean - group.ci95, group.mean + group.ci95) == pytest.approx((low, high))
    assert [group.value for group in found["train.em_iterations"]] == [(1, 5), (6, 10), (11, 15), (16, 20)]
    ends = [group.value for group in found["train.learning_rate"]]
    assert [math.log10(low) for low, _ in ends] == pytest.approx([-4, -3.5, -3, -2.5])
    for (low, high), group in zip(ends, found["train.learning_rate"], strict=True):
        inside = [
            a for t, a in zip(trials, judged.accuracy, strict=True) if low <= t.settings["train.learning_rate"] < high
        ]
        assert group.mean == pytest.approx(np.mean(inside))


def test_ranks_of_early_and_late_accuracy_are_compared():
    trials = simulate(Simulated(trials=60))
    judged = trials_at_common_step(trials)
    rank, count = agreement(judged)
    ended = [t for t in trials if t.status == "finished"]
    early, late = ([t.curve[at].accuracy for t in ended] for at in (0, -1))
    assert (count, rank) == (len(ended), pytest.approx(stats.spearmanr(early, late).statistic))
    assert agreement(trials_at_common_step(trials[:5])) == (
        None,
        pytest.approx(sum(t.status == "finished" for t in trials[:5])),
    )


def test_axes_place_what_search_draws_evenly():
    log = Axis("a", "loguniform", (), 1e-4, 1e-2)
    assert [log.unit(value) for value in (1e-4, 1e-3, 1e-2)] == pytest.approx([0, 0.5, 1])
    assert log.at(0.5) == pytest.approx(1e-3)
    assert log.ticks() == (pytest.approx([0, 0.5, 1]), ["0.0001", "0.001", "0.01"])
    both = Axis("b", "choice", (1, True, "x"))
    assert [both.unit(value) for value in (1, True, "x")] == pytest.approx([1 / 6, 0.5, 5 / 6])
    (whole,) = axes_of({"c": {"kind": "int", "low": 50, "high": 120, "step": 50}})
    assert [whole.unit(value) for value in (50, 100)] == [0.25, 0.75]
    with pytest.raises(DataError, match="c: 75 is not in the space"):
        whole.unit(75)
    assert Axis("d", "int", range(1, 101)).ticks()[1] == ["1", "21", "41", "60", "80", "100"]
    assert Axis("e", "choice", ("only",)).ticks() == ([0.5], ["only"])


def test_a_sweep_leaves_pictures_a_summary_and_a_report(tmp_path):
    trials = write_simulated(tmp_path / "wide", Simulated(trials=60, failing=0.5, noise=0.1))
    summary = write_report(tmp_path / "wide")
    best = best_trial(trials)
    assert summary["best"]["number"] == best.number
    assert summary["best"]["settings"] == best.settings
    assert (summary["best"]["accuracy"], summary["best"]["ci95"]) == (best.last.accuracy, best.last.ci95)
    assert sum(summary["by_status"].values()) == summary["trials"] == 60
    assert summary["by_status"]["failed"] > 0
    assert summary["seconds"] == pytest.approx(sum(t.seconds for t in trials))
    assert summary["settings"]["train.set_size"]["best"]["value"] in (100, 200, 300)
    assert summary["importance"]["settings"][0]["names"] == ("train.learning_rate",)
    assert json.loads((tmp_path / "wide" / "summary.json").read_text())["best"] == summary["best"]
    assert set(summary["figures"]) == PICTURES
    text = (tmp_path / "wide" / "report.md").read_text()
    assert f"Best: trial {best.number}, {100 * best.last.accuracy:.2f}" in text
    assert f"- {summary['by_status']['failed']} failed: loss is not finite" in text
    for name in PICTURES:
        assert f"]({name})" in text
        with Image.open(tmp_path / "wide" / name) as picture:
            assert picture.width > 600
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10


def test_partial_sweeps_say_what_they_can(tmp_path):
    empty = write_report(folder_of(tmp_path / "empty", []))
    assert (empty["best"], empty["figures"], empty["trials"]) == (None, [], 0)
    assert "No trial has an accuracy yet" in (tmp_path / "empty" / "report.md").read_text()
    bad = [trial(0, "failed", curve=(), reason="out of memory"), trial(1, "refused", curve=(), reason="R > N")]
    none = write_report(folder_of(tmp_path / "bad", bad))
    assert none["figures"] == []
    assert "- 1 refused: R > N" in (tmp_path / "bad" / "report.md").read_text()
    one = write_report(folder_of(tmp_path / "one", [*bad, trial(2, "stopped")]))
    assert set(one["figures"]) == PICTURES - {"importance.png"}
    assert one["importance"]["too_few"].startswith("too few trials: 1 ")
    assert one["settings"]["train.samples"]["groups"] == [{"value": 4, "trials": 1, "mean": 0.5, "ci95": None}]
    assert "stopped: none trained to the end" in (tmp_path / "one" / "report.md").read_text()
    only_failed = write_report(folder_of(tmp_path / "failed", [trial(3, "failed", accuracy=(0.2,))]))
    assert set(only_failed["figures"]) == {"parallel-coordinates.png", "accuracy-over-cost.png"}


def test_lines_that_a_kill_cut_off_or_that_hold_odd_characters_are_read(tmp_path):
    odd = trial(0, "failed", reason="bad\u2028news\x85\x1c")
    folder_of(tmp_path, [odd, trial(1), trial(1, accuracy=(0.1, 0.1, 0.9))])
    with open(tmp_path / "trials.jsonl", "a", encoding="utf-8") as file:
        file.write(lines_of([trial(2)])[:40])
    assert read_trials(tmp_path / "trials.jsonl") == [odd, trial(1, accuracy=(0.1, 0.1, 0.9))]


def test_pictures_of_thousands_of_trials_draw_the_best_and_some(tmp_path):
    trials = simulate(Simulated(trials=3000, at_once=100))
    shown = drawn(trials, MOST_LINES)
    assert len({t.number for t in shown}) == len(shown) == MOST_LINES
    best = sorted(trials, key=lambda t: -t.curve[-1].accuracy)[:BEST]
    assert {t.number for t in best} <= {t.number for t in shown}
    assert drawn(trials[:5], MOST_LINES) == trials[:5]
    assert drawn(trials, MOST_LINES) == shown


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        ({"a": {"kind": "loguniform", "low": -1.0, "high": 1.0}}, "space of a: loguniform from -1 to 1"),
        ({"a": {"kind": "uniform", "low": 1.0, "high": 1.0}}, "uniform from 1 to 1"),
        ({"a": {"kind": "normal", "low": 0.0, "high": 1.0}}, "kinds are choice, int, uniform, loguniform"),
        ({"a": {"kind": "choice", "values": []}}, "no values"),
        ({"a": {"kind": "int", "low": 1}}, "space of a: 'high'"),
        ([], "not a sweep"),
        ({"a": {"kind": "choice", "values": [1, 2]}}, "trial 0 has no a"),
        ({"train.samples": {"kind": "choice", "values": [8, 16]}}, "train.samples: 4 is not in the space"),
        ({"train.learning_rate": {"kind": "uniform", "low": 0.5, "high": 1.0}}, "train.learning_rate: 0.001 is not"),
    ],
)
def test_a_broken_sweep_is_one_line(tmp_path, capsys, space, reason):
    folder = folder_of(tmp_path / "s", [trial(0)], space=space, task="x")
    if space == []:
        (folder / "sweep.json").write_text(json.dumps({"name": "s", "task": "t", "space": []}))
    assert main(["figure", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_figure_redraws_a_sweep_without_data_and_asks_for_data_of_a_model(tmp_path, capsys):
    folder = folder_of(tmp_path / "s", [trial(0), trial(1, "stopped", steps=(10,))])
    assert main(["figure", str(folder), "--out", str(tmp_path / "out"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["best"]["number"] == 0
    assert answer["trials"] == {"finished": 1, "stopped": 1, "failed": 0, "refused": 0}
    assert all((tmp_path / "out" / name).is_file() for name in PICTURES - {"importance.png"})
    assert [path.name for path in folder.iterdir()] == ["sweep.json", "trials.jsonl"] or len(
        list(folder.iterdir())
    ) == 2
    assert main(["figure", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    assert "name it with --data" in capsys.readouterr().err
    (folder / "trials.jsonl").write_text("{}\n")
    assert main(["figure", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "line 1: not a trial" in capsys.readouterr().err
    with pytest.raises(DataError, match="name the folder that `metagmvae tune` wrote"):
        read_sweep(tmp_path / "nothing")
