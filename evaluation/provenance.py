"""Provenance of a result: command, versions, machine, commit and time; dataset and its split of the classes."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from metagmvae.configs.credentials import redact

PACKAGES = ("metagmvae", "torch", "torchvision", "numpy", "ray", "mlflow", "webdataset", "pyarrow", "scikit-learn")

COMMAND: ContextVar[Sequence[str] | None] = ContextVar("COMMAND", default=None)
"""The words of the command that runs, where it was called from Python; None: those of this process."""

_OWN_SPLIT = {"name": "omniglot", "options": {"split": "1200-100-323"}}
_VINYALS_SPLIT = {"name": "omniglot", "options": {"split": "vinyals"}}
_MINI_IMAGENET = {"name": "mini-imagenet"}
KNOWN_DATASETS: dict[str, dict[str, Any]] = {
    "ec015c02ace0": _OWN_SPLIT,
    "b3ccb69f5b50": _OWN_SPLIT,
    "ff201d95e527": _OWN_SPLIT,
    "529c8c530c5a": _OWN_SPLIT,
    "44b24c524c14": _OWN_SPLIT,
    "6f7e78593b0c": _OWN_SPLIT,
    "deb7ea3f1d70": _VINYALS_SPLIT,
    "e2d747e8398e": _VINYALS_SPLIT,
    "36c16e67ee52": _VINYALS_SPLIT,
    "c816c4acd1a2": _MINI_IMAGENET,
    "8393ca2a4866": _MINI_IMAGENET,
}
"""First digits of the fingerprints (of the dataset or of its source) that datasets had before they recorded their
options; the files in `evaluation/results` hold them. `1200-100-323` is our seeded draw, not the authors' list."""


def dataset_origin(manifest: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """Return `name` and, if recorded, `options` of the dataset of images behind a dataset.

    The options name the split of the classes. Unknown features that do not record their images have their own name.
    """
    images = manifest.get("images") or manifest
    known = known_dataset(fingerprint, images.get("source_fingerprint", ""))
    if "options" not in images and known:
        return known
    return {key: images[key] for key in ("name", "options") if key in images}


def known_dataset(*fingerprints: str) -> dict[str, Any]:
    """Return the entry of `KNOWN_DATASETS` of the first known fingerprint; empty if none is known."""
    entries = (KNOWN_DATASETS.get(fingerprint[:12]) for fingerprint in fingerprints)
    return dict(next((entry for entry in entries if entry), {}))


def provenance() -> dict[str, Any]:
    """Return command, versions, processor, GPU, commit and UTC time as plain values; unknown values are None."""
    import torch

    return {
        "command": shlex.join(["metagmvae", *map(redact, COMMAND.get() or sys.argv[1:])]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {name: installed_version(name) for name in PACKAGES},
    }


def version_line() -> str:
    """Versions of the program, with the commit of a source tree, of Python and of PyTorch."""
    whole = _commit() or ""
    commit = whole[:12] + "+" * whole.endswith("+")
    ours = f"metagmvae {installed_version('metagmvae') or 'not installed'}" + (f" (commit {commit})" if commit else "")
    return f"{ours}, Python {platform.python_version()}, torch {installed_version('torch') or 'not installed'}"


def installed_version(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the source tree, with a `+` if tracked files differ; None for an installed package."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
