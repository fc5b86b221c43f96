"""Proposals: within the space, the same after a resume, and TPE learns from what it is told."""

import itertools

import numpy as np
import pytest

from metagmvae.configs.dimensions import Choice, IntegerRange, LogUniform
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


def test_a_grid_is_every_combination_once_in_an_order_of_the_seed():
    space = Space("mine", (SIZE, KIND))
    drawn = [GridSearch(space, 3).draw(number) for number in range(7)]
    assert drawn[6] is None
    pairs = [tuple(values.values()) for values in drawn[:6]]
    assert sorted(pairs) == sorted(itertools.product((10, 20, 30), KIND.values))
    assert pairs != [tuple(GridSearch(space, 4).draw(number).values()) for number in range(6)]


def test_a_grid_over_infinitely_many_values_is_refused():
    with pytest.raises(SettingsError, match=r"train\.learning_rate: a grid needs a list of values"):
        GridSearch(SPACE, 0)


def test_random_draws_are_a_function_of_seed_and_number_and_fill_the_space():
    first = [RandomSearch(SPACE, 0).draw(number) for number in range(200)]
    assert first[150] == RandomSearch(SPACE, 0).draw(150)
    assert first[150] != RandomSearch(SPACE, 1).draw(150)
    rates = np.log10([values["train.learning_rate"] for values in first])
    assert rates.min() >= -4
    assert rates.max() <= -1
    counts, _ = np.histogram(rates, bins=3, range=(-4, -1))
    assert counts.min() > 45  # each decade alike: 67 expected, 45 is 3.3 deviations below
    assert {values["train.set_size"] for values in first} == {10, 20, 30}
    assert {values["model.posterior"] for values in first} == set(KIND.values)


def score(values):
    """Best at a rate of 1e-2."""
    return float(np.exp(-((np.log10(values["train.learning_rate"]) + 2) ** 2)))


def tpe_after(count, outcome):
    made = TpeSearch(SPACE, 0)
    ended = []
    for number in range(count):
        values = made.draw(number)
        made.take(number, values)
        ended.append(outcome(number, values))
        made.tell(ended[-1])
    return made, ended


def test_tpe_draws_near_what_did_well_and_away_from_what_failed():
    def outcome(number, values):
        if values["train.learning_rate"] > 3e-2:
            return trial(number, values, None, "failed")
        return trial(number, values, score(values))

    _, ended = tpe_after(40, outcome)
    late = [t.settings["train.learning_rate"] for t in ended[20:]]
    far = np.abs(np.log10(late) + 2)
    assert np.median(far) < 0.4  # 0.75 and more for random draws
    assert sum(rate > 3e-2 for rate in late) <= 3


def test_a_resumed_tpe_knows_what_the_table_says_and_what_still_runs():
    _, ended = tpe_after(30, lambda number, values: trial(number, values, score(values)))
    stopped = trial(
        30, {"train.learning_rate": 1e-4, "train.set_size": 10, "model.posterior": "diagonal"}, 0.1, "stopped", 5
    )
    running = {31: {"train.learning_rate": 9e-3, "train.set_size": 20, "model.posterior": "diagonal"}}
    again = search_method("tpe", SPACE, 0, running, [*ended, stopped])
    states = [known.state.name for known in again.study.trials]
    assert states == ["COMPLETE"] * 30 + ["PRUNED", "RUNNING"]
    assert again.study.trials[30].intermediate_values == {5: 0.1}
    assert again.study.trials[31].params == running[31]
    assert again.draw(32) == search_method("tpe", SPACE, 0, running, [*ended, stopped]).draw(32)
    again.tell(trial(31, running[31], 1.0))
    assert again.study.best_trial.params == running[31]


def test_a_draw_that_is_forgotten_is_no_lesson():
    made = TpeSearch(SPACE, 0)
    made.draw(0)
    made.forget(0)
    assert [known.state.name for known in made.study.trials] == ["FAIL"]
