"""Importance of settings: functions whose fractions of variance are known, and sweeps whose effects are known."""

import numpy as np
import pytest
from known_sweep import known_trials, record_of

from metagmvae.configs.dimensions import Choice, Uniform
from metagmvae.evaluation.sweeps import importance
from metagmvae.evaluation.sweeps.importance import compute_importance
from metagmvae.evaluation.sweeps.ranking import TrialsAtStep, trials_at_common_step
from metagmvae.evaluation.sweeps.record import SweepRecord
from metagmvae.evaluation.sweeps.trials import CurvePoint, Trial


def sweep_of(dimensions, positions, accuracy) -> tuple[SweepRecord, TrialsAtStep]:
    """A sweep of finished trials at given positions on the unit cube."""
    trials = tuple(
        Trial(
            number=number,
            settings={d.name: d.value_at(u) for d, u in zip(dimensions, row, strict=True)},
            status="finished",
            curve=(CurvePoint(step=10, accuracy=float(a), ci95=0.01, seconds=1.0),),
        )
        for number, (row, a) in enumerate(zip(positions, accuracy, strict=True))
    )
    return SweepRecord("known", "5w1s", tuple(dimensions), trials), trials_at_common_step(trials)


def uniform(names):
    return [Uniform(name=name, low=0, high=1) for name in names]


def fractions(result):
    return {setting.name: setting.importance for setting in result.settings}


@pytest.fixture
def few_shuffles(monkeypatch):
    """For tests that do not depend on chance."""
    monkeypatch.setattr(importance, "SHUFFLES", 1)


def test_importance_of_a_sum_follows_from_its_weights(few_shuffles):
    rng = np.random.default_rng(1)
    positions = rng.random((400, 3))
    result = compute_importance(
        *sweep_of(uniform(("a", "b", "inert")), positions, 0.2 + 0.4 * positions[:, 0] + 0.2 * positions[:, 1])
    )
    # Variance of w * u is w² / 12: 0.4² and 0.2² of their sum.
    assert fractions(result) == pytest.approx({"a": 0.8, "b": 0.2, "inert": 0.0}, abs=0.03)
    assert result.explained > 0.95


def test_an_interaction_counts_for_neither_setting_alone(few_shuffles):
    rng = np.random.default_rng(2)
    dimensions = [Choice(name="a", values=(1, 2)), Choice(name="b", values=("x", "y")), *uniform("c")]
    positions = rng.random((300, 3))
    high = (positions[:, 0] > 0.5) & (positions[:, 1] > 0.5)
    result = compute_importance(*sweep_of(dimensions, positions, 0.5 + 0.1 * high))
    # A quarter of the space is better: a third of the variance each is due to a, to b, and to their interaction.
    assert fractions(result) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 0.0}, abs=0.04)


@pytest.mark.parametrize("halving", [False, True])
def test_settings_with_an_effect_exceed_chance_and_inert_ones_do_not(halving):
    trials = known_trials(120, halving=halving, fail_every=20, seed=3)
    result = compute_importance(record_of(trials), trials_at_common_step(trials))
    first, second, *inert = result.settings
    assert (first.name, second.name) == ("train.learning_rate", "train.set_size")
    assert first.importance > 0.6 > 0.2 > second.importance
    assert first.matters
    assert second.matters
    for setting in result.settings:
        assert setting.low <= setting.importance <= setting.high
    assert all(setting.importance < 0.03 for setting in inert)
    assert not any(setting.matters for setting in inert)


def test_early_stopping_does_not_bias_importance(few_shuffles):
    """The accuracy at which a trial was stopped depends on its budget. Importance uses equal budgets instead."""
    complete, halved = (known_trials(200, halving=halving, noise=0.0, seed=5) for halving in (False, True))
    truth = fractions(compute_importance(record_of(complete), trials_at_common_step(complete)))
    compared = trials_at_common_step(halved)
    assert (compared.step, len(compared.trials)) == (100, 200)
    latest = np.array([trial.curve[-1].accuracy for trial in compared.trials])
    naive = fractions(compute_importance(record_of(halved), TrialsAtStep(0, compared.trials, latest, compared.ci95, 0)))
    ours = fractions(compute_importance(record_of(halved), compared))
    # All curves have the same shape, so importance at step 100 equals importance at the end.
    error, naive_error = (sum(abs(result[name] - truth[name]) for name in truth) for result in (ours, naive))
    assert error < 0.05
    assert naive_error > 4 * error


def test_too_few_or_equal_trials_give_a_reason():
    rng = np.random.default_rng(0)
    dimensions = uniform("abcdef")
    few = compute_importance(*sweep_of(dimensions, rng.random((23, 6)), rng.random(23)))
    assert few.too_few == "too few trials: 23 have an accuracy, 24 are needed for 6 settings"
    assert few.settings == ()
    equal = compute_importance(*sweep_of(dimensions, rng.random((30, 6)), np.full(30, 0.2)))
    assert "same accuracy" in equal.too_few
    none = compute_importance(SweepRecord("s", "t", tuple(dimensions), ()), trials_at_common_step([]))
    assert none.too_few.startswith("too few trials: 0 ")


def test_one_differing_trial_among_equal_ones_is_no_error(few_shuffles):
    """Many bootstrap samples then contain only equal accuracies, and their trees have no variance."""
    accuracy = np.full(20, 0.2)
    accuracy[7] = 0.5
    result = compute_importance(*sweep_of(uniform("ab"), np.random.default_rng(0).random((20, 2)), accuracy))
    assert result.too_few == ""
    assert all(0 <= setting.importance <= 1 for setting in result.settings)


def test_noise_explains_nothing():
    rng = np.random.default_rng(4)
    result = compute_importance(*sweep_of(uniform("abcd"), rng.random((80, 4)), rng.normal(0.5, 0.1, 80)))
    assert result.explained < 0.1
    assert sum(setting.matters for setting in result.settings) <= 1


def test_the_result_is_reproducible_and_names_its_evaluator(few_shuffles):
    trials = known_trials(40)
    results = [compute_importance(record_of(trials), trials_at_common_step(trials)).summary() for _ in range(2)]
    assert results[0] == results[1]
    assert results[0]["evaluator"] == "optuna.importance.FanovaImportanceEvaluator"
    assert list(results[0]["settings"][0]) == ["names", "importance", "low", "high", "chance", "matters"]
