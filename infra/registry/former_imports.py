"""Loads models that were registered before the packages moved into `metagmvae`.

The entry file of such a model imports `infra.pyfunc_model`, which is now `metagmvae.infra.registry.pyfunc_model`.
MLflow imports this module when it starts, as a plugin (`[project.entry-points]` in pyproject.toml), so that MLflow's
own loader and server find the former name. A user's own package `infra` is not affected: this finder is the last one
that Python asks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FORMER, CURRENT = "infra.pyfunc_model", "metagmvae.infra.registry.pyfunc_model"


class FormerImports(MetaPathFinder, Loader):
    """Finds `infra.pyfunc_model` and gives it the class of the current module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the former module or of its package; None for every other name."""
        if fullname == FORMER.partition(".")[0]:
            return ModuleSpec(fullname, None, is_package=True)
        return ModuleSpec(fullname, self) if fullname == FORMER else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the former module the one name that entry files import."""
        module.__dict__["FewShotModel"] = import_module(CURRENT).FewShotModel


class NoContext:
    """MLflow loads plugins as providers of run tags. This one provides none."""

    def in_context(self) -> bool:
        """Return False: this provider adds no tags to any run."""
        return False


if not any(isinstance(finder, FormerImports) for finder in sys.meta_path):
    sys.meta_path.append(FormerImports())
