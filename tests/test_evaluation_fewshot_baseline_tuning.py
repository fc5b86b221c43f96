"""Settings of baselines: the choice on validation classes, what is recorded of it, and paired differences."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from metagmvae.evaluation.fewshot import baseline_tuning
from metagmvae.evaluation.fewshot.baseline_tuning import (
    SEED_OFFSET,
    SplitFeatures,
    baseline_trials,
    baselines_summary,
    evaluate_baselines,
)
from metagmvae.evaluation.fewshot.baselines import BASELINES, Baseline, nearest_class_mean_scores, soft_k_means
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults, write_episodes
from metagmvae.evaluation.fewshot.metrics import mean_ci95
from metagmvae.evaluation.fewshot.paired import PairingError, paired_difference, paired_with_baselines

TASK = {"way": 3, "shot": 1, "query": 4, "episodes": 40, "seed": 5}


def split(name: str, classes: int = 6, kinds: tuple[str, ...] = ("scaled", "unscaled"), noise: float = 0.7):
    rng = np.random.default_rng(len(name))
    labels = np.repeat(np.arange(classes), 8)
    x = rng.normal(0, 1, (classes, 5))[labels] + noise * rng.normal(0, 1, (len(labels), 5))
    return SplitFeatures(name, labels, {kind: torch.as_tensor(x, dtype=torch.float32) for kind in kinds})


@pytest.fixture
def calls(monkeypatch):
    """Replace the baselines by one whose accuracy is 1 / setting, and record its calls."""
    recorded = []

    def baseline(x, labels, *, setting=4.0, **task):
        recorded.append((x, labels, setting, task))
        return EpisodeResults(3, 1, 4, task["seed"], "inductive", np.full(task["episodes"], 1 / setting), 0.0)

    baseline.grid = {"setting": (4.0, 2.0, 8.0)}
    monkeypatch.setattr(baseline_tuning, "all_baselines", lambda: {"one": baseline})
    monkeypatch.setattr(baseline_tuning, "UNSCALED_BASELINES", ())
    return recorded


def test_best_candidate_on_validation_classes_is_evaluated_on_the_test_classes(calls):
    test, validation = split("test"), split("validation")
    result = evaluate_baselines(test, validation, TASK)["one"]
    *trials, last = calls
    assert [(setting, x is validation.by_kind["scaled"]) for x, _, setting, _ in trials] == [
        (4.0, True),
        (2.0, True),
        (8.0, True),
        (4.0, False),
        (2.0, False),
        (8.0, False),
    ]
    assert all(labels is validation.labels for _, labels, _, _ in trials)
    assert {task["seed"] for *_, task in trials} == {TASK["seed"] + SEED_OFFSET}
    assert (last[0] is test.by_kind["scaled"], last[1] is test.labels, last[2]) == (True, True, 2.0)
    assert last[3] == TASK
    assert result.tuning.settings == {"setting": 2.0, "features": "scaled"}
    assert (result.tuning.accuracy, result.tuning.note) == (0.5, "")
    assert result.tuning.protocol == {"split": "validation", "episodes": 40, "seed": TASK["seed"] + SEED_OFFSET}


def test_unscaled_features_are_chosen_where_they_are_better():
    test, validation = split("test"), split("validation")
    noise = torch.as_tensor(np.random.default_rng(0).normal(size=validation.by_kind["scaled"].shape)).float()
    validation.by_kind["scaled"] = noise
    results = evaluate_baselines(test, validation, TASK)
    for name in BASELINES:
        assert results[name].tuning.settings["features"] == "unscaled", name


def test_choice_agrees_with_a_direct_search():
    test, validation = split("test", kinds=("scaled",)), split("validation", kinds=("scaled",))
    result = evaluate_baselines(test, validation, TASK)["soft k-means"]
    temperatures = soft_k_means.grid["temperature"]
    task = TASK | {"seed": TASK["seed"] + SEED_OFFSET}
    accuracies = [
        soft_k_means(validation.by_kind["scaled"], validation.labels, temperature=t, **task).mean for t in temperatures
    ]
    chosen = temperatures[int(np.argmax(accuracies))]
    assert result.tuning.settings == {"temperature": chosen}
    assert [trial["accuracy"] for trial in result.tuning.trials] == accuracies
    direct = soft_k_means(test.by_kind["scaled"], test.labels, temperature=chosen, **TASK)
    np.testing.assert_array_equal(result.accuracies, direct.accuracies)


@pytest.mark.parametrize(
    ("validation", "note"),
    [
        (None, "defaults: the dataset has no validation split"),
        (split("validation", classes=2), "defaults: the split 'validation' is too small (way 3 exceeds the 2 classes"),
    ],
)
def test_defaults_with_a_note_where_no_validation_class_can_be_used(calls, validation, note):
    result = evaluate_baselines(split("test"), validation, TASK)["one"]
    assert [setting for _, _, setting, _ in calls] == [4.0]
    assert result.tuning.note.startswith(note)
    assert (result.tuning.trials, result.tuning.accuracy) == ((), None)
    assert result.tuning.settings == {"setting": 4.0, "features": "scaled"}


def test_evaluation_of_validation_classes_says_so_and_uses_other_episodes(calls):
    validation = split("validation")
    result = evaluate_baselines(validation, validation, TASK)["one"]
    assert result.tuning.note == "chosen on the evaluated classes, on other episodes"
    assert {task["seed"] for *_, task in calls} == {TASK["seed"], TASK["seed"] + SEED_OFFSET}


def test_baseline_without_a_grid_chooses_the_kind_of_features_only(monkeypatch):
    monkeypatch.setitem(BASELINES, "mine", Baseline(nearest_class_mean_scores, "inductive"))
    test, validation = split("test"), split("validation")
    mine, known = (evaluate_baselines(test, validation, TASK)[name] for name in ("mine", "nearest class mean"))
    assert mine.tuning == known.tuning
    np.testing.assert_array_equal(mine.accuracies, known.accuracies)


def with_baselines() -> EpisodeResults:
    baselines = evaluate_baselines(split("test"), split("validation"), TASK)
    accuracies = np.random.default_rng(3).random(40)
    return EpisodeResults(3, 1, 4, TASK["seed"], "transductive", accuracies, 0.0, None, baselines)


def test_summary_holds_settings_and_paired_differences_by_episode():
    result = with_baselines()
    summary = baselines_summary([result])
    assert [row["baseline"] for row in summary["baselines"]] == list(result.baselines)
    for row, pair in zip(summary["baselines"], summary["paired"], strict=True):
        baseline = result.baselines[row["baseline"]]
        assert row["validation_accuracy"] == baseline.tuning.accuracy
        assert row["settings"] == baseline.tuning.settings
        mean, ci95 = mean_ci95(result.accuracies - baseline.accuracies)
        assert (pair["difference"], pair["ci95"]) == (mean, ci95)
        assert (pair["mode"], pair["baseline_mode"]) == ("transductive", baseline.mode)
    assert len(baseline_trials([result])[1]["trials"]) == 8
    assert baselines_summary([EpisodeResults(3, 1, 4, 0, "inductive", np.ones(2), 0.0)]) == {}


def test_one_episode_gives_no_paired_difference():
    assert paired_with_baselines(EpisodeResults(3, 1, 4, 0, "inductive", np.ones(1), 0.0)) == []


def test_modes_are_paired_only_on_request():
    first, second = (EpisodeResults(3, 1, 4, 0, mode, np.ones(4), 0.0) for mode in ("transductive", "inductive"))
    with pytest.raises(PairingError, match="mode transductive and inductive"):
        paired_difference(first, second)
    assert paired_difference(first, second, any_mode=True).difference == 0


def test_episode_file_holds_all_tasks_and_the_accuracies_of_baselines(tmp_path):
    result = with_baselines()
    write_episodes(tmp_path / "e.parquet", [result, result])
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.num_rows == 80
    for name, baseline in result.baselines.items():
        np.testing.assert_array_equal(table[f"baseline: {name}"].to_numpy()[:40], baseline.accuracies)
