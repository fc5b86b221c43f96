"""`metagmvae fit`: from a folder of pictures to a classifier and a report, by the commands that exist.

The output folder is the model package (`model.json`, `model.safetensors`). It also holds `report.html`, `fit.json`
(what was decided, measured and found), and the folders `data` (shards), `run`, `results` and `example` (files of an
episode).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from metagmvae.configs.mlflow_names import model_name
from metagmvae.evaluation.provenance import provenance
from metagmvae.infra.classification.example_files import write_example
from metagmvae.infra.fitting.fit_call import FitCall, RunCommand, is_labelled, tasks_of
from metagmvae.infra.fitting.fit_evaluation import evaluate_all, evaluated_on
from metagmvae.infra.fitting.fit_plan import FitPlan, format_seconds
from metagmvae.infra.fitting.fit_report import fit_result, write_fit_report
from metagmvae.infra.fitting.fit_schedule import make_schedule
from metagmvae.infra.fitting.fit_state import (
    DATA,
    EXAMPLE,
    REPORT,
    RUN,
    FitRequest,
    FitState,
    check_same,
    claimed_folder,
    copy_package,
    read_state,
)
from metagmvae.infra.fitting.frozen_encoder import (
    compare_encoder,
    load_frozen,
    measure_comparison_s,
    requested_encoder,
)
from metagmvae.infra.fitting.make_plan import make_plan
from metagmvae.infra.runs.run_folder import SETTINGS
from metagmvae.pipelines.output_target import check_outside
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.sources.folder_layout import LabelRequest, read_layout
from metagmvae.pipelines.sources.image_files import list_images

LOG = logging.getLogger(__name__)


def run_fit(request: FitRequest, run: RunCommand) -> dict[str, Any]:
    """Prepare, train, evaluate, and write the model package and the report; continue where an earlier call stopped.

    Args:
        request: arguments of the command.
        run: runs the other commands.

    Returns:
        As `fit_report.fit_result`.

    Raises:
        DataError: the pictures or the output folder cannot be used; nothing is left behind.
    """
    started = time.monotonic()
    out = request.out.absolute()
    plan, stored = plan_fit(request)
    if stored is not None and stored.result is not None:
        return stored.result | {"state": "finished earlier, nothing was done; give another --out for a new model"}
    if plan.encoder is not None:
        load_frozen(plan.encoder)  # published weights that cannot be had are said before the training
    with claimed_folder(out):
        state = stored or FitState(plan=plan)
        fit = _Fit(out, state, run, started - sum(state.seconds.values()))
        try:
            fit.run_all(resumed=stored is not None)
        except KeyboardInterrupt as stop:
            stop.add_note(f"the same command continues in {out}")
            raise
    assert fit.state.result is not None
    return fit.state.result


def plan_fit(request: FitRequest) -> tuple[FitPlan, FitState | None]:
    """Look at the pictures and decide; return the plan and the state of an earlier call. Nothing is written.

    Raises:
        DataError: as `run_fit`.
    """
    out, pictures = request.out.absolute(), request.pictures.absolute()
    check_outside(out, pictures)
    stored = read_state(out)
    options: dict[str, Any] = {"unlabelled": request.unlabelled, "encoder": requested_encoder(request)}
    options |= {"crop": request.crop, "labels": request.labels, "groups": request.groups}
    plan = make_plan(request.pictures, request.labelled, request.budget_s, request.seed, **options)
    if stored is not None:
        check_same(out, stored.plan, plan)
    return plan, stored


class _Fit(FitCall):
    """The parts of a call, in their order."""

    def run_all(self, *, resumed: bool) -> None:
        """Do what is left."""
        for line in [*self.plan.found, *self.plan.will_do]:
            LOG.info(line)
        if resumed:
            LOG.info("continuing; finished parts are not repeated")
        self.save()
        self._prepare()
        dataset = Dataset.open(self.out / DATA)
        shots = tasks_of(dataset, "test")[1] if is_labelled(dataset, "test") else [1, 5]
        self._schedule(dataset, shots)
        self._train(dataset)
        copy_package(self.out)
        evaluated = evaluate_all(self, dataset)
        compared = compare_encoder(self, [where for where in evaluated if where in evaluated_on(self.plan)])
        example = self._classify_example(dataset)
        self._report(dataset, evaluated, compared, example)

    def _prepare(self) -> None:
        if (self.out / DATA / "dataset.json").exists():
            return
        plan = self.plan
        words = ["prepare", "folder", "--source", plan.pictures, "--out", str(self.out / DATA)]
        words += ["--seed", str(plan.seed)]
        words += [*plan.preprocessing_words, *plan.label_words]
        with self.timed("prepare"):
            answer = self.command(*words)
        if "crop" in answer:
            LOG.info(answer["crop"])
        files = answer["files"]
        if files["left_out"]:
            LOG.info(f"{files['left_out']} of {files['seen']} files were left out: {answer['left_out']}")

    def _schedule(self, dataset: Dataset, shots: Sequence[int]) -> None:
        if self.state.schedule is not None:
            return
        plan = self.plan
        with self.timed("measure speed"):
            compared_s = measure_comparison_s(plan.encoder, dataset) if plan.encoder else 0.0
            timing = (plan.budget_s, self.started)
            schedule = make_schedule(plan.preset, dataset, *timing, plan.seed, shots, compared_s)
        self.state.schedule = schedule
        self.save()
        LOG.info(
            f"measured on {schedule.device}: {schedule.pretrain_step_s:.3f} s a step of {schedule.pretrain_batch} "
            f"images; {schedule.pretrain_steps:,} steps of contrastive pre-training and {schedule.meta_steps} of "
            "meta-training"
        )
        if not schedule.fits:
            needed = schedule.used_s + schedule.reserved_s + schedule.pretrain_steps * schedule.pretrain_step_s
            LOG.info(
                f"warning: {format_seconds(plan.budget_s)} is too short for a useful training, which gets the least "
                f"number of steps; all will take about {format_seconds(needed)}"
            )

    def _train(self, dataset: Dataset) -> None:
        if "train" in self.state.seconds:
            return
        assert self.state.schedule is not None
        overrides = [f"data.uri={self.out / DATA}", f"run.out={self.out / RUN}", *self.state.schedule.overrides]
        overrides.append(f"train.seed={self.plan.seed}")
        if is_labelled(dataset, "validation"):
            way, shots, query = tasks_of(dataset, "validation")
            overrides += [f"validation.way={way}", f"validation.shots={shots}", f"validation.query={query}"]
            overrides.append(f"validation.every={self.state.schedule.meta_steps}")
        else:
            overrides.append("validation.every=0")
        registered = model_name("{data}", self.plan.pictures, self.out.name)
        overrides += [f"name={json.dumps(self.out.name)}", f"tracking.register_as={json.dumps(registered)}"]
        overrides += ["tracking.enabled=false", "run.figures=false"]
        words = ["train", self.plan.preset, *(word for o in overrides for word in ("--set", o))]
        resumed = (self.out / RUN / SETTINGS).exists()
        with self.timed("train"):
            self.command(*words, *(["--resume"] if resumed else []))

    def _classify_example(self, dataset: Dataset) -> dict[str, Any] | None:
        """Classify some of the files as a user would; None without classes that were not trained on."""
        plan = self.plan
        if plan.labelled is None and not is_labelled(dataset, "test"):
            return None
        root = plan.labelled or plan.pictures
        images = read_layout(root, list_images(root).entries, LabelRequest() if plan.labelled else plan.label_request)
        if plan.labelled is None:
            keys = set(dataset.index("test")["key"].to_pylist())
            images = [image for image in images if image.key in keys]
        class_of_file = write_example(root, self.out / EXAMPLE, images, plan.seed)
        folder, figure = self.out / EXAMPLE, self.out / EXAMPLE / "predictions.png"
        words = ["--support", str(folder / "labelled"), "--query", str(folder / "queries"), "--figure", str(figure)]
        with self.timed("classify"):
            answer = self.command("classify", str(self.out), *words)
        right = sum(class_of_file[row["query"]] == row["class"] for row in answer["queries"])
        return {"figure": figure, "right": right, "queries": len(answer["queries"])}

    def _report(
        self,
        dataset: Dataset,
        evaluated: Mapping[str, list[dict[str, Any]]],
        compared: Sequence[Mapping[str, Any]],
        example: dict[str, Any] | None,
    ) -> None:
        records = [record | {"on": where} for where, rows in evaluated.items() for record in rows]
        self.state.result = fit_result(self.state, self.out, dataset, records, compared, example)
        write_fit_report(self.out / REPORT, self.state, records, compared, example, provenance())
        self.save()
