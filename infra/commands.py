"""What each command does: a few calls, and a plain answer that is printed as text or JSON."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

Answer = dict[str, Any]

SOURCE_OPTIONS = ("split", "size", "channels", "invert", "classes", "fractions", "max_broken")
"""Of `prepare`: those that are given go to the source, which refuses what it does not know."""


def text(answer: Answer) -> str:
    """An answer for people: one `key: value` a line, tables of rows as they are."""
    lines = []
    for key, value in answer.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{key}:")
            lines += ["  " + "  ".join(f"{k} {_plain(v)}" for k, v in row.items()) for row in value]
        else:
            lines.append(f"{key}: {_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)


def prepare(arguments: Namespace) -> Answer:
    from pipelines.shards import write_dataset
    from pipelines.sources import open_source

    given = {name: getattr(arguments, name) for name in SOURCE_OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    source = open_source(arguments.name, arguments.source, **options)
    manifest = write_dataset(source, arguments.out, seed=arguments.seed)
    return {
        "data": str(Path(arguments.out).absolute()),
        "name": manifest["name"],
        "samples": {split: part["samples"] for split, part in manifest["splits"].items()},
        "classes": {split: part["classes"] for split, part in manifest["splits"].items()},
        "shards": {split: len(part["shards"]) for split, part in manifest["splits"].items()},
        "skipped": source.report.get("skipped", []),
    }


def train(arguments: Namespace) -> Answer:
    from configs.load import load_settings
    from infra.surroundings import METRICS, read_lines
    from infra.wiring import run_training

    settings = load_settings(arguments.config, arguments.overrides)
    run_dir = run_training(settings, resume=arguments.resume, quiet=arguments.quiet or arguments.json)
    last = read_lines(run_dir / METRICS)[-1]
    answer: Answer = {"run": str(run_dir), "last": last}
    if settings.tracking.enabled and settings.tracking.register_as:
        from infra.registry import register

        answer["registered"] = register(run_dir, settings.tracking).uri
    return answer


def evaluate(arguments: Namespace) -> Answer:
    import torch

    from evaluation.benchmark import evaluate as judge
    from infra.model_uri import resolve_model
    from pipelines.dataset import Dataset

    dataset = Dataset.open(arguments.data)
    dataset.split(arguments.split)
    loaded = resolve_model(arguments.model, shot=arguments.shot)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = judge(
        loaded.model.to(device),
        loaded.settings.adapt,
        dataset.images(arguments.split),
        dataset.labels(arguments.split),
        way=arguments.way,
        shot=arguments.shot,
        query=arguments.query,
        episodes=arguments.episodes,
        seed=arguments.seed,
        mode=arguments.mode,
        device=device,
    )
    if arguments.results:
        results.write_parquet(arguments.results)
    answer = results.summary() | {
        "split": arguments.split,
        "data": str(arguments.data),
        "data_fingerprint": dataset.fingerprint,
        "model": str(arguments.model),
    }
    if arguments.record:
        from configs.load import fingerprint
        from evaluation.environment import environment_record
        from pipelines.files import write_json

        settings = loaded.settings.model_dump(mode="json", include={"model", "adapt", "warmup", "train"})
        made_with = {
            "settings": settings,
            "settings_fingerprint": fingerprint(loaded.settings),
            "trained": loaded.info,
            "source_fingerprint": dataset.manifest["source_fingerprint"],
            "environment": environment_record(),
        }
        write_json(arguments.record, answer | made_with)
    return answer


def classify(arguments: Namespace) -> Answer:
    from infra.classify import classify_folders
    from infra.model_uri import resolve_model

    return classify_folders(resolve_model(arguments.model), Path(arguments.support), Path(arguments.query))


def track(arguments: Namespace) -> Answer:
    from infra.tracking import track as send

    report = send(arguments.run_dir)
    return {"uri": report.uri, "run_id": report.run_id, "experiment": report.experiment, "status": report.status}


def demo(arguments: Namespace) -> Answer:
    from infra.demo import run_demo

    return run_demo(Path(arguments.out), arguments.workers)
