"""The functions of the Python API. Each does what the command of its name does, and returns its answer as a result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from metagmvae.infra.api.call_command import call_command, setting_words
from metagmvae.infra.api.results import (
    ComparisonResult,
    EvaluationResult,
    EvaluationTable,
    FitResult,
    PreparedData,
    TrainedRun,
)
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.workflows.prepare import write_source
from metagmvae.pipelines.arrays.image_arrays import open_images
from metagmvae.pipelines.arrays.vectors import open_vectors
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.package import LoadedModel

Reference = str | os.PathLike[str]
"""A path, a URI, `models:/NAME@ALIAS`, or a result of this API that stands for one."""
Numbers = int | Sequence[int]


def prepare(kind: str, source: Reference | None = None, *, out: Reference, **options: Any) -> PreparedData:
    """Write a data set, as `metagmvae prepare` does.

    >>> import metagmvae
    >>> data = metagmvae.prepare("glyphs", out="data/prepared")
    >>> data.image_shape, data.classes
    ((1, 28, 28), {'train': 400, 'validation': 60, 'test': 100})
    >>> len(data.open().labels("test"))
    2000

    Args:
        kind: of the source: `folder`, `omniglot`, `mini-imagenet`, `glyphs`, or one that another package adds.
        source: folder or archive of the images.
        out: new folder, or `s3://bucket/prefix`.
        options: as in `metagmvae prepare --help`: `invert=True`, `size=84`, `fractions=(0.6, 0.2, 0.2)`, `workers=2`.

    Raises:
        DataError: an option or the source is wrong.
    """
    answer = call_command("prepare", kind, source=source, out=out, **options)
    return PreparedData.from_answer(answer, uri=answer["data"])


def prepare_images(
    images: Sequence[Any] | np.ndarray,
    labels: Sequence[Any] | np.ndarray | None = None,
    *,
    out: Reference,
    **options: Any,
) -> PreparedData:
    """Write images that Python holds as a data set: of torchvision, Hugging Face or NumPy.

    >>> import metagmvae
    >>> import numpy as np
    >>> images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    >>> data = metagmvae.prepare_images(images, [number % 6 for number in range(60)], out="data/own", test_classes=2)
    >>> data.image_shape, data.classes
    ((1, 28, 28), {'train': 4, 'test': 2})

    Args:
        images: anything with a length and numbered items: arrays uint8 (H, W), (H, W, C) or (C, H, W), images of
            Pillow, or image files (paths, or their content as bytes).
        labels: class of each image, words or numbers; None: no classes.
        out: new folder, or `s3://bucket/prefix`.
        options: of `pipelines.arrays.image_arrays.open_images`: `size=84`, `crop=False`, `validation_classes=16`,
            `groups=patients`.

    Raises:
        DataError: an image has another form or cannot be decoded, or an option is wrong.
    """
    answer = write_source(open_images(images, labels, **options), os.fspath(out), seed=options.get("seed", 0))
    return PreparedData.from_answer(answer, uri=answer["data"])


def prepare_vectors(
    vectors: Any, labels: Sequence[Any] | np.ndarray | None = None, *, out: Reference, **options: Any
) -> PreparedData:
    """Write feature vectors that another network computed as a data set; train on it with the preset `vectors`.

    >>> import metagmvae
    >>> import numpy as np
    >>> embeddings = np.random.default_rng(0).standard_normal((60, 16)).astype("float32")
    >>> labels = [number % 6 for number in range(60)]
    >>> data = metagmvae.prepare_vectors(embeddings, labels, out="data/vectors", test_classes=2)
    >>> data.feature_size, data.classes
    (16, {'train': 4, 'test': 2})

    Args:
        vectors: (n, F) finite numbers, float16 or float32.
        labels: class of each vector, words or numbers; None: no classes.
        out: new folder, or `s3://bucket/prefix`.
        options: of `pipelines.arrays.vectors.open_vectors`: `splits=…`, `groups=…`, `names=…`, `dtype="float16"`,
            `validation_classes=16`.

    Raises:
        DataError: the vectors have another shape or format, a value is not finite, or an option is wrong.
    """
    answer = write_source(open_vectors(vectors, labels, **options), os.fspath(out), seed=options.get("seed", 0))
    return PreparedData.from_answer(answer, uri=answer["data"])


def train(
    config: Reference, overrides: Mapping[str, Any] | None = None, *, resume: bool = False, kind: str = "learner"
) -> TrainedRun:
    """Train a model, as `metagmvae train` does; the result stands for the run folder.

    The run is tracked in MLflow and the model is registered if the settings say so (`tracking.enabled` and
    `tracking.register_as`).

    >>> import metagmvae
    >>> run = metagmvae.train(
    ...     "glyphs-demo",
    ...     {
    ...         "data.uri": "data/glyphs",  # written by: metagmvae prepare glyphs --out data/glyphs
    ...         "run.out": "runs/first",
    ...         "run.engine": "local",
    ...         "pretrain.steps": 2,
    ...         "train.steps": 2,
    ...         "tracking.enabled": False,
    ...     },
    ... )
    >>> (run.path / "checkpoint.pt").exists()
    True

    Args:
        config: path of a TOML file, name of a preset, or folder of a run: its settings.
        overrides: values by dotted key (`section.key`); they replace those of the file.
        resume: continue from the checkpoint in the run folder (`run.out`), if it has one.
        kind: `learner`, or `encoder`: as `metagmvae pretrain`.

    Raises:
        SettingsError: a key or value is wrong, cannot be used on this machine, or differs from the run to resume.
        DataError: the data set or the run folder cannot be used.
        NonFiniteLossError: a step had a loss that is not finite; the last checkpoint is kept.
        TrackingError: MLflow is not installed or cannot be reached.
    """
    command = {"learner": "train", "encoder": "pretrain"}.get(kind, kind)
    answer = call_command(command, config, set=setting_words(overrides or {}), resume=resume)
    return TrainedRun.from_answer(answer, path=Path(answer["run"]))


@overload
def evaluate(
    model: Reference, data: Reference | Dataset, *, way: int = 5, shot: int = 1, **options: Any
) -> EvaluationResult: ...
@overload
def evaluate(
    model: Reference, data: Reference | Dataset, *, way: Numbers = 5, shot: Numbers = 1, **options: Any
) -> EvaluationTable: ...
def evaluate(
    model: Reference,
    data: Reference | Dataset,
    *,
    way: Numbers = 5,
    shot: Numbers = 1,
    split: str = "test",
    query: int = 15,
    episodes: int = 1000,
    seed: int = 0,
    mode: str = "transductive",
    baselines: bool = False,
    **options: Any,
) -> EvaluationResult | EvaluationTable:
    """Measure the few-shot accuracy of a model on seeded episodes, as `metagmvae evaluate` does.

    The result is stored with the run folder or the registered version, as by the command.

    >>> import metagmvae
    >>> result = metagmvae.evaluate("runs/glyphs", "data/glyphs", way=3, episodes=20)
    >>> print(f"{result.way}-way {result.shot}-shot: {100 * result.accuracy:.1f} ± {100 * result.ci95:.1f} %")
    3-way 1-shot: ... %
    >>> table = metagmvae.evaluate("runs/glyphs", "data/glyphs", way=3, shot=[1, 5], episodes=20)
    >>> [row["shot"] for row in table.rows]  # each with its accuracy, …
    [1, 5]

    Args:
        model: run folder, checkpoint, package or registered model. `evaluate_tasks` takes a loaded model.
        data: data set.
        way: classes per episode; several numbers: an `EvaluationTable` with a row each.
        shot: labelled images per class; one or several numbers, as `way`. The images are encoded once.
        split: whose classes the episodes are drawn from.
        query: images to classify per class.
        episodes: number of episodes.
        seed: of the episodes.
        mode: `transductive` or `inductive`.
        baselines: also evaluate the baselines on the same episodes.
        options: as in `metagmvae evaluate --help`: `html="page.html"`, `record="result.json"`, `unbalanced=True`.
            With `open=N` the rows of an `EvaluationTable` are the model and its variants.

    Raises:
        DataError: the model or the data set does not exist or does not fit the task, or an option is wrong.
    """
    one = [isinstance(number, int | np.integer) for number in (way, shot)]
    ways = {"way" if one[0] else "ways": way}
    task = {"shot": shot, "split": split, "query": query, "episodes": episodes, "seed": seed, "mode": mode} | ways
    answer = call_command("evaluate", model, data=data, baselines=baselines, **task, **options)
    if all(one) and "rows" not in answer:
        return EvaluationResult.from_answer(answer)
    return EvaluationTable.from_answer(answer, rows=answer.get("rows", [answer]))


def compare(
    models: Reference | Sequence[Reference], data: Reference | Dataset | None = None, **options: Any
) -> ComparisonResult:
    """Compare models, runs, sweeps and the paper, as `metagmvae compare` does; the first one is the reference.

    >>> import metagmvae
    >>> result = metagmvae.compare(["runs/glyphs", "paper:omniglot/umtra"], "data/glyphs", episodes=20)
    >>> [row["name"] for row in result.rows]
    ['glyphs', 'paper: UMTRA']

    Args:
        models: one or several run folders, result files, sweep folders, `models:/NAME`, `models:/NAME@ALIAS`,
            `paper:DATASET/ROW`.
        data: evaluate every model on episodes of this data set; None: their stored results.
        options: as in `metagmvae compare --help`: `way=[5, 20]`, `shot=[1, 5]`, `episodes=1000`, `html="page.html"`.

    Raises:
        DataError: a model or the data set does not exist, there is no stored result, or an option is wrong.
    """
    models = [models] if isinstance(models, str | os.PathLike) else models
    return ComparisonResult.from_answer(call_command("compare", *models, data=data, **options))


def fit(pictures: Reference, *, out: Reference | None = None, budget: str = "20m", **options: Any) -> FitResult:
    """Make a classifier from a folder of pictures within a time budget, as `metagmvae fit` does.

    Called again, it continues.

    >>> import metagmvae
    >>> model = metagmvae.fit("pictures", budget="30m")  # doctest: +SKIP
    >>> print(model.report)  # doctest: +SKIP

    Args:
        pictures: folder or archive of images; with class folders, some classes are held out to measure the accuracy.
        out: folder of the model, the report and all files; None: `models/` and the name of the pictures.
        budget: time for everything, such as `90s`, `20m` or `1h30m`.
        options: as in `metagmvae fit --help`: `labelled="some"`, `unlabelled=True`, `seed=1`.

    Raises:
        DataError: the pictures, the folder or an option is wrong; nothing is left behind.
    """
    answer = call_command("fit", pictures, out=out, budget=budget, **options)
    return FitResult.from_answer(answer, model=Path(answer["model"]), report=Path(answer["report"]))


def load_model(reference: Reference, *, shot: int | None = None) -> LoadedModel:
    """Load a trained model, from disk or from the MLflow registry.

    >>> import metagmvae
    >>> loaded = metagmvae.load_model("runs/glyphs")         # or "models:/glyphs@champion"
    >>> loaded.image_shape
    (1, 28, 28)
    >>> loaded.model.training
    False

    Args:
        reference: path of a run folder, a checkpoint or a model package; or `models:/name@alias`, `models:/name/3` or
            `runs:/id` of the MLflow store in MLFLOW_TRACKING_URI, by default `runs/mlflow`.
        shot: selects the best model for this number of shots, if the run keeps one per shot
            (`train.selection = "best"`).

    Returns:
        The model (`model`, a torch module in evaluation mode on the CPU), its `settings`, its `image_shape` and the
        `preprocessing` of its training images.

    Raises:
        DataError: there is no such model, or it is damaged.
        TrackingError: the MLflow store cannot be reached.
    """
    return resolve_model(os.fspath(reference), shot=shot)
