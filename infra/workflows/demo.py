"""The whole way on generated glyphs: shards, training on Ray, episodes, registry, classification of files."""

from __future__ import annotations

import sys
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
from metagmvae.infra.workflows.classify import classify_folders
from metagmvae.infra.workflows.run_training import run_training
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.package import LoadedModel, load_model, require_meta_gmvae

EPISODES = 300
SHOWN_QUERIES = 3


def run_demo(out: Path, workers: int) -> dict[str, Any]:
    """Run every stage in a new folder; return what was found, which `demo.json` in it keeps.

    Raises:
        DataError: the folder exists and is not empty.
    """
    out = out.absolute()
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: not empty; name a new folder with --out")
    overrides = [f"data.uri={out / 'glyphs'}", f"run.out={out / 'run'}", f"run.workers={workers}"]
    store = f"sqlite:///{out / 'mlflow' / 'mlflow.db'}"  # its own, whatever MLFLOW_TRACKING_URI says
    settings = load_settings("glyphs-demo", [*overrides, f"tracking.uri={store}"])
    with _stage("glyphs into shards"):
        write_dataset(open_source("glyphs"), out / "glyphs")
    with _stage(f"training on Ray with {workers} workers"):
        run_dir = run_training(settings)
    with _stage("evaluation on classes never seen"):
        table = _evaluate(load_model(run_dir), settings, Dataset.open(out / "glyphs"))
    with _stage("registration"):
        results = {f"5w{row['shot']}s": {"accuracy": row["Meta-GMVAE"]} for row in table}
        version = register(run_dir, settings.tracking, results=results)
    with _stage("classification of images on disk"):
        truth = _write_images(out / "images", Dataset.open(out / "glyphs"))
        reference = f"models:/{version.name}@{version.alias}"
        loaded = resolve_model(reference, tracking_uri=store)
        folders = (out / "images" / "support", out / "images" / "query")
        answer = classify_folders(loaded, *folders, out / "recognised.png")
    right = sum(truth[row["query"]] == row["class"] for row in answer["queries"])
    found = {
        "accuracy on 5-way episodes": table,
        "classified": f"{right} of {len(truth)} images right, by {reference}",
        "picture": answer["figure"],
        "figures": str(run_dir / "figures"),
        "look": f"mlflow ui --backend-store-uri {store}",
        "next": "metagmvae prepare folder --source PICTURES --out data/mine, then metagmvae train omniglot-cpu "
        "--set data.uri=data/mine",
        "out": str(out),
    }
    write_json(out / "demo.json", found)
    return found


@contextmanager
def _stage(name: str) -> Iterator[None]:
    since = time.perf_counter()
    print(f"{name} …", file=sys.stderr, flush=True)
    yield
    print(f"{name}: {time.perf_counter() - since:.0f} s", file=sys.stderr, flush=True)


def _evaluate(loaded: LoadedModel, settings: Settings, dataset: Dataset) -> list[dict[str, Any]]:
    """Accuracies on test classes, all rows on the same episodes."""
    device = torch.device("cpu")
    images, labels = dataset.images("test"), dataset.labels("test")
    untrained = build_model(settings.model, dataset.image_shape, settings.train.seed)
    model = require_meta_gmvae(loaded, settings.name)
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
    """One 5-way 1-shot task of test images as files; returns the true class of each query file."""
    from PIL import Image

    episode = EpisodeSampler(dataset.labels("test"), way=5, shot=1, query=SHOWN_QUERIES, seed=7).episode(0)
    names, images = dataset.class_names("test"), dataset.images("test")
    truth = {}
    (folder / "query").mkdir(parents=True)
    for k, class_id in enumerate(episode.classes):
        name = names[int(class_id)]
        (folder / "support" / name).mkdir(parents=True)
        Image.fromarray(images[episode.support[k, 0]][0]).save(folder / "support" / name / "0.png")
        for number, row in enumerate(episode.query[k]):
            file = f"{k}-{number}.png"
            Image.fromarray(images[row][0]).save(folder / "query" / file)
            truth[file] = name
    return truth
