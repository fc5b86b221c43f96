"""Functional ANOVA against literal sums, Optuna's, and sweeps whose truth is known."""

import itertools

import numpy as np
import optuna
import pytest
from sklearn.tree import DecisionTreeRegressor

from metagmvae.evaluation.sweeps import importance
from metagmvae.evaluation.sweeps.importance import importance_of
from metagmvae.evaluation.sweeps.partition_tree import PartitionTree
from metagmvae.evaluation.sweeps.ranking import TrialsAtStep, trials_at_common_step
from metagmvae.evaluation.sweeps.record import Axis, SweepRecord, axes_of
from metagmvae.evaluation.sweeps.simulation import SPACE, Simulated, simulate
from metagmvae.evaluation.sweeps.trials import CurvePoint, Trial


def sweep_of(axes, places, accuracy) -> tuple[SweepRecord, TrialsAtStep]:
    """A sweep of finished trials over real axes from 0 to 1, or over the levels of a listed one."""
    trials = tuple(
        Trial(
            number=number,
            settings={
                axis.name: axis.levels[int(u * len(axis.levels))] if axis.levels else float(u)
                for axis, u in zip(axes, row, strict=True)
            },
            status="finished",
            curve=(CurvePoint(step=10, accuracy=float(a), ci95=0.01, seconds=1.0),),
        )
        for number, (row, a) in enumerate(zip(places, accuracy, strict=True))
    )
    sweep = SweepRecord("known", "5w1s", tuple(axes), trials)
    return sweep, trials_at_common_step(trials)


def shares(found):
    return {share.names[0]: share.importance for share in found.settings}


@pytest.fixture
def quick(monkeypatch):
    """Few shuffles, where chance is not what is tested."""
    monkeypatch.setattr(importance, "SHUFFLES", 1)


def test_marginals_are_those_of_a_literal_sum_over_the_whole_grid():
    """Two real axes and one of four levels, of which a node may not have seen every one."""
    rng = np.random.default_rng(0)
    levels = [0, 4, 0]
    places = rng.random((60, 3))
    places[:, 1] = (np.floor(places[:, 1] * 4) + 0.5) / 4
    values = np.sin(5 * places[:, 0]) + places[:, 1] * places[:, 2] + rng.normal(0, 0.1, 60)
    fitted = DecisionTreeRegressor(min_samples_leaf=2, random_state=0).fit(places, values)
    tree = PartitionTree(fitted.tree_, levels)

    edges = []
    for j in range(3):
        cuts = fitted.tree_.threshold[fitted.tree_.feature == j]
        edges.append(np.unique([0.0, 1.0, *(np.arange(5) / 4 if levels[j] else cuts)]))
    middles = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    widths = [np.diff(edge) for edge in edges]
    cells = list(itertools.product(*(range(len(middle)) for middle in middles)))
    predicted = fitted.predict([[middles[j][cell[j]] for j in range(3)] for cell in cells])
    volume = [float(np.prod([widths[j][cell[j]] for j in range(3)])) for cell in cells]
    mean = sum(v * p for v, p in zip(volume, predicted, strict=True))
    assert sum(volume) == pytest.approx(1.0)
    assert tree.mean == pytest.approx(mean)
    assert tree.variance == pytest.approx(sum(v * (p - mean) ** 2 for v, p in zip(volume, predicted, strict=True)))

    def literal(*axes):
        """Variance of the mean over all other axes."""
        marginal, weight = {}, {}
        for cell, v, p in zip(cells, volume, predicted, strict=True):
            key = tuple(cell[j] for j in axes)
            marginal[key] = marginal.get(key, 0.0) + v * p
            weight[key] = weight.get(key, 0.0) + v
        return sum(weight[key] * (marginal[key] / weight[key] - mean) ** 2 for key in marginal)

    for j in range(3):
        assert tree.variance_of(j) == pytest.approx(literal(j))
    for i, j in itertools.combinations(range(3), 2):
        both = literal(i, j) - literal(i) - literal(j)
        assert tree.variance_of_pair(i, j) == pytest.approx(max(0.0, both), abs=1e-12)


def test_a_sum_has_the_importance_that_follows_from_its_weights_and_no_interactions(quick):
    rng = np.random.default_rng(1)
    axes = [Axis(name, "uniform") for name in ("a", "b", "inert")]
    places = rng.random((600, 3))
    found = importance_of(*sweep_of(axes, places, 0.2 + 0.4 * places[:, 0] + 0.2 * places[:, 1]))
    assert shares(found)["a"] == pytest.approx(0.8, abs=0.02)  # 0.4² of 0.4² + 0.2²
    assert shares(found)["b"] == pytest.approx(0.2, abs=0.02)
    assert shares(found)["inert"] < 0.002
    assert max(pair.importance for pair in found.pairs) < 0.02
    assert found.explained > 0.95


def test_what_two_settings_do_together_is_an_interaction(quick):
    rng = np.random.default_rng(2)
    axes = [Axis("a", "choice", (1, 2)), Axis("b", "choice", ("x", "y")), Axis("c", "uniform")]
    places = rng.random((300, 3))
    found = importance_of(*sweep_of(axes, places, 0.5 + 0.1 * ((places[:, 0] > 0.5) & (places[:, 1] > 0.5))))
    # One quarter of the space is better: a third of the variance each is of a, of b, and of both together.
    assert shares(found) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 0.0}, abs=0.03)
    assert found.pairs[0].names == ("a", "b")
    assert found.pairs[0].importance == pytest.approx(1 / 3, abs=0.03)
    assert max(pair.importance for pair in found.pairs[1:]) < 0.01


def test_it_agrees_with_optuna_on_the_same_trials(quick, monkeypatch):
    monkeypatch.setattr(importance, "LEAF", 1)  # as Optuna's forest has it
    monkeypatch.setattr(importance, "MOST_LEAVES", None)
    trials = simulate(Simulated(trials=120, asha=False))
    sweep = SweepRecord("s", "5w1s", axes_of(SPACE), tuple(trials))
    ours = shares(importance_of(sweep, trials_at_common_step(trials)))
    study = optuna.create_study(direction="maximize")
    distributions = {
        "train.learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "train.em_iterations": optuna.distributions.IntDistribution(1, 20),
    } | {
        name: optuna.distributions.CategoricalDistribution(about["values"])
        for name, about in SPACE.items()
        if about["kind"] == "choice"
    }
    for trial in trials:
        made = {"params": dict(trial.settings), "distributions": distributions}
        study.add_trial(optuna.trial.create_trial(value=trial.curve[-1].accuracy, **made))
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=100, seed=0)
    theirs = evaluator.evaluate(study)
    assert ours.keys() == theirs.keys()
    for name, share in theirs.items():
        # Optuna gives each category a column of its own, we one column to all of a setting.
        assert ours[name] == pytest.approx(share, abs=0.06), name
    assert max(ours, key=ours.__getitem__) == max(theirs, key=theirs.__getitem__) == "train.learning_rate"


@pytest.mark.parametrize("asha", [False, True])
def test_what_matters_comes_out_on_top_and_beats_chance_and_what_is_inert_does_not(asha):
    trials = simulate(Simulated(trials=150, asha=asha, failing=0.05, seed=3))
    if asha:
        assert sum(trial.status == "stopped" for trial in trials) > 75
    sweep = SweepRecord("s", "5w1s", axes_of(SPACE), tuple(trials))
    found = importance_of(sweep, trials_at_common_step(trials))
    first, second = found.settings[:2]
    assert (first.names, second.names) == (("train.learning_rate",), ("train.set_size",))
    assert first.importance > 0.6 > 0.2 > second.importance
    assert first.matters
    assert second.matters
    for share in found.settings:
        assert share.low <= share.importance <= share.high
    inert = found.settings[2:]
    assert all(share.importance < 0.03 for share in inert)
    assert not any(share.matters for share in inert)


def test_early_stops_do_not_bias_it_as_the_newest_accuracy_would(quick):
    """Whoever was stopped has less accuracy for want of budget: judged by that, nothing but the cut is explained."""
    whole, stopped = (simulate(Simulated(trials=300, asha=asha, noise=0.0, seed=5)) for asha in (False, True))
    truth = shares(importance_of(SweepRecord("s", "t", axes_of(SPACE), tuple(whole)), trials_at_common_step(whole)))
    sweep = SweepRecord("s", "t", axes_of(SPACE), tuple(stopped))
    judged = trials_at_common_step(stopped)
    assert (judged.step, len(judged.trials)) == (100, 300)
    newest = TrialsAtStep(0, judged.trials, np.array([t.curve[-1].accuracy for t in judged.trials]), judged.ci95, 0)
    ours, naive = shares(importance_of(sweep, judged)), shares(importance_of(sweep, newest))
    # The curves rise alike, so the truth at the first rung is that at the end.
    error, naive_error = (sum(abs(found[name] - truth[name]) for name in truth) for found in (ours, naive))
    assert error < 0.05
    assert naive_error > 4 * error


def test_too_few_trials_say_so_and_equal_ones_too():
    rng = np.random.default_rng(0)
    axes = [Axis(name, "uniform") for name in "abcdef"]
    few = importance_of(*sweep_of(axes, rng.random((23, 6)), rng.random(23)))
    assert few.too_few == "too few trials: 23 with an accuracy, and 24 are needed for 6 settings"
    assert few.settings == ()
    equal = importance_of(*sweep_of(axes, rng.random((30, 6)), np.full(30, 0.2)))
    assert "same accuracy" in equal.too_few
    none = importance_of(SweepRecord("s", "t", tuple(axes), ()), trials_at_common_step([]))
    assert none.too_few.startswith("too few trials: 0 ")


def test_noise_alone_explains_nothing():
    rng = np.random.default_rng(4)
    axes = [Axis(name, "uniform") for name in "abcd"]
    found = importance_of(*sweep_of(axes, rng.random((80, 4)), rng.normal(0.5, 0.1, 80)))
    assert found.explained < 0.1
    assert sum(share.matters for share in found.settings) <= 1
