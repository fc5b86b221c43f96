"""Unsupervised meta-learning with Meta-GMVAE: the public Python API.

Each name is imported when it is first used (PEP 562), so that `import metagmvae` loads no library.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metagmvae.evaluation.fewshot.evaluate_tasks import evaluate_tasks
    from metagmvae.infra.api.functions import (
        compare,
        evaluate,
        fit,
        load_model,
        prepare,
        prepare_images,
        prepare_vectors,
        train,
    )
    from metagmvae.infra.api.sweeps import tune
    from metagmvae.infra.workflows.estimator import FewShotClassifier
    from metagmvae.pipelines.shards.dataset import Dataset

    __version__: str

__all__ = [
    "Dataset",
    "FewShotClassifier",
    "__version__",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "fit",
    "load_model",
    "prepare",
    "prepare_images",
    "prepare_vectors",
    "train",
    "tune",
]

_IMPORTED = ("TYPE_CHECKING", "annotations", "import_module", "metadata")

_MODULE_BY_NAME = {
    "Dataset": "pipelines.shards.dataset",
    "FewShotClassifier": "infra.workflows.estimator",
    "tune": "infra.api.sweeps",
    "evaluate_tasks": "evaluation.fewshot.evaluate_tasks",
    **dict.fromkeys(
        ("compare", "evaluate", "fit", "load_model", "prepare", "prepare_images", "prepare_vectors", "train"),
        "infra.api.functions",
    ),
}

if not TYPE_CHECKING:  # type checkers read the imports above, and report every other name

    def __getattr__(name: str) -> object:
        if name == "__version__":
            value = metadata.version("metagmvae")
        elif name in _MODULE_BY_NAME:
            value = getattr(import_module(f"metagmvae.{_MODULE_BY_NAME[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name not in _IMPORTED} | {*__all__})
