"""TOML and `--set` overrides -> Settings; every mistake is one line that names the dotted key."""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from metagmvae.configs.schema import Settings


class SettingsError(ValueError):
    """A key, value or file of settings is wrong: one line that names it and the remedy."""


def load_settings(config: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read settings from a TOML file or a bundled preset, then apply overrides in order.

    Args:
        config: path of a TOML file, or the name of a preset.
        overrides: `dotted.key=value`; the value is read as TOML, or else as the string it is.

    Raises:
        SettingsError: the file, a key or a value is wrong.
    """
    tree = read_toml(_locate(config))
    for override in overrides:
        _apply(tree, override)
    return _validate(tree)


def settings_from_json(text: str) -> Settings:
    """Settings from their JSON form.

    Raises:
        SettingsError: it is not JSON, or not settings.
    """
    try:
        return _validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise SettingsError(f"settings are not JSON: {error}") from error


def to_json(settings: Settings) -> str:
    """Settings as JSON text, every key written out."""
    return settings.model_dump_json(indent=2)


def to_toml(settings: Settings) -> str:
    """TOML that `load_settings` reads back to equal settings."""
    tree = json.loads(settings.model_dump_json())
    lines = [f"{key} = {_toml(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    for section, keys in tree.items():
        if isinstance(keys, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # JSON's strings, numbers and booleans are TOML's too.
    return json.dumps(value, ensure_ascii=False)


def fingerprint(settings: Settings) -> str:
    """sha256 of all that decides the outcome: not the name, nor where it runs, nor where it is tracked."""
    tree = json.loads(settings.model_dump_json(exclude={"name", "run", "tracking"}))
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def differences(ours: Settings, theirs: Settings) -> list[str]:
    """Dotted keys that decide the outcome and differ, as `key: ours, theirs`."""
    flat_ours, flat_theirs = (dict(flat(json.loads(s.model_dump_json()))) for s in (ours, theirs))
    free = ("name", "run.", "tracking.")
    return [
        f"{key}: {value!r}, {flat_theirs[key]!r}"
        for key, value in flat_ours.items()
        if value != flat_theirs[key] and not key.startswith(free)
    ]


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested sections."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def presets() -> list[str]:
    """Names of the bundled presets."""
    files = resources.files("metagmvae.configs").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def _locate(config: str | Path) -> Any:
    path = Path(config)
    if path.is_file():
        return path
    name = str(config)
    if name in presets():
        return resources.files("metagmvae.configs").joinpath("presets", f"{name}.toml")
    known = ", ".join(presets())
    raise SettingsError(f"{name}: no such TOML file, and not one of the presets {known}{nearest(name, presets())}")


def read_toml(file: Any) -> dict[str, Any]:
    """Content of a TOML file, or of one that is bundled.

    Raises:
        SettingsError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not valid TOML: {error}") from error
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read ({error.strerror})") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise SettingsError(f"--set {override}: write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise SettingsError(f"--set {override}: {section} is a value, not a section")
    tree[last] = value


def _validate(tree: Any) -> Settings:
    try:
        return Settings.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from error


def _one_line(error: ValidationError) -> str:
    """The first mistake, and how many more there are."""
    first, *more = error.errors()
    key = ".".join(str(part) for part in first["loc"]) or "settings"
    if first["type"] == "extra_forbidden":
        text = f"{key}: no such key{nearest(str(first['loc'][-1]), _keys(first['loc'][:-1]))}"
    elif first["type"] == "value_error":
        text = f"{key}: {first['ctx']['error']}"
    else:
        text = f"{key} = {json.dumps(first['input'], default=str)}: {first['msg'].lower()}"
    return text + (f" (and {len(more)} more mistakes)" if more else "")


def _keys(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of a message: the known word that was meant, or else all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
