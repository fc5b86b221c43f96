"""What a trial's numbers come from besides its settings and data: our code, and the libraries that compute."""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path

from metagmvae.pipelines.files import sha256_file

ROOT = Path(__file__).parents[2]
ROOTS = (
    "training/trainer/stages.py",
    "evaluation/fewshot/validation.py",
    "evaluation/fewshot/encoding.py",
    "configs/load.py",
)
"""Files that a trial runs; what they import counts too, all else (reports, tracking, commands) does not."""
LIBRARIES = ("torch", "numpy")


def code_fingerprint() -> dict[str, str]:
    """sha256 of each file of ours that decides a trial's outcome, by its path, and versions of libraries."""
    found: dict[str, str] = {}
    waiting = list(ROOTS)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = sha256_file(ROOT / name)
            waiting += _imported(ROOT / name)
    return dict(sorted(found.items())) | {name: metadata.version(name) for name in LIBRARIES}


def changed(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Names of what differs, libraries with both versions."""
    names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    return [f"{n}: {ours.get(n)}, {theirs.get(n)}" if n in LIBRARIES else n for n in names]


def _imported(path: Path) -> list[str]:
    """Files of ours that a file imports, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    files = (f"{module.removeprefix('metagmvae.').replace('.', '/')}.py" for module in modules)
    return sorted(name for name in files if (ROOT / name).is_file())
