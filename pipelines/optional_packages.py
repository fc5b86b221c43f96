"""Packages that only a part of metagmvae needs, and what to install where one is missing.

The package installs what preparing, training, evaluating and classifying need. Everything else belongs to an extra of
pyproject.toml, such as `metagmvae[ray]`, and is imported where it is first used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXTRA_OF_PACKAGE = {
    "faiss": "faiss",
    "mlflow": "mlflow",
    "optuna": "tune",
    "ray": "ray",
    "ray.tune": "tune",
    "timm": "timm",
}
"""Extra of pyproject.toml by the name that is imported."""


class MissingPackageError(ValueError):
    """A package that is not part of the basic installation is needed. The message is one line with the remedy."""


@contextmanager
def optional_package(package: str, needed_by: str, otherwise: str = "") -> Iterator[None]:
    """Import an optional package inside the block, and only that.

    >>> with optional_package("json", "this example"):
    ...     import json

    Args:
        package: a key of `EXTRA_OF_PACKAGE`.
        needed_by: what the user asked for, the subject of the message: `run.engine = ray`.
        otherwise: how the same can be had without the package: `set run.engine to local`.

    Raises:
        MissingPackageError: it, or a package that it needs, is not installed.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "metagmvae":
            raise
        reason = (str(error).splitlines() or ["not installed"])[0]
        alternative = f", or {otherwise}" if otherwise else ""
        raise MissingPackageError(
            f"{needed_by} needs the package {package} ({reason}): pip install "
            f"'metagmvae[{EXTRA_OF_PACKAGE[package]}]'{alternative}"
        ) from error
