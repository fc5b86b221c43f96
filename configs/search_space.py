"""What a sweep searches: dotted names of settings, each with the values that it may take.

A space is a TOML file with a line for each setting:

    train.em_iterations = { choice = [1, 5, 10] }         # one of these
    train.set_size = { range = [50, 400], step = 50 }     # whole numbers, both ends included
    model.attention_scale = { choice = ["head", "model"] }
    train.clip_norm = { uniform = [0.0, 10.0] }
    train.learning_rate = { loguniform = [1e-4, 1e-2] }   # as likely in each decade
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from metagmvae.configs.load import SettingsError, flat, nearest, read_toml, settings_from_json, to_json
from metagmvae.configs.schema import Settings

Value = bool | int | float | str
Kind = Literal["choice", "int", "uniform", "loguniform"]
WRITTEN: dict[str, Kind] = {"choice": "choice", "range": "int", "uniform": "uniform", "loguniform": "loguniform"}
"""Kinds by the word that a TOML file has for them."""
FORMS = "{ choice = […] }, { range = [low, high] }, { uniform = [low, high] } or { loguniform = [low, high] }"
FIXED = {
    "name": "it decides nothing about the outcome",
    "run": "it says where a run takes place and decides nothing about its outcome",
    "tracking": "it says where a run is kept and decides nothing about its outcome",
    "data": "trials on other data cannot be compared: start a sweep for each",
    "validation": "trials judged on other episodes cannot be compared",
}
"""Sections that a sweep cannot vary, and why."""


@dataclass(frozen=True)
class Dimension:
    """The values of one setting."""

    name: str
    kind: Kind
    values: tuple[Value, ...] = ()
    """Of a choice."""
    low: float = 0.0
    high: float = 0.0
    """Both ends are included; whole numbers where `kind` is int."""
    step: int = 1

    def all_values(self) -> tuple[Value, ...] | None:
        """Every value in order; None where there are infinitely many."""
        if self.kind == "int":
            return tuple(range(int(self.low), int(self.high) + 1, self.step))
        return self.values if self.kind == "choice" else None

    def ends(self) -> tuple[Value, ...]:
        """Values that must be of the setting's type and in its bounds, for all between them to be so."""
        if self.kind in ("uniform", "loguniform"):
            # The one between them is no whole number, so a setting of whole numbers is found out.
            return (self.low, self.low + (self.high - self.low) / math.pi, self.high)
        return self.values or (int(self.low), int(self.high))

    def described(self) -> dict[str, Any]:
        """As `sweep.json` has it."""
        if self.kind == "choice":
            return {"kind": self.kind, "values": list(self.values)}
        step = {"step": self.step} if self.kind == "int" else {}
        return {"kind": self.kind, "low": self.low, "high": self.high, **step}


@dataclass(frozen=True)
class Space:
    """Settings that a sweep varies, in the order of the file."""

    name: str
    dimensions: tuple[Dimension, ...]

    def described(self) -> dict[str, Any]:
        return {dimension.name: dimension.described() for dimension in self.dimensions}

    def chosen(self, settings: Settings) -> dict[str, Value]:
        """The values that some settings have for what the space varies."""
        tree = dict(flat(json.loads(to_json(settings))))
        return {dimension.name: tree[dimension.name] for dimension in self.dimensions}


def load_space(space: str | Path) -> Space:
    """Read a space from a TOML file, or a bundled one by its name.

    Raises:
        SettingsError: the file, a name, a kind or a value is wrong.
    """
    path = Path(space)
    names = spaces()
    if not path.is_file() and str(space) not in names:
        hint = nearest(str(space), names)
        raise SettingsError(f"{space}: no such TOML file, and not one of the spaces {', '.join(names)}{hint}")
    file = path if path.is_file() else resources.files("metagmvae.configs").joinpath("spaces", f"{space}.toml")
    dimensions = tuple(_dimension(key, value) for key, value in _leaves(read_toml(file)))
    if not dimensions:
        raise SettingsError(f"{space}: varies nothing; give a line for each setting, section.key = {FORMS}")
    return Space(path.stem if path.is_file() else str(space), dimensions)


def spaces() -> list[str]:
    """Names of the bundled spaces."""
    files = resources.files("metagmvae.configs").joinpath("spaces").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def with_values(base: Settings, values: Mapping[str, Value]) -> Settings:
    """Settings with some values in their places, validated like any others.

    Raises:
        SettingsError: the combination is impossible.
    """
    tree = json.loads(to_json(base))
    for key, value in values.items():
        _put(tree, key, value)
    return settings_from_json(json.dumps(tree))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what they are to be, whether written as tables or with dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and not WRITTEN.keys() & value.keys() and _is_section(f"{prefix}{key}"):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_section(name: str) -> bool:
    return any(key.startswith(f"{name}.") for key in _known())


def _known() -> list[str]:
    return [key for key, _ in flat(json.loads(to_json(Settings())))]


def _dimension(key: str, written: Any) -> Dimension:
    section = key.partition(".")[0]
    if section in FIXED and (key in _known() or key == section):
        raise SettingsError(f"{key}: a sweep cannot vary it, {FIXED[section]}; give it with --set")
    if key not in _known():
        raise SettingsError(f"{key}: no such setting{_meant(key)}")
    if not isinstance(written, Mapping) or len(WRITTEN.keys() & written.keys()) != 1:
        raise SettingsError(f"{key} = {json.dumps(written, default=str)}: write it as {FORMS}")
    (word,) = WRITTEN.keys() & written.keys()
    strange = sorted(written.keys() - {word, *(["step"] if word == "range" else [])})
    if strange:
        raise SettingsError(f"{key}: {strange[0]!r} does not go with {word}; write it as {FORMS}")
    made = _choice(key, written[word]) if word == "choice" else _interval(key, word, written)
    for value in made.ends():
        _fits(key, value)
    return made


def _meant(key: str) -> str:
    hint = nearest(key, _known())
    # The list of all that there are would be a long line.
    return hint if "did you mean" in hint else "; they are named section.key, as train.learning_rate is"


def _choice(key: str, values: Any) -> Dimension:
    if not isinstance(values, list) or not values:
        raise SettingsError(f"{key}: choice = {json.dumps(values, default=str)} offers nothing; give a list of values")
    for value in values:
        if not isinstance(value, Value):
            raise SettingsError(f"{key}: {json.dumps(value, default=str)} is no number, text or boolean")
    # 1 and 1.0 are one value of a setting; true, which equals them in Python, is another.
    if len({(isinstance(value, bool), value) for value in values}) < len(values):
        raise SettingsError(f"{key}: choice = {json.dumps(values)} names a value twice")
    return Dimension(key, "choice", values=tuple(values))


def _interval(key: str, word: str, written: Mapping[str, Any]) -> Dimension:
    """A range, uniform or loguniform."""
    ends, step, whole = written[word], written.get("step", 1), word == "range"
    shown = f"{key}: {word} = {json.dumps(ends, default=str)}"
    if not isinstance(ends, list) or len(ends) != 2 or not all(_is_number(end) for end in ends):
        raise SettingsError(f"{shown}: give two numbers, [low, high]")
    low, high = ends
    if whole and not all(isinstance(number, int) and not isinstance(number, bool) for number in (low, high, step)):
        raise SettingsError(f"{shown} (step {step}): a range is of whole numbers; use uniform or loguniform")
    if low >= high:
        raise SettingsError(f"{shown} is empty: the first number must be the smaller one")
    if whole and step < 1:
        raise SettingsError(f"{key}: step = {step}; give 1 or more")
    if word == "loguniform" and low <= 0:
        raise SettingsError(f"{shown} goes through zero, which no logarithm does: begin above 0, or use uniform")
    return Dimension(key, WRITTEN[word], low=low, high=high, step=step)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fits(key: str, value: Value) -> None:
    """Whether the setting can take the value, whatever the others are."""
    tree: dict[str, Any] = {}
    _put(tree, key, value)
    try:
        Settings.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        path = tuple(key.split("."))
        for mistake in error.errors():
            if mistake["loc"][: len(path)] == path:
                raise SettingsError(f"{key}: {json.dumps(value)}: {mistake['msg'].lower()}") from error


def _put(tree: dict[str, Any], key: str, value: Value) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value
