"""The course of a sweep, without Ray: refusals, ends of every kind, resumes, what is best."""

import json

import pytest
from small_sweep import open_sweep, train

from metagmvae.configs.load import SettingsError, load_settings
from metagmvae.configs.search_space import load_space
from metagmvae.evaluation.sweeps.trials import read_trials
from metagmvae.infra.runs.run_folder import CHECKPOINT
from metagmvae.infra.tune.sweep_folder import REASON, SweepFolder, SweepPlan
from metagmvae.infra.tune.sweep_state import BEST, OUT_OF_TIME, check_validated


def test_impossible_ones_are_refused_without_a_slot_and_the_table_says_why(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    numbers = []
    while (number := sweep.next()) is not None:
        numbers.append(number)
        train(sweep, number, [0.3, 0.4])
        assert sweep.has_ended(number).status == "finished"
    assert len(numbers) == 6
    trials = read_trials(tmp_path / "sweep" / "trials.jsonl")
    refused = [trial for trial in trials if trial.status == "refused"]
    assert refused
    for trial in refused:
        assert trial.settings["train.components"] > trial.settings["train.set_size"]
        assert "exceeds set_size" in trial.reason
        assert not sweep.folder.folder(trial.number).exists()
    finished = [trial for trial in trials if trial.status == "finished"]
    assert {trial.number for trial in finished} == set(numbers)
    assert len({json.dumps(trial.settings) for trial in trials}) == len(trials)


def test_each_way_that_a_trial_ends(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    numbers = [sweep.next() for _ in range(5)]
    whole, stopped, failed, lost, late = numbers
    train(sweep, whole, [0.3, 0.5])
    train(sweep, stopped, [0.2])
    (sweep.folder.folder(failed) / REASON).write_text("meta step 3: loss nan\n")
    train(sweep, lost, [0.2])
    train(sweep, late, [0.2])
    sweep.late.add(late)
    ends = [sweep.has_ended(number) for number in (whole, stopped, failed)]
    ends += [sweep.has_ended(lost, 2, "OutOfMemoryError"), sweep.has_ended(late)]
    assert [(trial.status, trial.reason) for trial in ends] == [
        ("finished", ""),
        ("stopped", ""),
        ("failed", "meta step 3: loss nan"),
        ("failed", "its process was lost 2 times: OutOfMemoryError"),
        ("stopped", OUT_OF_TIME),
    ]
    assert [point.accuracy for point in ends[0].curve] == [0.3, 0.5]
    assert read_trials(tmp_path / "sweep" / "trials.jsonl")[-5:] == ends


def test_only_the_best_trial_keeps_its_checkpoint(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    for accuracy in (0.3, 0.6, 0.4, 0.7):
        number = sweep.next()
        train(sweep, number, [0.2, accuracy])
        sweep.has_ended(number)
    kept = [path.parent.name for path in (tmp_path / "sweep").rglob(CHECKPOINT)]
    assert kept == [f"{number:05d}"]
    best = sweep.write_best()
    assert best.number == number
    settings = load_settings(tmp_path / "sweep" / BEST)
    assert plan.space.values_of(settings) == best.settings
    assert settings.train.steps == 20
    assert settings.name == "mine-best"
    assert "70.00 ± 1.00%" in (tmp_path / "sweep" / BEST).read_text()


def test_of_equal_trials_the_best_one_keeps_its_checkpoint(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    for _ in range(3):
        number = sweep.next()
        train(sweep, number, [0.2, 0.2])
        sweep.has_ended(number)
    kept = [path.parent.name for path in (tmp_path / "sweep").rglob(CHECKPOINT)]
    assert kept == [f"{sweep.write_best().number:05d}"]


def test_a_stopped_trial_is_never_better_than_one_that_was_trained_to_the_end(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    first, second = sweep.next(), sweep.next()
    train(sweep, first, [0.9])
    sweep.has_ended(first)
    assert sweep.write_best().number == first
    train(sweep, second, [0.3, 0.4])
    sweep.has_ended(second)
    assert sweep.write_best().number == second


def test_a_resumed_sweep_goes_on_where_it_was(plan, dataset, tmp_path):
    root = tmp_path / "sweep"
    undisturbed = open_sweep(plan, dataset, tmp_path / "whole")
    expected = [undisturbed.next() for _ in range(6)]
    sweep = open_sweep(plan, dataset, root)
    first, second, third, fourth = (sweep.next() for _ in range(4))
    train(sweep, first, [0.3, 0.5])
    sweep.has_ended(first)
    train(sweep, second, [0.3, 0.4])  # came to its end in the moment of the kill
    train(sweep, third, [0.3])
    with open(root / "trials.jsonl", "a") as file:
        file.write('{"number": 99, "sett')  # the machine crashed in the middle of a line
    again = open_sweep(plan, dataset, root, resume=True)
    assert {number: trial.status for number, trial in again.ended.items() if trial.status != "refused"} == {
        first: "finished",
        second: "finished",
    }
    assert [again.next(), again.next()] == [third, fourth]
    assert [first, second, third, fourth, again.next(), again.next()] == expected
    assert again.next() is None
    for number in expected:
        assert again.folder.settings(number).train == undisturbed.folder.settings(number).train


def test_more_trials_may_be_asked_for_at_a_resume(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep", 1)
    number = sweep.next()
    train(sweep, number, [0.3, 0.5])
    sweep.has_ended(number)
    assert sweep.next() is None
    again = open_sweep(plan, dataset, tmp_path / "sweep", 2, resume=True)
    assert again.next() > number
    assert again.next() is None


def test_the_hours_cut_trials_off_and_a_resume_goes_on_with_them(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    first = sweep.next()
    train(sweep, first, [0.3])
    sweep.late.add(first)
    sweep.has_ended(first)
    assert (sweep.folder.folder(first) / CHECKPOINT).exists()
    assert open_sweep(plan, dataset, tmp_path / "sweep", resume=True, hours=1e-12).next() is None
    again = open_sweep(plan, dataset, tmp_path / "sweep", resume=True)
    assert again.next() == first
    train(again, first, [0.3, 0.6])
    again.has_ended(first)
    (trial,) = [trial for trial in read_trials(tmp_path / "sweep" / "trials.jsonl") if trial.number == first]
    assert trial.status == "finished"


def test_what_the_hours_cut_off_counts_until_it_can_go_on(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep", 1)
    number = sweep.next()
    train(sweep, number, [0.3])
    sweep.late.add(number)
    sweep.has_ended(number)
    again = open_sweep(plan, dataset, tmp_path / "sweep", 1, resume=True, hours=1e-12)
    assert again.next() is None
    assert again.write_best().number == number
    again.folder.rewrite(again.trials())
    last = open_sweep(plan, dataset, tmp_path / "sweep", 1, resume=True)
    assert [trial.reason for trial in last.trials() if trial.number == number] == [OUT_OF_TIME]
    assert last.next() == number
    train(last, number, [0.3, 0.6])
    last.has_ended(number)
    assert [trial.status for trial in last.trials() if trial.number == number] == ["finished"]


def test_a_trial_that_was_killed_while_its_folder_was_made_is_drawn_again(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    number = sweep.next()
    (sweep.folder.folder(number) / "settings.json").rename(sweep.folder.folder(number) / ".settings.json.x1.tmp")
    again = open_sweep(plan, dataset, tmp_path / "sweep", resume=True)
    assert again.next() == number
    assert [path.name for path in again.folder.folder(number).iterdir()] == ["settings.json"]


def test_whoever_only_reads_a_sweep_mends_nothing_in_it(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    number = sweep.next()
    (sweep.folder.folder(99)).mkdir()  # just being made
    half = '{"number": 5, "sett'
    with open(sweep.folder.table, "a") as file:
        file.write(half)  # just being written
    reader = SweepFolder(tmp_path / "sweep")
    assert number in reader.unfinished(trial.number for trial in reader.trials())
    assert sweep.folder.folder(99).is_dir()
    assert sweep.folder.table.read_text().endswith(half)


def test_whole_numbers_for_a_real_setting_are_tried_once(plan, dataset, tmp_path):
    (tmp_path / "two.toml").write_text("train.clip_norm = {choice=[0, 5]}")
    small = SweepPlan("two", plan.base, load_space(tmp_path / "two.toml"), "random", "none", 0, "5w1s")
    sweep = open_sweep(small, dataset, tmp_path / "sweep", 50)
    assert [sweep.next() is None for _ in range(3)] == [False, False, True]


def test_a_small_space_ends_when_all_of_it_was_tried(plan, dataset, tmp_path):
    (tmp_path / "two.toml").write_text("train.em_iterations = {choice=[1, 2]}")
    small = SweepPlan("two", plan.base, load_space(tmp_path / "two.toml"), "random", "none", 0, "5w1s")
    sweep = open_sweep(small, dataset, tmp_path / "sweep", 50)
    assert [sweep.next() is None for _ in range(3)] == [False, False, True]


def test_a_space_in_which_nothing_is_possible(plan, dataset, tmp_path):
    (tmp_path / "none.toml").write_text("train.components = {range=[201, 2000]}")
    nothing = SweepPlan("none", plan.base, load_space(tmp_path / "none.toml"), "random", "none", 0, "5w1s")
    with pytest.raises(SettingsError, match="none is possible; the last one: train: components K"):
        open_sweep(nothing, dataset, tmp_path / "sweep").next()


def test_steps_after_which_nothing_is_judged(plan):
    pairs = [("train.steps", 10), ("validation.every", 4)]
    settings = load_settings("omniglot-5way", [f"{key}={value}" for key, value in pairs])
    with pytest.raises(SettingsError, match=r"train\.steps \(10\) is not a multiple .* set validation\.every to 2,"):
        check_validated(settings)
    check_validated(plan.base)
