"""Describes settings and presets: what each key means, its default, and what a preset changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from metagmvae.configs.load import SettingsError, setting_keys
from metagmvae.configs.schema import Settings
from metagmvae.configs.suggestions import setting_suggestion

_HEAD = re.compile(r"^(?P<title>.*?)\. .*Hardware: (?P<hardware>.*?)\. Time: (?P<time>.*?)\. Score: ")


@dataclass(frozen=True)
class SettingDescription:
    """One setting."""

    key: str
    value: Any
    default: Any
    text: str
    """What it means, in one line."""
    choices: tuple[Any, ...]
    """The possible values if there are only some."""


@dataclass(frozen=True)
class PresetHead:
    """The head comment of a preset."""

    title: str
    """What it trains."""
    hardware: str
    time: str


def describe_settings(settings: Settings, wanted: Sequence[str] = ()) -> list[SettingDescription]:
    """Describe all settings, or those whose keys or sections are wanted, in the order of the sections.

    Raises:
        SettingsError: a wanted key does not exist.
    """
    keys = setting_keys()
    for key in wanted:
        if not any(f"{known}.".startswith(f"{key}.") for known in keys):
            raise SettingsError(f"{key}: no such setting{setting_suggestion(key, keys)}")
    described = _describe(settings, Settings(), "")
    return [item for item in described if not wanted or any(f"{item.key}.".startswith(f"{key}.") for key in wanted)]


def _describe(section: BaseModel, defaults: BaseModel, prefix: str) -> Iterator[SettingDescription]:
    for name, field in type(section).model_fields.items():
        value, default = getattr(section, name), getattr(defaults, name)
        if isinstance(value, BaseModel):
            yield from _describe(value, default, f"{prefix}{name}.")
            continue
        choices = get_args(field.annotation) if str(get_origin(field.annotation)) == "typing.Literal" else ()
        yield SettingDescription(
            f"{prefix}{name}", value, default, " ".join((field.description or "").split()), choices
        )


def preset_text(name: str) -> str:
    """The TOML of a preset, with its comments."""
    return resources.files("metagmvae.configs").joinpath("presets", f"{name}.toml").read_text(encoding="utf-8")


def preset_head(name: str) -> PresetHead:
    """What a preset trains, on which hardware and in which time, from its head comment.

    Raises:
        SettingsError: the comment lacks a part.
    """
    comment = " ".join(line.lstrip("# ") for line in preset_text(name).splitlines() if line.startswith("#"))
    found = _HEAD.match(comment)
    if found is None:
        raise SettingsError(f"{name}.toml: its head comment needs a sentence, Hardware: …, Time: … and Score: …")
    title = found["title"].partition(" (Lee et al.")[0].partition(" (paper:")[0]
    return PresetHead(title, found["hardware"], found["time"])
