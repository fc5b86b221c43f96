"""Fingerprint of the code and libraries that, besides settings and data, decide the results of a trial."""

from __future__ import annotations

import ast
import inspect
from importlib import metadata
from pathlib import Path

from metagmvae.configs.schema import Settings
from metagmvae.pipelines.extensions import Group, load_extension
from metagmvae.pipelines.files import sha256_file

PACKAGE = "metagmvae"
ROOT = Path(__file__).parents[2]
"""Folder that is imported as `metagmvae`."""
ENTRY_POINT = "infra/runs/train_in_process.py"
"""File that trains and validates a trial. All files that it imports count as well (settings, data, training,
evaluation); reports, tracking and commands do not."""
LIBRARIES = ("torch", "numpy")


def code_fingerprint() -> dict[str, str]:
    """sha256 of each project file that decides the result of a trial, by path, and the versions of the libraries."""
    hashes: dict[str, str] = {}
    pending = [ENTRY_POINT]
    while pending:
        name = pending.pop()
        if name not in hashes:
            hashes[name] = sha256_file(ROOT / name)
            pending += imported_files(ROOT / name)
    return dict(sorted(hashes.items())) | {name: metadata.version(name) for name in LIBRARIES}


def extension_fingerprint(settings: Settings) -> dict[str, str]:
    """sha256 of the module of another package that adds the method, the encoder or the objective of the settings.

    Modules that it imports are not part of it.
    """
    named: dict[Group, str] = {
        "metagmvae.methods": settings.method.name,
        "metagmvae.encoders": settings.model.encoder,
        "metagmvae.objectives": settings.pretrain.objective,
    }
    modules = {f"{group}: {name}": inspect.getmodule(load_extension(group, name)) for group, name in named.items()}
    return {name: sha256_file(module.__file__) for name, module in modules.items() if module and module.__file__}


def changed_parts(new: dict[str, str], old: dict[str, str]) -> list[str]:
    """Names of files and libraries that differ between two fingerprints; libraries with both versions."""
    names = [name for name in sorted(new.keys() | old.keys()) if new.get(name) != old.get(name)]
    return [f"{name}: {new.get(name)}, {old.get(name)}" if name in LIBRARIES else name for name in names]


def imported_files(path: Path) -> list[str]:
    """Project files that a file imports, at the top or inside functions, relative to ROOT."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    ours = (module.removeprefix(f"{PACKAGE}.") for module in modules if module.startswith(f"{PACKAGE}."))
    files = (f"{module.replace('.', '/')}.py" for module in ours)
    return sorted(name for name in files if (ROOT / name).is_file())
