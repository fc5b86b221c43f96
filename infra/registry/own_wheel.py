"""The wheel of this package, written from its installed files, so that it can be installed where a model is served."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from importlib import metadata
from pathlib import Path

PACKAGE = "metagmvae"
FOLDERS = ("configs", "pipelines", "training", "evaluation", "infra")
SUFFIXES = (".py", ".toml", ".html", ".typed")
"""Code, presets and templates; recorded results are left out."""
FORMAT = b"Wheel-Version: 1.0\nGenerator: metagmvae\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
OLDEST = (1980, 1, 1, 0, 0, 0)
"""The time of all files in the wheel: equal files make equal wheels."""


def write_wheel(folder: Path) -> Path | None:
    """Write the wheel into a folder; None if the package runs from a source tree without being installed."""
    try:
        installed = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    information = f"{PACKAGE}-{installed.version}.dist-info"
    contents = {f"{PACKAGE}/{path}": (_root() / path).read_bytes() for path in _files()}
    # A build in the source tree leaves a `metagmvae.egg-info` there, which is found first from that folder.
    contents[f"{information}/METADATA"] = (
        installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    ).encode()
    contents[f"{information}/WHEEL"] = FORMAT
    contents[f"{information}/entry_points.txt"] = (installed.read_text("entry_points.txt") or "").encode()
    record = f"{information}/RECORD"
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in contents.items()]
    contents[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    wheel = folder / f"{PACKAGE}-{installed.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name, OLDEST), content, zipfile.ZIP_DEFLATED)
    return wheel


def _root() -> Path:
    return Path(__file__).parents[2]


def _files() -> list[Path]:
    """Files of the package relative to its folder, sorted."""
    root = _root()
    found = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted(path.relative_to(root) for path in [*root.glob("*.py"), *root.glob("py.typed"), *found])


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
