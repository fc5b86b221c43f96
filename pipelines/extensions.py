"""What other installed packages add, by entry points of their pyproject.toml: data sources, encoders, objectives of
pre-training, methods and baselines.

The guide infra/api/README.md shows such a package.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from metagmvae.configs.suggestions import suggestion
from metagmvae.pipelines.records import DataError

Group = Literal[
    "metagmvae.sources", "metagmvae.encoders", "metagmvae.objectives", "metagmvae.methods", "metagmvae.baselines"
]


def extension_names(group: Group) -> list[str]:
    """Names that installed packages add, sorted."""
    return sorted({point.name for point in entry_points(group=group)})


def load_extension(group: Group, name: str) -> Any:
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
        return point.load()
    except Exception as error:  # whatever a module of another package raises when it is imported
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: the package {_package(point)}, which adds it, cannot be imported ({reason}); update it"
        ) from error


def check_options(key: str, options: Mapping[str, Any], name: str, extension: Callable[..., Any] | None) -> None:
    """Check options against the keyword-only parameters of what another package adds.

    A value has the type of the default; a parameter without one takes any value and must be given.

    Args:
        key: of the options, such as `method.options`.
        options: values by name.
        name: of the extension.
        extension: the function or class; None: a part of this package, which has no options.

    Raises:
        DataError: naming the option.
    """
    parameters = inspect.signature(extension).parameters.values() if extension else ()
    known = {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in known:
            hint = suggestion(option, list(known)) if known else ", which has none"
            raise DataError(f"{key}.{option}: no such option of {name}{hint}")
        kind = type(known[option])
        if kind in (bool, int, float, str) and type(value) not in ((int, float) if kind is float else (kind,)):
            raise DataError(f"{key}.{option} is {value!r}; give a value like the default, {known[option]!r}")
    for option, default in known.items():
        if default is inspect.Parameter.empty and option not in options:
            raise DataError(f"{key}.{option} is missing: {name} has no default for it")


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.module
