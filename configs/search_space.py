"""Search space of a sweep: dotted keys of settings, each with its possible values.

A space is a TOML file with one line for each setting:

    train.em_iterations = { choice = [1, 5, 10] }         # one of these values
    train.set_size = { range = [50, 400], step = 50 }     # integers, both ends included
    model.attention_scale = { choice = ["head", "model"] }
    train.clip_norm = { uniform = [0.0, 10.0] }           # real numbers
    train.learning_rate = { loguniform = [1e-4, 1e-2] }   # real numbers; every decade is equally likely
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from metagmvae.configs.dimensions import Dimension, IntegerRange, Value, parse_dimension
from metagmvae.configs.load import (
    SettingsError,
    flatten,
    is_option,
    read_toml,
    setting_keys,
    settings_from_json,
    to_json,
)
from metagmvae.configs.schema import Settings
from metagmvae.configs.suggestions import setting_suggestion, suggestion

KIND_BY_WORD = {"choice": "choice", "range": "int", "uniform": "uniform", "loguniform": "loguniform"}
"""Kind of a dimension by the word that a TOML file uses for it."""
FORMS = "{ choice = […] }, { range = [low, high] }, { uniform = [low, high] } or { loguniform = [low, high] }"
NOT_SEARCHABLE = {
    "name": "it has no effect on the result",
    "run": "it only sets where a run takes place",
    "tracking": "it only sets where a run is recorded",
    "data": "trials on different data cannot be compared; start one sweep for each dataset",
    "validation": "trials evaluated on different episodes cannot be compared",
}
"""Sections that a sweep cannot vary, and the reason."""


@dataclass(frozen=True)
class Space:
    """The settings that a sweep varies, in the order of the file."""

    name: str
    dimensions: tuple[Dimension, ...]

    def to_dict(self) -> dict[str, Any]:
        """The space as `sweep.json` stores it: descriptions of the dimensions by dotted key."""
        return {dimension.name: dimension.to_dict() for dimension in self.dimensions}

    def values_of(self, settings: Settings) -> dict[str, Value]:
        """The values of the searched keys in given settings."""
        tree = dict(flatten(json.loads(to_json(settings))))
        return {dimension.name: tree[dimension.name] for dimension in self.dimensions}


def load_space(space: str | Path) -> Space:
    """Read a space from a TOML file, or a bundled space by its name.

    Raises:
        SettingsError: the file, a key, a kind or a value is wrong.
    """
    path = Path(space)
    names = spaces()
    if not path.is_file() and str(space) not in names:
        hint = suggestion(str(space), names)
        raise SettingsError(f"{space}: no such TOML file and no bundled space of that name{hint}")
    file = path if path.is_file() else resources.files("metagmvae.configs").joinpath("spaces", f"{space}.toml")
    dimensions = tuple(_dimension(key, entry) for key, entry in _entries(read_toml(file)))
    if not dimensions:
        raise SettingsError(f"{space}: has no settings; write one line for each, section.key = {FORMS}")
    return Space(path.stem if path.is_file() else str(space), dimensions)


def spaces() -> list[str]:
    """Names of the bundled spaces."""
    files = resources.files("metagmvae.configs").joinpath("spaces").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def with_values(base: Settings, values: Mapping[str, Value]) -> Settings:
    """Copy of the settings with some values replaced, validated.

    Raises:
        SettingsError: the combination of values is impossible.
    """
    tree = json.loads(to_json(base))
    for key, value in values.items():
        _set(tree, key, value)
    return settings_from_json(json.dumps(tree))


def _entries(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their entries, written in TOML as tables or with dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and not KIND_BY_WORD.keys() & value.keys() and _is_section(f"{prefix}{key}"):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_section(name: str) -> bool:
    return is_option(f"{name}.any") or any(key.startswith(f"{name}.") for key in setting_keys())


def _dimension(key: str, entry: Any) -> Dimension:
    section = key.partition(".")[0]
    if section in NOT_SEARCHABLE and (key in setting_keys() or key == section):
        raise SettingsError(f"{key}: a sweep cannot vary it, because {NOT_SEARCHABLE[section]}; set it with --set")
    words = KIND_BY_WORD.keys() & entry.keys() if isinstance(entry, Mapping) else set()
    if key not in setting_keys() and not is_option(key):
        if isinstance(entry, Mapping) and entry and not words:
            key += f".{next(iter(entry))}"  # the section is wrong: its first key says what is meant
        raise SettingsError(f"{key}: no such setting{setting_suggestion(key, setting_keys())}")
    if len(words) != 1:
        raise SettingsError(f"{key} = {json.dumps(entry, default=str)}: write it as {FORMS}")
    (word,) = words
    values, options = entry[word], {option: value for option, value in entry.items() if option != word}
    if word == "choice":
        options["values"] = values
    elif isinstance(values, list) and len(values) == 2:
        options["low"], options["high"] = values
    else:
        raise SettingsError(f"{key}: {word} = {json.dumps(values, default=str)}: give two numbers, [low, high]")
    dimension = parse_dimension(key, {"kind": KIND_BY_WORD[word], **options})
    if isinstance(dimension, IntegerRange):
        _check_reached(dimension)
    for value in dimension.boundary_values():
        _check_value(key, value)
    return dimension


def _check_reached(dimension: IntegerRange) -> None:
    """Refuse a range whose steps miss its end; `sweep.json` of older versions may hold one."""
    low, high, step, last = dimension.low, dimension.high, dimension.step, dimension.levels[-1]
    if last != high:
        raise SettingsError(
            f"{dimension.name}: range = [{low}, {high}] with step = {step} ends at {last}; write [{low}, {last}] or "
            f"[{low}, {last + step}], or another step"
        )


def _check_value(key: str, value: Value) -> None:
    """Raise SettingsError if the setting cannot have the value, whatever the other settings are."""
    tree: dict[str, Any] = {}
    _set(tree, key, value)
    try:
        Settings.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        path = tuple(key.split("."))
        for mistake in error.errors():
            if mistake["loc"][: len(path)] == path:
                raise SettingsError(f"{key}: {json.dumps(value)}: {mistake['msg'].lower()}") from error


def _set(tree: dict[str, Any], key: str, value: Value) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value
