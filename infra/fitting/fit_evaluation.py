"""Evaluation in `metagmvae fit`: the test split, labelled pictures, or augmented views."""

from __future__ import annotations

from typing import Any

from metagmvae.evaluation.uncertainty.augmented_accuracy import evaluate_augmented, result_record
from metagmvae.infra.fitting.fit_call import FitCall, is_labelled, tasks_of
from metagmvae.infra.fitting.fit_plan import FitPlan
from metagmvae.infra.fitting.fit_state import DATA, LABELLED, RESULTS, RUN
from metagmvae.infra.runs.training_speed import measure_episode_s
from metagmvae.pipelines.files import read_json, write_json
from metagmvae.pipelines.records import printable
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.package import load_model

LABELLED_PICTURES = "labelled pictures"


def evaluated_on(plan: FitPlan) -> dict[str, tuple[str, str]]:
    """Where a model is evaluated on classes: folder of the dataset in the output folder, and split."""
    return {_test_images(plan): (DATA, "test"), LABELLED_PICTURES: (LABELLED, "train")}


def _test_images(plan: FitPlan) -> str:
    return f"test images of another {printable(plan.groups)}" if plan.groups else "test classes"


def evaluate_all(call: FitCall, dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Evaluate on the test split and on the labelled pictures; return the records of each, by where."""
    evaluated = {}
    if is_labelled(dataset, "test"):
        evaluated[_test_images(call.plan)] = _evaluate(call, dataset, "test", "test")
    if call.plan.labelled is not None:
        folder = call.out / LABELLED
        if not (folder / "dataset.json").exists():
            words = ["prepare", "folder", "--source", call.plan.labelled, "--out", str(folder)]
            words += call.plan.preprocessing_words
            call.command(*words, "--validation-classes", "0", "--test-classes", "0")
        evaluated[LABELLED_PICTURES] = _evaluate(call, Dataset.open(folder), "train", LABELLED)
    return evaluated or {"augmented views of training images, no classes": _evaluate_views(call, dataset)}


def _evaluate_views(call: FitCall, dataset: Dataset) -> list[dict[str, Any]]:
    """Evaluate on pseudo-episodes; there is no command for it."""
    record = call.out / RESULTS / "augmented.json"
    if not record.exists():
        assert call.state.schedule is not None
        record.parent.mkdir(exist_ok=True)
        with call.timed("evaluate augmented views"):
            episodes = min(300, call.state.schedule.episodes)
            results = evaluate_augmented(load_model(call.out / RUN), dataset, "train", episodes=episodes)
            write_json(record, [result_record(result) for result in results])
    rows: list[dict[str, Any]] = read_json(record)
    return rows


def _evaluate(call: FitCall, dataset: Dataset, split: str, name: str) -> list[dict[str, Any]]:
    assert call.state.schedule is not None
    way, shots, query = tasks_of(dataset, split)
    records = []
    for position, shot in enumerate(shots):
        record = call.out / RESULTS / f"{name}-{way}way-{shot}shot.json"
        if not record.exists():
            record.parent.mkdir(exist_ok=True)
            words = ["evaluate", str(call.out / RUN), "--data", str(dataset.uri), "--split", split]
            words += ["--way", str(way), "--shot", str(shot), "--query", str(query)]
            left_s = call.plan.budget_s - sum(call.state.seconds.values())
            tasks_left = len(shots) - position + 2 * (name != LABELLED and call.plan.labelled is not None)
            episode_s = measure_episode_s(way, shot, query)
            episodes = call.state.schedule.affordable_episodes(left_s / tasks_left, episode_s)
            words += ["--episodes", str(episodes), "--baselines", "--record", str(record)]
            with call.timed(f"evaluate {name}, {shot} shot"):
                call.command(*words)
        records.append(read_json(record))
    return records
