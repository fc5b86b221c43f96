"""Runs commands of metagmvae as if only some of its requirements were installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def requirements(extras: Collection[str] = ()) -> list[str]:
    """Requirements of the package with these extras; an extra that consists of others is resolved."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(line)
            lines += requirements(requirement.extras) if requirement.name == PROJECT["name"] else [line]
    return lines


def installed_with(extras: Collection[str]) -> set[str]:
    """Names of the distributions that pip installs for the package with these extras: requirements of requirements."""
    found: set[tuple[str, str]] = set()

    def add(requirement: Requirement) -> None:
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key not in found:
                found.add(key)
                for line in _needs(key[0]):
                    needed = Requirement(line)
                    if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                        add(needed)

    for line in requirements(extras):
        add(Requirement(line))
    return {name for name, _ in found}


def _needs(distribution: str) -> Iterator[str]:
    try:
        yield from metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:  # of another platform
        return


def run_with(extras: Collection[str], commands: Sequence[Sequence[str]], folder: Path) -> list[dict[str, Any]]:
    """Run commands in one process where no module of other distributions can be imported.

    Returns:
        `code`, `out` and `err` of each command.
    """
    installed = installed_with(extras)
    # Ray brings some packages along and puts them on the path of a process that imports it.
    installed |= {canonicalize_name(d.name) for d in metadata.distributions() if "/ray/" in str(d.locate_file(""))}
    blocked = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & {*installed, "metagmvae", "pip"}
    ]
    request = json.dumps({"blocked": blocked, "commands": commands})
    child = subprocess.run(
        [sys.executable, "-c", CHILD], input=request, capture_output=True, text=True, cwd=folder, timeout=280
    )
    assert child.returncode == 0, child.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads(child.stdout)
    return answers


CHILD = '''
import contextlib, io, json, sys
from importlib.machinery import PathFinder
request = json.load(sys.stdin)
blocked = set(request["blocked"])

class Installed:
    """Finds modules as PathFinder does, except those that are blocked."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
for name in [name for name in sys.modules if name.partition(".")[0] in blocked]:
    del sys.modules[name]
from metagmvae.infra.cli import main
answers = []
for words in request["commands"]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    answers.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps(answers))
'''
