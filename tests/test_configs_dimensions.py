"""Dimensions of a search space: positions on the scale, ticks, descriptions, one-line errors."""

import pytest

from metagmvae.configs.dimensions import Choice, IntegerRange, LogUniform, Uniform, parse_dimension
from metagmvae.configs.load import SettingsError

RATE = LogUniform(name="train.learning_rate", low=1e-4, high=1e-2)
DIMENSIONS = [
    Choice(name="a", values=(1, True, "x")),
    IntegerRange(name="b", low=50, high=120, step=50),
    Uniform(name="c", low=-1, high=3),
    RATE,
]


def test_positions_on_the_scale():
    choice, integers, uniform, _ = DIMENSIONS
    assert [RATE.position(value) for value in (1e-4, 1e-3, 1e-2)] == pytest.approx([0, 0.5, 1])
    assert [uniform.position(value) for value in (-1, 0, 3)] == [0, 0.25, 1]
    assert [choice.position(value) for value in (1, True, "x")] == pytest.approx([1 / 6, 0.5, 5 / 6])
    assert choice.position(1.0) == choice.position(1)
    assert [integers.position(value) for value in (50, 100)] == [0.25, 0.75]


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=lambda d: d.kind)
def test_value_at_is_the_inverse_of_position(dimension):
    for value in dimension.levels or (dimension.low, 0.5 * (dimension.low + dimension.high), dimension.high):
        assert dimension.value_at(dimension.position(value)) == pytest.approx(value)
    assert dimension.value_at(1.0) == pytest.approx(dimension.levels[-1] if dimension.levels else dimension.high)


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=lambda d: d.kind)
def test_a_description_is_read_back(dimension):
    description = dimension.to_dict()
    assert description["kind"] == dimension.kind
    assert "name" not in description
    assert parse_dimension(dimension.name, description) == dimension


def test_values_outside_the_space_are_refused():
    for dimension, value in zip(DIMENSIONS, ("y", 75, 3.5, "1e-3"), strict=True):
        with pytest.raises(SettingsError, match=f"{dimension.name}: {value!r} is not in the space"):
            dimension.position(value)


def test_ticks():
    assert RATE.ticks() == (pytest.approx([0, 0.5, 1]), ["0.0001", "0.001", "0.01"])
    assert Uniform(name="a", low=0, high=1).ticks() == ([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    assert LogUniform(name="a", low=1e-9, high=1).ticks()[1] == ["1e-09", "1e-07", "1e-05", "0.001", "0.1"]
    assert IntegerRange(name="a", low=1, high=100).ticks()[1] == ["1", "21", "41", "60", "80", "100"]
    assert Choice(name="a", values=("only",)).ticks() == ([0.5], ["only"])


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ({"kind": "normal"}, "kind must be one of choice, int, uniform, loguniform"),
        ({"kind": []}, "kind must be one of"),
        ([], "kind must be one of"),
        ({"kind": "int", "low": 1}, "a: high is missing"),
        ({"kind": "choice", "values": []}, "has no values"),
        ({"kind": "uniform", "low": 1, "high": 1}, r"low \(1\) must be less than high \(1\)"),
        ({"kind": "uniform", "low": "0", "high": 1}, 'low = "0": input should be a valid number'),
    ],
)
def test_wrong_descriptions_give_one_error_line(description, reason):
    with pytest.raises(SettingsError, match=reason) as error:
        parse_dimension("a", description)
    assert "\n" not in str(error.value)
