"""Search methods: proposals lie in the space and are reproducible, and TPE learns from results."""

import itertools

import numpy as np
import pytest

from metagmvae.configs.dimensions import Choice, IntegerRange, LogUniform, parse_dimension
from metagmvae.configs.load import SettingsError
from metagmvae.configs.search_space import Space
from metagmvae.evaluation.sweeps.trials import CurvePoint, Trial
from metagmvae.infra.tune.search import GridSearch, RandomSearch, TpeSearch, search_method

RATE = LogUniform(name="train.learning_rate", low=1e-4, high=1e-1)
SIZE = IntegerRange(name="train.set_size", low=10, high=35, step=10)
KIND = Choice(name="model.posterior", values=("isotropic", "diagonal"))
SPACE = Space("mine", (RATE, SIZE, KIND))


def trial(number, values, accuracy=0.5, status="finished", step=10):
    curve = () if accuracy is None else (CurvePoint(step=step, accuracy=accuracy, ci95=0.1, seconds=1.0),)
    return Trial(number=number, settings=values, status=status, curve=curve)


def test_grid_search_proposes_every_combination_once_in_a_seeded_order():
    space = Space("mine", (SIZE, KIND))
    proposals = [GridSearch(space, 3).ask(number) for number in range(7)]
    assert proposals[6] is None
    pairs = [tuple(values.values()) for values in proposals[:6]]
    assert sorted(pairs) == sorted(itertools.product((10, 20, 30), KIND.values))
    assert pairs != [tuple(GridSearch(space, 4).ask(number).values()) for number in range(6)]


def test_grid_search_refuses_an_interval():
    with pytest.raises(SettingsError, match=r"train\.learning_rate: grid search needs a list of values"):
        GridSearch(SPACE, 0)


def test_a_grid_that_is_too_large_is_refused_at_once():
    big = [IntegerRange(name=name, low=0, high=high) for name, high in (("a", 3 * 10**9), ("b", 2**53))]
    for dimensions in (big[:1], big[1:], big):
        with pytest.raises(SettingsError, match=r"combinations: at most 1,000,000 are possible"):
            GridSearch(Space("mine", tuple(dimensions)), 0)
    with pytest.raises(SettingsError, match="high"):
        parse_dimension("a", {"kind": "int", "low": 0, "high": 10**30})
    assert 0 <= RandomSearch(Space("mine", tuple(big)), 0).ask(0)["a"] <= 3 * 10**9


def test_random_draws_depend_on_seed_and_number_and_cover_the_space():
    first = [RandomSearch(SPACE, 0).ask(number) for number in range(200)]
    assert first[150] == RandomSearch(SPACE, 0).ask(150)
    assert first[150] != RandomSearch(SPACE, 1).ask(150)
    rates = np.log10([values["train.learning_rate"] for values in first])
    assert rates.min() >= -4
    assert rates.max() <= -1
    counts, _ = np.histogram(rates, bins=3, range=(-4, -1))
    assert counts.min() > 45  # 67 are expected per decade; 45 is 3.3 standard deviations below
    assert {values["train.set_size"] for values in first} == {10, 20, 30}
    assert {values["model.posterior"] for values in first} == set(KIND.values)


def score(values):
    """Highest at a learning rate of 1e-2."""
    return float(np.exp(-((np.log10(values["train.learning_rate"]) + 2) ** 2)))


def tpe_after(count, result):
    method = TpeSearch(SPACE, 0)
    ended = []
    for number in range(count):
        values = method.ask(number)
        method.accept(number, values)
        ended.append(result(number, values))
        method.tell(ended[-1])
    return method, ended


def test_tpe_draws_near_good_trials_and_avoids_failed_ones():
    def result(number, values):
        if values["train.learning_rate"] > 3e-2:
            return trial(number, values, None, "failed")
        return trial(number, values, score(values))

    _, ended = tpe_after(40, result)
    late = [t.settings["train.learning_rate"] for t in ended[20:]]
    distance = np.abs(np.log10(late) + 2)
    assert np.median(distance) < 0.4  # 0.75 or more for random draws
    assert sum(rate > 3e-2 for rate in late) <= 3


def test_a_resumed_tpe_knows_ended_and_running_trials():
    _, ended = tpe_after(30, lambda number, values: trial(number, values, score(values)))
    stopped = trial(
        30, {"train.learning_rate": 1e-4, "train.set_size": 10, "model.posterior": "diagonal"}, 0.1, "stopped", 5
    )
    running = {31: {"train.learning_rate": 9e-3, "train.set_size": 20, "model.posterior": "diagonal"}}
    resumed = search_method("tpe", SPACE, 0, running, [*ended, stopped])
    states = [optuna_trial.state.name for optuna_trial in resumed.study.trials]
    assert states == ["COMPLETE"] * 30 + ["PRUNED", "RUNNING"]
    assert resumed.study.trials[30].intermediate_values == {5: 0.1}
    assert resumed.study.trials[31].params == running[31]
    assert resumed.ask(32) == search_method("tpe", SPACE, 0, running, [*ended, stopped]).ask(32)
    resumed.tell(trial(31, running[31], 1.0))
    assert resumed.study.best_trial.params == running[31]


def test_tpe_ignores_a_discarded_proposal():
    method = TpeSearch(SPACE, 0)
    method.ask(0)
    method.discard(0)
    assert [optuna_trial.state.name for optuna_trial in method.study.trials] == ["FAIL"]
