"""Data sources, encoders and methods that other installed packages add, by entry points of their pyproject.toml.

The guide infra/api/README.md shows such a package.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from metagmvae.pipelines.records import DataError

Group = Literal["metagmvae.sources", "metagmvae.encoders", "metagmvae.methods"]


def extension_names(group: Group) -> list[str]:
    """Names that installed packages add, sorted."""
    return sorted({point.name for point in entry_points(group=group)})


def load_extension(group: Group, name: str) -> Callable[..., Any] | None:
    """Import what a package adds under a name; None if no package adds it.

    Raises:
        DataError: two packages add it, or the one that does cannot be imported.
    """
    points = {point.value: point for point in entry_points(group=group) if point.name == name}
    if not points:
        return None
    if len(points) > 1:
        packages = " and ".join(sorted(map(_package, points.values())))
        raise DataError(f"{name}: {packages} both add it to {group}; uninstall one of them")
    (point,) = points.values()
    try:
        loaded: Callable[..., Any] = point.load()
    except Exception as error:  # whatever a module of another package raises when it is imported
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: the package {_package(point)}, which adds it, cannot be imported ({reason}); update it"
        ) from error
    return loaded


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.module
