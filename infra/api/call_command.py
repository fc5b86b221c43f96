"""Calls a command of metagmvae from Python: the same options, checks and answer as on the command line."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any

import numpy as np

from metagmvae.evaluation.provenance import COMMAND
from metagmvae.infra.cli import build_parser, public_word
from metagmvae.infra.commands.parsing import Answer
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset


def call_command(name: str, *values: Any, **options: Any) -> Answer:
    """Run a command and return what it prints with `--json`.

    Args:
        name: of the command.
        values: its positional arguments, see `reference`.
        options: by name, with `_` for `-`. True: the option alone; None and False: left out; a list: several values of
            one option; a mapping: `--option KEY=VALUE` for each.

    Raises:
        DataError: an option is unknown or its value is wrong; and the errors of the command.
    """
    words = [name, *map(reference, values)]
    for key, value in options.items():
        words += _option(f"--{key.replace('_', '-')}", value)
    parser = build_parser()
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            arguments = parser.parse_args([public_word(word, parser) for word in words])
    except SystemExit as stop:
        raise DataError(message.getvalue().strip() or f"metagmvae {name}: wrong arguments") from stop
    arguments.json = True
    command = COMMAND.set(words)
    try:
        answer: Answer = arguments.run(arguments)
    finally:
        COMMAND.reset(command)
    return answer


def reference(value: Any) -> str:
    """The word of the command line that names a model, a data set or a file.

    Raises:
        DataError: the value is no name, path, result of this API or opened data set.
    """
    if isinstance(value, Dataset):
        return value.uri
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    kind = type(value).__name__
    raise DataError(f"{kind} is no name: give a path, a URI, models:/NAME@ALIAS, or a result of this API")


def setting_words(overrides: Mapping[str, Any]) -> dict[str, str]:
    """The values of settings as `--set` takes them, by key.

    Values of TOML (strings, numbers, booleans and arrays of them) have the same form in JSON.

    Raises:
        DataError: a value is none of these.
    """
    words = {}
    for key, value in overrides.items():
        if value is None:
            raise DataError(f"{key} is None; leave the key out for the value of the settings")
        if isinstance(value, Mapping):
            raise DataError(f"{key} is a {type(value).__name__}; give each of its keys by its own: '{key}.…': value")
        try:
            words[key] = json.dumps(value, default=plain)
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
    return words


def plain(value: Any) -> Any:
    """Convert a value for JSON: NumPy's numbers and arrays to Python's, anything else as `reference` does."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else reference(value)


def _option(option: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    if isinstance(value, Mapping):
        return [word for key, item in value.items() for word in (option, f"{key}={item}")]
    if isinstance(value, list | tuple | range | np.ndarray):
        return [option, *map(str, value)]
    return [f"{option}={value if isinstance(value, int | float) else plain(value)}"]
