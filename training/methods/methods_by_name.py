"""The methods by name (`method.name`), those that other packages add included."""

from __future__ import annotations

from metagmvae.configs.suggestions import suggestion
from metagmvae.pipelines.extensions import extension_names, load_extension
from metagmvae.pipelines.records import DataError
from metagmvae.training.methods.maml import MAML
from metagmvae.training.methods.meta_step import MetaGMVAEMethod
from metagmvae.training.methods.method import Method
from metagmvae.training.methods.protonets import ProtoNets
from metagmvae.training.methods.scratch import Scratch
from metagmvae.training.methods.task_method import TaskMethod

METHODS: dict[str, Method] = {
    "meta-gmvae": MetaGMVAEMethod(),
    "maml": TaskMethod(MAML),
    "protonets": TaskMethod(ProtoNets),
    "scratch": TaskMethod(Scratch, trains=False),
}


def find_method(name: str) -> Method:
    """Return the method of a name.

    Raises:
        DataError: there is no such method, or its package cannot be used.
    """
    if name in METHODS:
        return METHODS[name]
    make = load_extension("metagmvae.methods", name)
    if make is None:
        known = [*METHODS, *extension_names("metagmvae.methods")]
        raise DataError(f"method.name ({name}): no such method{suggestion(name, known)}")
    try:
        method = make()
    except Exception as error:  # whatever the code of another package raises
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"method.name ({name}): its package cannot build it ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(method, Method):
        raise DataError(f"method.name ({name}): its package returns {type(method).__name__} instead of a Method")
    return method
