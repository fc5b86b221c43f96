"""The methods by name (`method.name`), those that other packages add included."""

from __future__ import annotations

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.suggestions import suggestion
from metagmvae.pipelines.extensions import check_options, extension_names, load_extension
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


def find_method(settings: MethodSettings) -> Method:
    """Return the method of the settings.

    Raises:
        DataError: there is no such method or option, or its package cannot be used.
    """
    name, options = settings.name, settings.options
    if name in METHODS:
        check_options("method.options", options, name, None)
        return METHODS[name]
    make = load_extension("metagmvae.methods", name)
    if make is None:
        known = [*METHODS, *extension_names("metagmvae.methods")]
        raise DataError(f"method.name ({name}): no such method{suggestion(name, known)}")
    check_options("method.options", options, name, make)
    try:
        method = make(**options)
    except Exception as error:  # whatever the code of another package raises
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"method.name ({name}): its package cannot build it ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(method, Method):
        raise DataError(f"method.name ({name}): its package returns {type(method).__name__} instead of a Method")
    return method
