"""The state of a sweep without Ray: refused trials, statuses, resumes, the best trial."""

import json

import pytest
from small_sweep import new_plan, open_sweep, run_next, train

from metagmvae.configs.load import SettingsError, load_settings
from metagmvae.evaluation.sweeps.trials import read_trials
from metagmvae.infra.runs.run_folder import CHECKPOINT
from metagmvae.infra.tune.sweep_folder import REASON, SweepFolder
from metagmvae.infra.tune.sweep_state import BEST, OUT_OF_TIME, check_validation_interval


def test_impossible_combinations_are_refused_with_a_reason_and_do_not_count(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    numbers = []
    while (number := sweep.next_trial()) is not None:
        numbers.append(number)
        train(sweep, number, [0.3, 0.4])
        assert sweep.end_trial(number).status == "finished"
    assert len(numbers) == 6
    trials = read_trials(tmp_path / "sweep" / "trials.jsonl")
    refused = [trial for trial in trials if trial.status == "refused"]
    assert refused
    for trial in refused:
        assert trial.settings["train.components"] > trial.settings["train.set_size"]
        assert "exceeds set_size" in trial.reason
        assert not sweep.folder.trial_folder(trial.number).exists()
    finished = [trial for trial in trials if trial.status == "finished"]
    assert {trial.number for trial in finished} == set(numbers)
    assert len({json.dumps(trial.settings) for trial in trials}) == len(trials)


def test_the_status_of_each_kind_of_end(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    numbers = [sweep.next_trial() for _ in range(5)]
    whole, stopped, failed, lost, late = numbers
    train(sweep, whole, [0.3, 0.5])
    train(sweep, stopped, [0.2])
    (sweep.folder.trial_folder(failed) / REASON).write_text("meta step 3: loss nan\n")
    train(sweep, lost, [0.2])
    train(sweep, late, [0.2])
    sweep.timed_out.add(late)
    ends = [sweep.end_trial(number) for number in (whole, stopped, failed)]
    ends += [sweep.end_trial(lost, 2, "OutOfMemoryError"), sweep.end_trial(late)]
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
        number = run_next(sweep, [0.2, accuracy])
    kept = [path.parent.name for path in (tmp_path / "sweep").rglob(CHECKPOINT)]
    assert kept == [f"{number:05d}"]
    best = sweep.write_best()
    assert best.number == number
    settings = load_settings(tmp_path / "sweep" / BEST)
    assert plan.space.values_of(settings) == best.settings
    assert settings.train.steps == 20
    assert settings.name == "mine-best"
    assert "70.00 ± 1.00%" in (tmp_path / "sweep" / BEST).read_text()


def test_of_equal_trials_only_the_best_keeps_its_checkpoint(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    for _ in range(3):
        run_next(sweep, [0.2, 0.2])
    kept = [path.parent.name for path in (tmp_path / "sweep").rglob(CHECKPOINT)]
    assert kept == [f"{sweep.write_best().number:05d}"]


def test_a_stopped_trial_is_never_better_than_a_finished_one(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    first, second = sweep.next_trial(), sweep.next_trial()
    train(sweep, first, [0.9])
    sweep.end_trial(first)
    assert sweep.write_best().number == first
    train(sweep, second, [0.3, 0.4])
    sweep.end_trial(second)
    assert sweep.write_best().number == second


def test_a_resumed_sweep_runs_the_same_trials_as_an_uninterrupted_one(plan, dataset, tmp_path):
    root = tmp_path / "sweep"
    uninterrupted = open_sweep(plan, dataset, tmp_path / "whole")
    expected = [uninterrupted.next_trial() for _ in range(6)]
    sweep = open_sweep(plan, dataset, root)
    first, second, third, fourth = (sweep.next_trial() for _ in range(4))
    train(sweep, first, [0.3, 0.5])
    sweep.end_trial(first)
    train(sweep, second, [0.3, 0.4])  # finished, but was killed before its line was written
    train(sweep, third, [0.3])
    with open(root / "trials.jsonl", "a") as file:
        file.write('{"number": 99, "sett')  # the machine crashed while a line was being written
    resumed = open_sweep(plan, dataset, root, resume=True)
    assert {number: trial.status for number, trial in resumed.ended.items() if trial.status != "refused"} == {
        first: "finished",
        second: "finished",
    }
    assert [resumed.next_trial(), resumed.next_trial()] == [third, fourth]
    assert [first, second, third, fourth, resumed.next_trial(), resumed.next_trial()] == expected
    assert resumed.next_trial() is None
    for number in expected:
        assert resumed.folder.trial_settings(number).train == uninterrupted.folder.trial_settings(number).train


def test_a_resume_may_request_more_trials(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep", 1)
    number = run_next(sweep, [0.3, 0.5])
    assert sweep.next_trial() is None
    resumed = open_sweep(plan, dataset, tmp_path / "sweep", 2, resume=True)
    assert resumed.next_trial() > number
    assert resumed.next_trial() is None


def test_a_resume_continues_trials_that_the_time_limit_stopped(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    first = sweep.next_trial()
    train(sweep, first, [0.3])
    sweep.timed_out.add(first)
    sweep.end_trial(first)
    assert (sweep.folder.trial_folder(first) / CHECKPOINT).exists()
    assert open_sweep(plan, dataset, tmp_path / "sweep", resume=True, hours=1e-12).next_trial() is None
    resumed = open_sweep(plan, dataset, tmp_path / "sweep", resume=True)
    assert run_next(resumed, [0.3, 0.6]) == first
    (trial,) = [trial for trial in read_trials(tmp_path / "sweep" / "trials.jsonl") if trial.number == first]
    assert trial.status == "finished"


def test_results_of_a_timed_out_trial_count_until_it_continues(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep", 1)
    number = sweep.next_trial()
    train(sweep, number, [0.3])
    sweep.timed_out.add(number)
    sweep.end_trial(number)
    resumed = open_sweep(plan, dataset, tmp_path / "sweep", 1, resume=True, hours=1e-12)
    assert resumed.next_trial() is None
    assert resumed.write_best().number == number
    resumed.folder.rewrite_trials(resumed.trials())
    last = open_sweep(plan, dataset, tmp_path / "sweep", 1, resume=True)
    assert [trial.reason for trial in last.trials() if trial.number == number] == [OUT_OF_TIME]
    assert run_next(last, [0.3, 0.6]) == number
    assert [trial.status for trial in last.trials() if trial.number == number] == ["finished"]


def test_a_trial_whose_folder_is_incomplete_is_proposed_again(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    number = sweep.next_trial()
    (sweep.folder.trial_folder(number) / "settings.json").rename(
        sweep.folder.trial_folder(number) / ".settings.json.x1.tmp"
    )
    resumed = open_sweep(plan, dataset, tmp_path / "sweep", resume=True)
    assert resumed.next_trial() == number
    assert [path.name for path in resumed.folder.trial_folder(number).iterdir()] == ["settings.json"]


def test_reading_a_running_sweep_changes_no_file(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    number = sweep.next_trial()
    (sweep.folder.trial_folder(99)).mkdir()  # being created
    half = '{"number": 5, "sett'
    with open(sweep.folder.table, "a") as file:
        file.write(half)  # being written
    reader = SweepFolder(tmp_path / "sweep")
    assert number in reader.unfinished(trial.number for trial in reader.trials())
    assert sweep.folder.trial_folder(99).is_dir()
    assert sweep.folder.table.read_text().endswith(half)


@pytest.mark.parametrize("space", ["train.clip_norm = {choice=[0, 5]}", "train.em_iterations = {choice=[1, 2]}"])
def test_a_small_space_ends_when_all_its_combinations_were_tried(dataset, tmp_path, space):
    """Also where integers stand for a setting of type float."""
    sweep = open_sweep(new_plan(tmp_path, dataset, space), dataset, tmp_path / "sweep", 50)
    assert [sweep.next_trial() is None for _ in range(3)] == [False, False, True]


def test_a_space_without_possible_combinations_is_an_error(dataset, tmp_path):
    nothing = new_plan(tmp_path, dataset, "train.components = {range=[201, 2000]}")
    with pytest.raises(SettingsError, match="none of 1000 proposals is possible; the last one: train: components K"):
        open_sweep(nothing, dataset, tmp_path / "sweep").next_trial()


def test_the_last_step_must_be_validated(plan):
    settings = load_settings("omniglot-5way", ["train.steps=10", "validation.every=4"])
    with pytest.raises(SettingsError, match=r"train\.steps \(10\) is not a multiple .* set validation\.every to 2,"):
        check_validation_interval(settings)
    check_validation_interval(plan.base)
