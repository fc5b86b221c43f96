"""Ranking of trials, and the report of a sweep folder: files, figures, and errors."""

import json
import math

import numpy as np
import pytest
from called_commands import answer_of, refusal_of
from known_sweep import known_trials, record_of, write_sweep
from PIL import Image
from scipy import stats

from metagmvae.evaluation.sweeps import importance
from metagmvae.evaluation.sweeps.ranking import best_trial, group_trials, rank_correlation, trials_at_common_step
from metagmvae.evaluation.sweeps.record import read_sweep
from metagmvae.evaluation.sweeps.report import write_report
from metagmvae.evaluation.sweeps.sweep_figures import BEST, MAX_LINES, sample_trials
from metagmvae.evaluation.sweeps.trials import CurvePoint, Trial, read_trials, to_json_lines
from metagmvae.pipelines.records import DataError

FIGURES = {"parallel-coordinates.png", "accuracy-over-cost.png", "settings.png", "importance.png"}
SPACE = {
    "train.samples": {"kind": "choice", "values": [4, 8]},
    "train.learning_rate": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
}


@pytest.fixture(autouse=True)
def _few_shuffles(monkeypatch):
    monkeypatch.setattr(importance, "SHUFFLES", 1)


def trial(number, status="finished", *, steps=(10, 20, 30), accuracy=(0.3, 0.4, 0.5), **more):
    points = [CurvePoint(step=s, accuracy=a, ci95=0.02, seconds=s / 10) for s, a in zip(steps, accuracy, strict=False)]
    settings = {"train.samples": 4, "train.learning_rate": 1e-3}
    return Trial(**({"number": number, "settings": settings, "status": status, "curve": tuple(points)} | more))


def test_trials_are_compared_at_a_step_before_any_was_stopped():
    trials = [trial(n) for n in range(6)]
    trials += [trial(n, "stopped", steps=(10,), accuracy=(0.1 * n / 10,)) for n in range(6, 19)]
    trials += [trial(19, "stopped", steps=(5,), accuracy=(0.9,)), trial(20, "failed"), trial(21, "refused", curve=())]
    compared = trials_at_common_step(trials)
    assert (compared.step, compared.left_out) == (10, 1)  # the trial at step 5 is less than a tenth of all
    assert [t.number for t in compared.trials] == list(range(19))
    assert compared.accuracy[:6] == pytest.approx([0.3] * 6)
    complete = trials_at_common_step(trials[:6])
    assert complete.step == 30
    assert complete.accuracy == pytest.approx([0.5] * 6)
    # A trial validated at other steps is interpolated.
    other = trials_at_common_step([*trials[:6], trial(7, steps=(5, 15, 25, 30), accuracy=(0.1, 0.2, 0.4, 0.6))])
    assert other.accuracy[-1] == pytest.approx(0.6)
    assert trials_at_common_step([]).step == 0


def test_the_best_trial_is_a_finished_one_if_any_finished():
    stopped = trial(0, "stopped", accuracy=(0.9, 0.99))
    finished = [trial(1), trial(2, accuracy=(0.6, 0.5, 0.7)), trial(3, accuracy=(0, 0, 0.7))]
    assert best_trial([stopped, *finished]).number == 2
    assert best_trial([stopped, trial(4, "failed", accuracy=(0.2,)), trial(5, "refused", curve=())]).number == 0
    assert best_trial([trial(5, "refused", curve=())]) is None


def test_groups_have_means_and_students_intervals():
    trials = known_trials(80)
    compared = trials_at_common_step(trials)
    groups = group_trials(record_of(trials), compared)
    for value, group in zip([50, 100, 200, 300], groups["train.set_size"], strict=True):
        inside = [a for t, a in zip(trials, compared.accuracy, strict=True) if t.settings["train.set_size"] == value]
        low, high = stats.t.interval(0.95, len(inside) - 1, np.mean(inside), stats.sem(inside))
        assert (group.value, group.trials, group.label) == (value, len(inside), str(value))
        assert (group.mean - group.ci95, group.mean + group.ci95) == pytest.approx((low, high))
    assert [group.value for group in groups["train.em_iterations"]] == [(1, 5), (6, 10), (11, 15), (16, 20)]
    ends = [group.value for group in groups["train.learning_rate"]]
    assert [math.log10(low) for low, _ in ends] == pytest.approx([-4, -3.5, -3, -2.5])
    for (low, high), group in zip(ends, groups["train.learning_rate"], strict=True):
        inside = [
            a for t, a in zip(trials, compared.accuracy, strict=True) if low <= t.settings["train.learning_rate"] < high
        ]
        assert group.mean == pytest.approx(np.mean(inside))


def test_rank_correlation_of_early_and_final_accuracy():
    trials = [trial(n, accuracy=(0.01 * n, 0.4, 0.02 * (n % 7))) for n in range(12)]
    trials += [trial(n, "stopped", steps=(10,), accuracy=(0.0,)) for n in range(12, 24)]
    correlation, count = rank_correlation(trials_at_common_step(trials))
    expected = stats.spearmanr([0.01 * n for n in range(12)], [0.02 * (n % 7) for n in range(12)]).statistic
    assert (correlation, count) == (pytest.approx(expected), 12)
    assert rank_correlation(trials_at_common_step(trials[:5])) == (None, 5)


def test_a_report_consists_of_summary_text_and_figures(tmp_path):
    trials = known_trials(60, fail_every=3, noise=0.1)
    summary = write_report(write_sweep(tmp_path / "wide", trials))
    best = best_trial(trials)
    assert summary["best"]["number"] == best.number
    assert summary["best"]["settings"] == best.settings
    assert (summary["best"]["accuracy"], summary["best"]["ci95"]) == (best.last.accuracy, best.last.ci95)
    assert summary["by_status"] == {"finished": 40, "stopped": 0, "failed": 20, "refused": 0}
    assert summary["seconds"] == pytest.approx(sum(t.seconds for t in trials))
    assert summary["settings"]["train.set_size"]["best"]["value"] in (100, 200, 300)
    assert summary["importance"]["settings"][0]["names"] == ["train.learning_rate"]
    assert json.loads((tmp_path / "wide" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert set(summary["figures"]) == FIGURES
    text = (tmp_path / "wide" / "report.md").read_text()
    assert f"Best: trial {best.number}, {100 * best.last.accuracy:.2f}" in text
    assert "- 20 failed: loss is not finite" in text
    assert "optuna.importance.FanovaImportanceEvaluator" in text
    for name in FIGURES:
        assert f"]({name})" in text
        with Image.open(tmp_path / "wide" / name) as image:
            assert image.width > 600
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10


def test_a_partial_sweep_gives_a_partial_report(tmp_path):
    empty = write_report(write_sweep(tmp_path / "empty", [], SPACE))
    assert (empty["best"], empty["figures"], empty["trials"]) == (None, [], 0)
    assert "No trial has an accuracy yet" in (tmp_path / "empty" / "report.md").read_text()
    bad = [trial(0, "failed", curve=(), reason="out of memory"), trial(1, "refused", curve=(), reason="R > N")]
    none = write_report(write_sweep(tmp_path / "bad", bad, SPACE))
    assert none["figures"] == []
    assert "- 1 refused: R > N" in (tmp_path / "bad" / "report.md").read_text()
    one = write_report(write_sweep(tmp_path / "one", [*bad, trial(2, "stopped")], SPACE))
    assert set(one["figures"]) == FIGURES - {"importance.png"}
    assert one["importance"]["too_few"].startswith("too few trials: 1 ")
    assert one["settings"]["train.samples"]["groups"] == [{"value": 4, "trials": 1, "mean": 0.5, "ci95": None}]
    assert "(stopped; no trial has finished)" in (tmp_path / "one" / "report.md").read_text()
    only_failed = write_report(write_sweep(tmp_path / "failed", [trial(3, "failed", accuracy=(0.2,))], SPACE))
    assert set(only_failed["figures"]) == {"parallel-coordinates.png", "accuracy-over-cost.png"}


def test_truncated_last_lines_and_unusual_characters_are_read(tmp_path):
    odd = trial(0, "failed", reason="bad\u2028news\x85\x1c")
    write_sweep(tmp_path, [odd, trial(1), trial(1, accuracy=(0.1, 0.1, 0.9))], SPACE)
    with open(tmp_path / "trials.jsonl", "a", encoding="utf-8") as file:
        file.write(to_json_lines([trial(2)])[:40])
    assert read_trials(tmp_path / "trials.jsonl") == [odd, trial(1, accuracy=(0.1, 0.1, 0.9))]


def test_figures_of_many_trials_draw_the_best_and_a_sample():
    trials = known_trials(1000, halving=True)
    sample = sample_trials(trials, MAX_LINES)
    assert len({t.number for t in sample}) == len(sample) == MAX_LINES
    best = sorted(trials, key=lambda t: -t.curve[-1].accuracy)[:BEST]
    assert {t.number for t in best} <= {t.number for t in sample}
    assert sample_trials(trials[:5], MAX_LINES) == trials[:5]
    assert sample_trials(trials, MAX_LINES) == sample


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        ({"a": {"kind": "loguniform", "low": -1.0, "high": 1.0}}, "a: low (-1) of loguniform must be greater than 0"),
        ({"a": {"kind": "normal", "low": 0.0, "high": 1.0}}, "kind must be one of choice, int, uniform, loguniform"),
        ({"a": {"kind": "int", "low": 1}}, "a: high is missing"),
        ([], "sweep.json: space = []"),
        ({"a": {"kind": "choice", "values": [1, 2]}}, "trial 0 has no a; was sweep.json changed"),
        ({"train.samples": {"kind": "choice", "values": [8, 16]}}, "train.samples: 4 is not in the space; was sweep."),
        ({"train.learning_rate": {"kind": "uniform", "low": 0.5, "high": 1.0}}, "train.learning_rate: 0.001 is not"),
    ],
)
def test_an_invalid_sweep_gives_one_error_line(tmp_path, capsys, space, reason):
    folder = write_sweep(tmp_path / "s", [trial(0)], space)
    assert reason in refusal_of("figure", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_figure_needs_data_for_a_model_but_not_for_a_sweep(tmp_path):
    folder = write_sweep(tmp_path / "s", [trial(0), trial(1, "stopped", steps=(10,))], SPACE)
    answer = answer_of("figure", folder, "--out", tmp_path / "out")
    assert answer["best"]["number"] == 0
    assert answer["trials"] == {"finished": 1, "stopped": 1, "failed": 0, "refused": 0}
    assert all((tmp_path / "out" / name).is_file() for name in FIGURES - {"importance.png"})
    assert sorted(path.name for path in folder.iterdir()) == ["sweep.json", "trials.jsonl"]
    assert "name it with --data" in refusal_of("figure", tmp_path / "model", "--out", tmp_path / "out")
    (folder / "trials.jsonl").write_text("{}\n")
    assert "line 1: not a trial" in refusal_of("figure", folder, "--out", tmp_path / "out")
    with pytest.raises(DataError, match="give the folder that `metagmvae tune` wrote"):
        read_sweep(tmp_path / "nothing")
