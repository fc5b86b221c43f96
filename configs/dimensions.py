"""One setting that a sweep varies: its possible values and its scale from 0 to 1.

A search draws uniformly on the scale, and reports group and plot trials on it.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from metagmvae.configs.credentials import redact
from metagmvae.configs.load import SettingsError, mistake_text

Value = bool | int | float | str
Number = Annotated[float, Field(allow_inf_nan=False)]
MAX_LISTED = 12
"""A setting with at most this many values is shown value by value; one with more is shown in parts of its scale."""


class Dimension(BaseModel, ABC):
    """A setting and its possible values. The subclasses are the kinds of a space file and of `sweep.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    """Dotted key of the setting."""
    kind: str

    @property
    def short_name(self) -> str:
        """Key without its section."""
        return self.name.rpartition(".")[2]

    @property
    def levels(self) -> Sequence[Value]:
        """All values in order, each an equal part of the scale; empty for a real interval."""
        return ()

    @property
    def is_listed(self) -> bool:
        """Whether tables and plots show it value by value."""
        return 0 < len(self.levels) <= MAX_LISTED

    @abstractmethod
    def position(self, value: Value) -> float:
        """Position of a value on the scale, in [0, 1]; a level stands in the middle of its part.

        Raises:
            SettingsError: the value is not in the space.
        """

    @abstractmethod
    def value_at(self, position: float) -> Value:
        """The value at a position in [0, 1]: a number, or the level whose part contains the position."""

    @abstractmethod
    def ticks(self) -> tuple[list[float], list[str]]:
        """Positions and labels of the ticks of a plot axis."""

    @abstractmethod
    def boundary_values(self) -> tuple[Value, ...]:
        """Values that the setting accepts only if it accepts all values of the dimension."""

    def to_dict(self) -> dict[str, Any]:
        """The entry under `name` in `sweep.json`; `parse_dimension` reads it."""
        return self.model_dump(mode="json", exclude={"name"})

    def _outside(self, value: Value) -> SettingsError:
        return SettingsError(f"{self.name}: {value!r} is not in the space")


class _Levels(Dimension):
    """Base of the kinds with finitely many values."""

    @abstractmethod
    def _index(self, value: Value) -> int | None:
        """Index of a value in `levels`; None if it is not there."""

    def position(self, value: Value) -> float:
        index = self._index(value)
        if index is None:
            raise self._outside(value)
        return (index + 0.5) / len(self.levels)

    def value_at(self, position: float) -> Value:
        return self.levels[min(int(position * len(self.levels)), len(self.levels) - 1)]

    def ticks(self) -> tuple[list[float], list[str]]:
        last = len(self.levels) - 1
        count = last + 1 if self.is_listed else 6
        indices = [round(last * tick / max(count - 1, 1)) for tick in range(count)]
        labels = [format_value(self.levels[index]) for index in indices]
        return [(index + 0.5) / len(self.levels) for index in indices], labels


class Choice(_Levels):
    """One of a list of values."""

    kind: Literal["choice"] = "choice"
    values: tuple[Value, ...]

    @field_validator("values", mode="before")
    @classmethod
    def _check_values(cls, values: Any) -> tuple[Value, ...]:
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"{_json(values)} has no values; give a list of values")
        for value in values:
            if not isinstance(value, Value):
                raise ValueError(f"{_json(value)} is not a number, string or boolean")
            if isinstance(value, str) and redact(value) != value:
                raise ValueError("a search space is stored with the sweep and must not hold a password")
        # 1 and 1.0 are the same value of a setting, but true, which equals them in Python, is not.
        if len({(isinstance(value, bool), value) for value in values}) < len(values):
            raise ValueError(f"{_json(values)} contains a value twice")
        return tuple(values)

    @property
    def levels(self) -> Sequence[Value]:
        return self.values

    def _index(self, value: Value) -> int | None:
        for index, level in enumerate(self.values):
            if level == value and isinstance(level, bool) == isinstance(value, bool):
                return index
        return None

    def boundary_values(self) -> tuple[Value, ...]:
        return self.values


class IntegerRange(_Levels):
    """Integers low, low + step, … up to high."""

    kind: Literal["int"] = "int"
    low: int = Field(ge=-(2**53), le=2**53)
    high: int = Field(ge=-(2**53), le=2**53)
    step: int = Field(1, gt=0, le=2**53)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        _check_order(self.low, self.high)
        return self

    @property
    def levels(self) -> range:
        return range(self.low, self.high + 1, self.step)

    def _index(self, value: Value) -> int | None:
        return self.levels.index(int(value)) if not isinstance(value, str) and value in self.levels else None

    def boundary_values(self) -> tuple[Value, ...]:
        return (self.low, self.high)


class _Interval(Dimension):
    """Base of the real intervals; both ends are included."""

    low: Number
    high: Number

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        _check_order(self.low, self.high)
        return self

    def position(self, value: Value) -> float:
        if isinstance(value, str) or not self.low <= value <= self.high:
            raise self._outside(value)
        return self._position(float(value))

    @abstractmethod
    def _position(self, value: float) -> float:
        """Position of a number within the interval."""

    @abstractmethod
    def value_at(self, position: float) -> float:
        """The number at a position in [0, 1]."""

    def ticks(self) -> tuple[list[float], list[str]]:
        positions = self._tick_positions()
        return positions, [format_value(self.value_at(position)) for position in positions]

    def _tick_positions(self) -> list[float]:
        return [0.0, 0.25, 0.5, 0.75, 1.0]

    def boundary_values(self) -> tuple[Value, ...]:
        # The value between the ends is not an integer, so a setting that takes only integers is detected.
        return (self.low, self.low + (self.high - self.low) / math.pi, self.high)


class Uniform(_Interval):
    """A real number, uniform between low and high."""

    kind: Literal["uniform"] = "uniform"

    def _position(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def value_at(self, position: float) -> float:
        return self.low + position * (self.high - self.low)


class LogUniform(_Interval):
    """A positive real number whose logarithm is uniform: every decade is equally likely."""

    kind: Literal["loguniform"] = "loguniform"

    @model_validator(mode="after")
    def _check_positive(self) -> Self:
        if self.low <= 0:
            raise ValueError(f"low ({self.low:g}) of loguniform must be greater than 0; or use uniform")
        return self

    def _position(self, value: float) -> float:
        return math.log(value / self.low) / math.log(self.high / self.low)

    def value_at(self, position: float) -> float:
        return self.low * (self.high / self.low) ** position

    def _tick_positions(self) -> list[float]:
        powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        if len(powers) < 3:
            return super()._tick_positions()
        every = math.ceil(len(powers) / 6)
        return [self._position(min(max(10.0**power, self.low), self.high)) for power in powers][::every]


KINDS: dict[str, type[Dimension]] = {
    "choice": Choice,
    "int": IntegerRange,
    "uniform": Uniform,
    "loguniform": LogUniform,
}


def parse_dimension(name: str, description: Any) -> Dimension:
    """Read a dimension from its entry in `sweep.json`, for example `{"kind": "uniform", "low": 0, "high": 1}`.

    Raises:
        SettingsError: the kind or a value is wrong.
    """
    kind = description.get("kind") if isinstance(description, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise SettingsError(f"{name} = {_json(description)}: kind must be one of {', '.join(KINDS)}")
    try:
        return KINDS[kind].model_validate({**description, "name": name})
    except ValidationError as error:
        raise SettingsError(f"{name}: {mistake_text(error.errors()[0])}") from error


def format_value(value: Value) -> str:
    """A value for tables and plots: real numbers with three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _check_order(low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"low ({low:g}) must be less than high ({high:g})")


def _json(value: Any) -> str:
    return json.dumps(value, default=str)
