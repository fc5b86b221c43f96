"""Reads settings from TOML files, presets and `--set` overrides. Errors are one line and name the dotted key."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from datetime import date, time
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from metagmvae.configs.credentials import redact
from metagmvae.configs.mlflow_names import STORED, model_name
from metagmvae.configs.schema import Settings
from metagmvae.configs.suggestions import setting_suggestion, suggestion

LATER_KEYS: tuple[tuple[str, str, Any], ...] = (
    ("model", "normalise", "none"),
    ("pretrain", "crops", "clipped"),
    ("pretrain", "objective", "nt-xent"),
    ("pretrain", "query_views", 3),
    ("adapt", "proportions", "equal"),
    ("adapt", "proportions_prior", 1.0),
    ("validation", "calibration_episodes", 100),
    ("train", "prior", "mixture"),
    ("pretrain", "clusters", 500),
    ("pretrain", "shots", 4),
    ("pretrain", "queue", 16_384),
    ("pretrain", "momentum", 0.99),
    ("pretrain", "beta1", 0.9),
    ("adapt", "inductive", "latents"),
    ("adapt", "diffusion", 0.0),
    ("adapt", "whitening", 0.0),
    ("method", "options", {}),
    ("model", "options", {}),
    ("pretrain", "options", {}),
    ("validation", "mix_groups", False),
)
"""Settings (section, key, default) newer than the first recorded results. With its default, a key is no part of the
fingerprint, so recorded results stay valid. Append new settings here."""


MAX_SHOWN = 100
"""Characters of a key or value in an error message."""
TABLE_ERRORS = ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
FORMS = {
    "bool_type": "; write true or false",
    "string_type": '; write it in quotes: "{0}"',
    "tuple_type": "; write a list: [{0}]",
}
"""How a value is written, by the type of a pydantic error about another form."""
MAX_REASON = 500
MAX_TOML_BYTES = 2**20


class SettingsError(ValueError):
    """A wrong key, value or file of settings. The message is one line: what is wrong, and the remedy."""


def load_settings(config: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read settings from a TOML file or a bundled preset and apply overrides in order.

    Args:
        config: path of a TOML file, or the name of a preset.
        overrides: `dotted.key=value`; the value is parsed as TOML, and taken as a string if it is not TOML.

    Raises:
        SettingsError: the file, a key or a value is wrong.
    """
    tree = read_toml(_locate(config))
    for override in overrides:
        _apply(tree, override)
    settings = _validate(tree)
    name = model_name(settings.tracking.register_as, settings.data.uri, settings.name)
    if name == settings.tracking.register_as:
        return settings
    tree["tracking"]["register_as"] = name
    return _validate(tree)


def settings_from_json(text: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings from their JSON form (`to_json`), as a run stored them: names in MLflow are not checked again.

    Overrides are applied as in `load_settings`; then all settings are checked, for another training.

    Raises:
        SettingsError: the text is not JSON, or not valid settings.
    """
    try:
        tree = json.loads(text)
    except RecursionError as error:
        raise SettingsError("settings are not valid JSON: nested too deeply") from error
    except ValueError as error:  # also an integer of more digits than Python converts
        raise SettingsError(f"settings are not valid JSON: {error}") from error
    if overrides and not isinstance(tree, dict):
        raise SettingsError("settings are not a JSON object")
    for override in overrides:
        _apply(tree, override)
    return _validate(tree, None if overrides else STORED)


def to_json(settings: Settings) -> str:
    """Settings as JSON with all keys."""
    return settings.model_dump_json(indent=2)


def to_toml(settings: Settings) -> str:
    """Settings as TOML with all keys; `load_settings` reads it back to equal settings."""
    tree = json.loads(settings.model_dump_json())
    lines = [f"{key} = {_toml(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    for section, keys in tree.items():
        if isinstance(keys, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    # Strings, numbers and booleans have the same form in JSON and TOML.
    return json.dumps(value, ensure_ascii=False)


def fingerprint(settings: Settings) -> str:
    """sha256 of all settings that affect the result: without `name`, `run` and `tracking`."""
    tree = json.loads(settings.model_dump_json(exclude={"name", "run", "tracking"}))
    for section, key, default in LATER_KEYS:
        if tree[section][key] == default:
            del tree[section][key]
    if tree["method"]["name"] == "meta-gmvae":  # which reads no other setting of the method
        del tree["method"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def differences(ours: Settings, theirs: Settings) -> list[str]:
    """Settings that affect the result and differ, each as `key: ours, theirs`; datasets are compared by fingerprint."""
    flat_ours, flat_theirs = (dict(flatten(json.loads(s.model_dump_json()))) for s in (ours, theirs))
    ignored = ("name", "run.", "tracking.", "data.uri")
    return [
        f"{key}: {flat_ours.get(key)!r}, {flat_theirs.get(key)!r}"
        for key in flat_ours | flat_theirs
        if flat_ours.get(key) != flat_theirs.get(key) and not key.startswith(ignored)
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested sections."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def setting_keys() -> list[str]:
    """Dotted keys of all settings; a table of options is one key (`is_option`)."""
    sections = json.loads(to_json(Settings()))
    return [
        f"{section}.{key}" if key else section
        for section, keys in sections.items()
        for key in (keys if isinstance(keys, dict) else ("",))
    ]


def is_option(key: str) -> bool:
    """Whether a dotted key is an option of what another package adds, such as `method.options.freedom`."""
    section, *rest = key.split(".")
    return rest[:1] == ["options"] and len(rest) == 2 and f"{section}.options" in setting_keys()


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
    hint = suggestion(name[:MAX_SHOWN], presets())
    raise SettingsError(f"{_short(name)}: no such TOML file and no preset of that name{hint}")


def read_toml(file: Any) -> dict[str, Any]:
    """Content of a TOML file (a `Path` or a package resource).

    Raises:
        SettingsError: the file cannot be read, or is not TOML.
    """
    try:
        with file.open("rb") as content:
            raw = content.read(MAX_TOML_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_TOML_BYTES:
        raise SettingsError(f"{file}: larger than {MAX_TOML_BYTES:,} bytes, so it is not a file of settings")
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))  # editors on Windows put a byte order mark first
    except RecursionError as error:
        raise SettingsError(f"{file}: not valid TOML: nested too deeply") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{file}: not valid TOML: {error}") from error
    except ValueError as error:  # more digits than Python converts
        raise SettingsError(f"{file}: not valid TOML: an integer of thousands of digits") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise SettingsError(f"--set {_short(override)}: write it as section.key=value")
    value = _override_value(text)
    if isinstance(value, dict):
        raise SettingsError(
            f"--set {_short(override)}: would replace all of {_short(key)}; set one key: {_short(key)}.KEY=VALUE"
        )
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise SettingsError(f"--set {_short(override)}: {_short(section)} is a value, not a section")
    tree[last] = value


def _override_value(text: str) -> Any:
    """A text that is exactly one TOML value: this value; else, and for a date, the text itself.

    As one item of an array, a text with a comment, a second value or a second line is not taken for its beginning.
    """
    try:
        tree = tomllib.loads(f"array = [0, {text}, 0]")
        (_, value, _) = tree.pop("array")
    except (ValueError, RecursionError):
        return text.strip()
    return text.strip() if tree or isinstance(value, date | time) else value


def _validate(tree: Any, context: dict[str, bool] | None = None) -> Settings:
    try:
        return Settings.model_validate_json(json.dumps(tree, default=str), context=context)
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from error
    except RecursionError as error:
        raise SettingsError("settings: nested too deeply") from error


def _one_line(error: ValidationError) -> str:
    """The first mistake and the number of further mistakes."""
    first, *more = error.errors()
    text = mistake_text(first) if first["loc"] else f"settings: {mistake_text(first)}"
    if first["type"] == "extra_forbidden":
        key = ".".join(map(str, first["loc"]))
        inner = first["input"]
        if len(first["loc"]) == 1 and isinstance(inner, dict) and inner:
            key += f".{next(iter(inner))}"  # the section is wrong: its first key says what is meant
        text = f"{_short(key)}: no such key{setting_suggestion(key[:MAX_SHOWN], setting_keys())}"
    elif first["type"] in FORMS and isinstance(first["input"], str | int | float):
        value = first["input"] if isinstance(first["input"], str) else json.dumps(first["input"])
        text += FORMS[first["type"]].format(_short(value))
    return text + (f" (and {len(more)} more mistakes)" if more else "")


def mistake_text(mistake: ErrorDetails) -> str:
    """One mistake of a pydantic `ValidationError` as `key = value: reason`."""
    key = _short(".".join(str(part) for part in mistake["loc"] if part != "[key]"))
    if mistake["type"] == "value_error":
        reason = _short(str(mistake["ctx"]["error"]), MAX_REASON)
        return f"{key}: {reason}" if key else reason
    if mistake["type"] == "missing":
        return f"{key} is missing"
    needed = "a table of keys and values is needed" if mistake["type"] in TABLE_ERRORS else mistake["msg"].lower()
    try:
        value = json.dumps(mistake["input"], default=str)
    except (TypeError, ValueError, RecursionError):  # no JSON, or nested too deeply
        value = type(mistake["input"]).__name__
    return f"{key} = {_short(value)}: {needed}" if key else f"contains {_short(value)}, but {needed}"


def _short(text: str, limit: int = MAX_SHOWN) -> str:
    """A text in one line of at most `limit` characters, without credentials."""
    text = redact(text)
    text = text if text.isprintable() else text.encode("unicode_escape").decode()
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
