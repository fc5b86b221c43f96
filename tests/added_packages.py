"""Packages that add parts to metagmvae by entry points, installed for the time of a test."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


class Site:
    """A folder from which the packages that are installed in it can be imported."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def install(self, name: str, modules: Mapping[str, str], entry_points: Mapping[str, Mapping[str, str]]) -> None:
        """Write modules, by name, and the metadata of a package, as pip does."""
        self.folder.mkdir(exist_ok=True)
        for module, text in modules.items():
            (self.folder / f"{module}.py").write_text(text)
            self.monkeypatch.delitem(sys.modules, module, raising=False)
        metadata = self.folder / f"{name.replace('-', '_')}-0.1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        lines = (
            line for group, points in entry_points.items() for line in (f"[{group}]", *map(" = ".join, points.items()))
        )
        (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
        self.monkeypatch.syspath_prepend(self.folder)

    def remove(self, module: str) -> None:
        """Let the folder be searched no more, and forget a module of it."""
        self.monkeypatch.syspath_prepend("nothing")  # forgets what the finders of Python have found
        sys.path.remove(str(self.folder))
        self.monkeypatch.delitem(sys.modules, module)
