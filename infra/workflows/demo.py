"""`metagmvae demo`: dataset, training on Ray, evaluation, registry and classification, on generated glyphs."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from metagmvae.configs.load import load_settings
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.fewshot.baselines import nearest_class_mean
from metagmvae.evaluation.fewshot.evaluate_episodes import evaluate_features
from metagmvae.infra.registry.register import register
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.runs.run_folder import FIGURES
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.workflows.classify import ClassifyOptions, classify_folders
from metagmvae.infra.workflows.run_training import run_training
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.optional_packages import optional_package
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.package import LoadedModel, load_model, require_learner

LOG = logging.getLogger(__name__)
EPISODES = 300
QUERIES_PER_CLASS = 3
"""Image files to classify, per class."""


def run_demo(out: Path, workers: int) -> dict[str, Any]:
    """Run all stages in a new folder; return the results, which are also written to `demo.json`.

    Args:
        out: folder, new or empty.
        workers: number of Ray workers.

    Raises:
        DataError: the folder exists and is not empty.
        MissingPackageError: Ray or MLflow is not installed.
    """
    with optional_package("ray", "metagmvae demo"):
        import ray  # noqa: F401, before anything is written
    import_mlflow("metagmvae demo")
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: no empty folder; give a new folder with --out")
    overrides = [f"data.uri={out / 'glyphs'}", f"run.out={out / 'run'}", f"run.workers={workers}"]
    store = f"sqlite:///{out / 'mlflow' / 'mlflow.db'}"  # in the folder, even if MLFLOW_TRACKING_URI is set
    settings = load_settings("glyphs-demo", [*overrides, f"tracking.uri={store}"])
    with _stage("writing the dataset"):
        write_dataset(open_source("glyphs"), out / "glyphs")
    dataset = Dataset.open(out / "glyphs")
    with _stage(f"training on Ray with {workers} workers"):
        run_dir = run_training(settings)
    with _stage("evaluation on new classes"):
        rows = _evaluate(load_model(run_dir), settings, dataset)
    with _stage("registration"):
        evidence = {f"5w{row['shot']}s": {"accuracy": row["Meta-GMVAE"]} for row in rows}
        version = register(run_dir, settings.tracking, results=evidence)
    with _stage("classification of images on disk"):
        class_of_file = _write_images(out / "images", dataset)
        reference = f"models:/{version.name}@{version.alias}"
        loaded = resolve_model(reference, tracking_uri=store)
        folders = (out / "images" / "support", out / "images" / "query")
        # Transductive temperatures are fitted with 15 queries per class; with 3 the model is more certain than that.
        options = ClassifyOptions(mode="inductive", figure=out / "recognised.png")
        answer = classify_folders(loaded, *folders, options=options)
    correct = sum(class_of_file[row["query"]] == row["class"] for row in answer["queries"])
    results = {
        "accuracy on 5-way episodes": rows,
        "classified": f"{correct} of {len(class_of_file)} images correct, by {reference}",
        "picture": answer["figure"],
        "figures": str(run_dir / FIGURES),
        "look": shlex.join(["mlflow", "ui", "--backend-store-uri", store]),
        "next": "metagmvae fit IMAGES --budget 20m --out models/mine",
        "out": str(out),
    }
    write_json(out / "demo.json", results)
    return results


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Print the name of a stage on stderr, and its duration at the end."""
    start = time.perf_counter()
    LOG.info("%s …", name)
    yield
    LOG.info("%s: %.0f s", name, time.perf_counter() - start)


def _evaluate(loaded: LoadedModel, settings: Settings, dataset: Dataset) -> list[dict[str, Any]]:
    """Accuracies on the test classes, of the model and of baselines on the same episodes: one row for each shot."""
    device = torch.device("cpu")
    images, labels = dataset.images("test"), dataset.labels("test")
    untrained = build_model(settings.model, dataset.image_shape, settings.train.seed)
    model = require_learner(loaded, settings.name)
    trained_nF = encode_images(model, images, device)
    untrained_nF = encode_images(untrained, images, device)
    pixels = torch.as_tensor(images[:]).flatten(1)
    rows = []
    for shot in (1, 5):
        task: dict[str, Any] = {"way": 5, "shot": shot, "episodes": EPISODES}
        rows.append(
            {
                "shot": shot,
                "Meta-GMVAE": evaluate_features(model, settings.adapt, trained_nF, labels, **task).mean,
                "class means, trained Conv4": nearest_class_mean(trained_nF, labels, **task).mean,
                "untrained Meta-GMVAE": evaluate_features(untrained, settings.adapt, untrained_nF, labels, **task).mean,
                "class means, untrained Conv4": nearest_class_mean(untrained_nF, labels, **task).mean,
                "class means, pixels": nearest_class_mean(pixels, labels, **task).mean,
                "chance": 0.2,
            }
        )
    return rows


def _write_images(folder: Path, dataset: Dataset) -> dict[str, str]:
    """Write a 5-way 1-shot episode of test images as files; return the class of each query file."""
    from PIL import Image

    episode = EpisodeSampler(dataset.labels("test"), way=5, shot=1, query=QUERIES_PER_CLASS, seed=7).episode(0)
    names, images = dataset.class_names("test"), dataset.images("test")
    class_of_file = {}
    (folder / "query").mkdir(parents=True)
    for k, class_id in enumerate(episode.classes):
        name = names[int(class_id)]
        (folder / "support" / name).mkdir(parents=True)
        Image.fromarray(images[episode.support[k, 0]][0]).save(folder / "support" / name / "0.png")
        for number, row in enumerate(episode.query[k]):
            file = f"{k}-{number}.png"
            Image.fromarray(images[row][0]).save(folder / "query" / file)
            class_of_file[file] = name
    return class_of_file
