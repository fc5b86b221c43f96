"""Loads models that were registered before the packages moved into `metagmvae`.

Their entry file imports `infra.pyfunc_model`, which is `metagmvae.infra.registry.pyfunc_model` today. MLflow loads
this module when it starts, as a plugin (`[project.entry-points]` in pyproject.toml), so that its own loader and server
find the former name. A package `infra` of the user's keeps its name: the former module is only found where no other
finder knows it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FORMER, TODAY = "infra.pyfunc_model", "metagmvae.infra.registry.pyfunc_model"


class FormerImports(MetaPathFinder, Loader):
    """Answers `import infra.pyfunc_model` with the class of today's module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the former module or of its package; None for every other name."""
        if fullname == FORMER.partition(".")[0]:
            return ModuleSpec(fullname, None, is_package=True)
        return ModuleSpec(fullname, self) if fullname == FORMER else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the former module the one name that entry files take from it."""
        module.__dict__["FewShotModel"] = import_module(TODAY).FewShotModel


class NoContext:
    """What MLflow asks a plugin for: a provider of run tags. This one provides none."""

    def in_context(self) -> bool:
        """Return False: no run has tags of this provider."""
        return False


if not any(isinstance(finder, FormerImports) for finder in sys.meta_path):
    sys.meta_path.append(FormerImports())
