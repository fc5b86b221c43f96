"""Runs one job of `metagmvae table --run`: train for the budget, evaluate, write the result files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from metagmvae.configs.load import load_settings, settings_from_json, to_json
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.encoders.evaluate_encoders import evaluate_model
from metagmvae.evaluation.encoders.result_record import result_origin, result_record
from metagmvae.evaluation.paper_tables.match_results import QUERY, SPLIT, matched_settings
from metagmvae.evaluation.provenance import COMMAND
from metagmvae.infra.fitting.fit_schedule import MOST_CHECKPOINT_S, SAFETY
from metagmvae.infra.runs.run_folder import SETTINGS, read_settings
from metagmvae.infra.runs.status import read_status
from metagmvae.infra.runs.training_inputs import load_inputs
from metagmvae.infra.runs.training_speed import measure_speed
from metagmvae.infra.tables.table_jobs import Evaluation, PlannedSteps, TableJob
from metagmvae.infra.tracking.run_results import save_results
from metagmvae.infra.workflows.run_training import load_run_settings, run_training
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.package import LoadedModel, load_model

LOG = logging.getLogger(__name__)
PROBED_EPISODES, LEAST_EPISODES = 2, 20
"""Episodes that are timed before an evaluation, and the fewest that are evaluated."""
OWN_OVERRIDES = ("validation.calibration_episodes=0", "run.figures=false", "tracking.register_as=")
"""The model of a row is neither calibrated nor registered."""


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended."""

    name: str
    rows: tuple[str, ...]
    run_dir: Path
    files: tuple[str, ...]
    """Result files that it wrote."""
    seconds: float
    error: str
    """Empty: it succeeded."""


def run_job(job: TableJob, command: Sequence[str]) -> JobOutcome:
    """Do what is left of a job. An error ends this job only, and is reported in the outcome.

    Args:
        job: the training and its evaluations.
        command: words of the command that runs it, for the records.
    """
    started = time.monotonic()
    token = COMMAND.set(tuple(command))
    files: list[str] = []
    error = ""
    try:
        _train(job)
        for file in _evaluate(job):
            files.append(file)
    except Exception as failure:
        LOG.debug("%s", job.name, exc_info=True)
        known = type(failure).__module__.startswith("metagmvae.")
        lines = str(failure).splitlines() or [type(failure).__name__]
        error = lines[0] if known else f"{type(failure).__name__}: {lines[0]}"
    finally:
        COMMAND.reset(token)
    return JobOutcome(job.name, job.rows, job.run_dir, tuple(files), time.monotonic() - started, error)


def _train(job: TableJob) -> None:
    """Train, or continue where an earlier call was stopped.

    Raises:
        DataError: the run folder is of other settings; and the errors of `run_training`.
    """
    begun = (job.run_dir / SETTINGS).exists()
    if begun:
        if changed := _changed(read_settings(job.run_dir), load_settings(job.preset, job.overrides)):
            raise DataError(f"{job.run_dir}: was trained with other settings ({', '.join(changed)}); delete it")
        if read_status(job.run_dir)[0] == "FINISHED":
            return
        settings = load_run_settings(job.run_dir)
    else:
        settings = planned_settings(job)
    LOG.info("%s: %d + %d steps", job.name, settings.pretrain.steps, settings.train.steps)
    run_training(settings, resume=begun, quiet=True)


def _changed(ours: Settings, theirs: Settings) -> list[str]:
    """Names of the matched settings that differ."""
    a, b = (matched_settings(settings.model_dump(mode="json")) for settings in (ours, theirs))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def planned_settings(job: TableJob) -> Settings:
    """Return the settings of the training, with the steps of the job or as many as take the budget on this machine.

    Raises:
        DataError: the features of the dataset were made with another encoder than that of the row.
    """
    settings = _settings(job)
    if other := _changed(settings, load_inputs(settings, Dataset.open(job.data)).settings):
        raise DataError(
            f"{job.data}: its encoder is not that of the row ({', '.join(other)} differ); give other features"
        )
    steps = job.steps or planned_steps(job)
    # The last checkpoint is evaluated; where a preset selects the best one, it is validated once, at the end.
    validated = 0 if settings.train.selection == "last" else steps.meta
    return _settings(
        job,
        f"pretrain.steps={steps.pretrain}",
        f"train.steps={steps.meta}",
        f"train.checkpoint_every={steps.checkpoint_every}",
        f"validation.every={validated}",
    )


def planned_steps(job: TableJob) -> PlannedSteps:
    """Return as many steps as take the budget on this machine; the time of a step is measured on a few steps."""
    settings = _settings(job)
    speed = measure_speed(settings, Dataset.open(job.data))
    stages = {
        "pretrain.steps": (settings.pretrain.steps, speed.pretrain_step_s),
        "train.steps": (settings.train.steps, speed.meta_step_s),
    }
    steps = affordable_steps(stages, SAFETY * job.budget_s)
    slowest_s = max(speed.pretrain_step_s, speed.meta_step_s)
    every = max(1, min(settings.train.checkpoint_every, int(MOST_CHECKPOINT_S / slowest_s))) if slowest_s else 1
    return PlannedSteps(steps["pretrain.steps"], steps["train.steps"], every)


def _settings(job: TableJob, *more: str) -> Settings:
    places = [f"data.uri={json.dumps(job.data)}", f"run.out={json.dumps(str(job.run_dir))}"]
    return load_settings(job.preset, [*job.overrides, *OWN_OVERRIDES, *places, *more])


def affordable_steps(stages: Mapping[str, tuple[int, float]], budget_s: float) -> dict[str, int]:
    """Divide a budget evenly between the stages; what a stage does not need for all its steps goes to the others.

    Args:
        stages: steps and seconds of a step by stage.
        budget_s: seconds of all stages.

    Returns:
        Steps of each stage, at least one where it has any.
    """
    steps, left_s = {}, budget_s
    shortest_first = sorted(stages.items(), key=lambda stage: stage[1][0] * stage[1][1])
    for position, (name, (full, step_s)) in enumerate(shortest_first):
        share_s = left_s / (len(stages) - position)
        steps[name] = full if full * step_s <= share_s else max(1, int(share_s / step_s))
        left_s -= steps[name] * step_s
    return steps


def _evaluate(job: TableJob) -> Iterator[str]:
    """Evaluate each task, write its file and beside it the accuracy of each episode; yield the names of the files."""
    dataset = Dataset.open(job.data)
    model_by_shot = _settings(job).train.selection == "best"

    def kind(evaluation: Evaluation) -> tuple[object, ...]:
        return evaluation.adapt, evaluation.mode, evaluation.baselines, evaluation.shot if model_by_shot else 0

    for _, group in groupby(sorted(job.evaluations, key=kind), key=kind):
        evaluations = list(group)
        loaded = load_model(job.run_dir, shot=evaluations[0].shot)
        if adapt := evaluations[0].adapt:
            loaded = replace(loaded, settings=settings_from_json(to_json(loaded.settings), adapt))
        # Together the images are encoded once. Other methods read images, and an episode may take seconds.
        fast = isinstance(loaded.model, MetaGMVAE)
        for together in [evaluations] if fast else [[evaluation] for evaluation in evaluations]:
            yield from _evaluate_tasks(job, loaded, dataset, together, probe=not fast)


def _evaluate_tasks(
    job: TableJob, loaded: LoadedModel, dataset: Dataset, evaluations: Sequence[Evaluation], *, probe: bool
) -> Iterator[str]:
    """Evaluate tasks of one model, mode and kind; with `probe`, of as many episodes as are affordable."""
    first = evaluations[0]
    evaluate = partial(
        evaluate_model, loaded, dataset, split=SPLIT, mode=first.mode, baselines=first.baselines, name=job.name
    )
    tasks = [{"way": e.way, "shot": e.shot, "query": QUERY, "seed": 0} for e in evaluations]
    episodes = [job.episodes] * len(tasks)
    if probe:
        probes = evaluate([task | {"episodes": PROBED_EPISODES} for task in tasks])
        episodes = [affordable_episodes(job, result.seconds / PROBED_EPISODES) for result in probes]
    LOG.info("%s: %s", job.name, ", ".join(f"{e.way}-way {e.shot}-shot" for e in evaluations))
    results = evaluate([task | {"episodes": number} for task, number in zip(tasks, episodes, strict=True)])
    if not first.adapt:  # stored results of a run are those of its own settings
        about = {"split": SPLIT, "data": dataset.uri, "data_fingerprint": dataset.fingerprint}
        save_results(job.run_dir, SPLIT, results, about | result_origin(loaded, dataset))
    planned = {"budget_s": job.budget_s, "most_episodes": job.episodes}
    for evaluation, result in zip(evaluations, results, strict=True):
        file = job.results / f"{job.name}{evaluation.suffix}"
        result.write_parquet(file.with_suffix(".parquet"))
        write_json(file, result_record(loaded, dataset, SPLIT, str(job.run_dir), result) | planned)
        yield file.name


def affordable_episodes(job: TableJob, episode_s: float) -> int:
    """Return how many episodes of a task are evaluated: those that take the budget, but at least `LEAST_EPISODES`.

    Args:
        job: its number of episodes is the most.
        episode_s: seconds of an episode.
    """
    return min(job.episodes, max(LEAST_EPISODES, int(job.budget_s / max(episode_s, 1e-9))))
