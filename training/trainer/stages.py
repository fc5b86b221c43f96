"""A complete training run, the same under every engine: contrastive pre-training, then meta-training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from metagmvae.configs.schema import Settings
from metagmvae.pipelines.grouped_labels import EpisodeLabels
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import Rows
from metagmvae.pipelines.sampling.factory import image_batches
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.training.device import distributed
from metagmvae.training.methods.frozen_features import ScaledRows, fit_feature_scaling
from metagmvae.training.methods.method import MethodData
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.meta_learner import MetaLearner
from metagmvae.training.pretraining.objectives_by_name import build_auxiliary, build_pretrain_step
from metagmvae.training.pretraining.step import PretrainStep
from metagmvae.training.trainer.builders import (
    build_encoder_model,
    build_model,
    build_optimizer,
    build_pretrain_optimizer,
    build_schedule,
)
from metagmvae.training.trainer.checkpoint import random_state, restore_random_state
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState, Validate
from metagmvae.training.trainer.device_rows import DeviceRows
from metagmvae.training.trainer.loop import Hooks, Stage, fit_stage
from metagmvae.training.trainer.resume import check_same_run, restoring, stored_kind
from metagmvae.training.trainer.training_features import training_features, view_features

ModelKind = Literal["learner", "encoder"]
"""What a run trains: the model of a method, or an encoder only."""

STAGES: dict[ModelKind, tuple[str, ...]] = {"learner": ("pretrain", "meta"), "encoder": ("pretrain",)}


def train(
    settings: Settings,
    data: Rows | StreamedImages,
    image_shape: tuple[int, int, int],
    data_fingerprint: str,
    context: RunContext,
    validate: Validate | None = None,
    *,
    kind: ModelKind = "learner",
    encoder: TrainState | None = None,
    labels: EpisodeLabels | None = None,
    preprocessing: Preprocessing | None = None,
) -> TrainState:
    """Train all stages from the newest checkpoint, or from the start, to the end; return the final state.

    Args:
        settings: of the run.
        data: unlabelled training images by row index, uint8 (n, C, H, W), or `StreamedImages`; with `encoder`, the
            features of the images, float (n, F).
        image_shape: (C, H, W) of the images.
        data_fingerprint: stored in every checkpoint.
        context: rank, device, checkpoints and metric lines.
        validate: evaluates the model on validation episodes; given on every rank, called on rank 0.
        kind: what is trained.
        encoder: state dict of the encoder that made the features; the model includes it. None: the data are images.
        labels: classes of the training images, and groups if they have them; only for a method that needs them.
        preprocessing: of the images, stored in every checkpoint; None: unknown.

    Raises:
        NonFiniteLossError: the loss or a gradient is not finite; the last checkpoint stays.
    """
    return _Trainer(
        settings, data, image_shape, data_fingerprint, context, validate, kind, encoder, labels, preprocessing
    ).fit()


@dataclass
class _Trainer:
    """The state of a run; arguments as in `train`."""

    settings: Settings
    data: Rows | StreamedImages
    image_shape: tuple[int, int, int]
    data_fingerprint: str
    context: RunContext
    validate: Validate | None
    kind: ModelKind
    encoder: TrainState | None
    labels: EpisodeLabels | None
    preprocessing: Preprocessing | None

    def __post_init__(self) -> None:
        settings, device = self.settings, self.context.device
        self.keep_on_device = settings.data.reader == "device"
        # Features are moved to the device later, when their scaling is known.
        if self.keep_on_device and self.encoder is None:
            assert not isinstance(self.data, StreamedImages)  # which data.reader = "stream" gives
            self.data = DeviceRows(self.data, device)
        self.stages = STAGES[self.kind]
        self.method = find_method(settings.method)
        model: EncoderModel
        if self.kind == "learner":
            model = build_model(settings.model, self.image_shape, settings.train.seed, settings.method)
        else:
            model = build_encoder_model(settings.model, self.image_shape, settings.train.seed)
        if self.encoder is not None:
            model.encoder.load_state_dict(self.encoder)
        self.model = self._prepare(model)
        self.projector = build_auxiliary(self.model, settings, len(self.data)).to(device)
        self.best: dict[str, dict[str, Any]] = {}
        self.remembered: dict[str, torch.Tensor] = {}
        self.elapsed = 0.0

    def _prepare(self, model: EncoderModel) -> EncoderModel:
        """Move the model to the device, set its memory format, and compile it where the settings say so."""
        model = model.to(self.context.device)
        if self.settings.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if self.settings.train.compile:
            for network in model.compiled_networks:
                network.compile()
        return model

    def fit(self) -> TrainState:
        """Run the stages that are left."""
        saved = self.context.load()
        if saved is not None:
            check_same_run(saved, self.settings, self.data_fingerprint, self.kind)
            with restoring():
                self.model.load_state_dict(saved["model"])
                self.projector.load_state_dict(saved["projector"])
            self.best = saved["best"]
            self.remembered = saved.get("remembered", {})
            self.elapsed = saved["elapsed"]
        first = self.stages.index(saved["stage"]) if saved is not None else 0
        last = self.stages[-1]
        state = saved
        for position, name in enumerate(self.stages[first:]):
            resumed = saved if position == 0 else None
            if resumed is not None and resumed["step"] == self._steps(name):
                with restoring():
                    restore_random_state(resumed["rng"])
            elif self._steps(name) or name == last:
                state = self._fit_stage(name, resumed)
        if state is None or (state["stage"], state["step"]) != (last, self._steps(last)):
            raise AssertionError("a run must end with the last step of its last stage")
        return state

    def _steps(self, name: str) -> int:
        return self.settings.pretrain.steps if name == "pretrain" else self.settings.train.steps

    def _fit_stage(self, name: str, saved: TrainState | None) -> TrainState:
        """Train one stage from its beginning, or from a checkpoint in it; return the state at its end."""
        start = saved["step"] if saved is not None else 0
        distributed.broadcast_buffers(self.model)
        stage = self._build_stage(name, start)
        if saved is not None:
            with restoring():
                stage.optimizer.load_state_dict(saved["optimizer"])
                stage.schedule.load_state_dict(saved["schedule"])
                restore_random_state(saved["rng"])
        hooks = Hooks(
            state=lambda step: self._state(stage, step),
            after_step=lambda step: self._after_step(name, step),
            log_every=self.settings.train.log_every,
            checkpoint_every=self.settings.train.checkpoint_every,
            validate_every=self.settings.validation.every if name == self.stages[-1] and self.validate else 0,
        )
        window = saved.get("window") if saved is not None else None
        self.elapsed = fit_stage(stage, hooks, self.context, start=start, elapsed=self.elapsed, window=window)
        return self._state(stage, stage.steps)

    def _state(self, stage: Stage, step: int) -> TrainState:
        """The checkpoint after a step."""
        # A checkpoint contains no functions, so not those of the schedule.
        schedule = stage.schedule.state_dict() | {"lr_lambdas": [None]}
        return {
            "kind": stored_kind(self.settings, self.kind),
            "settings": self.settings.model_dump_json(),
            "image_shape": list(self.image_shape),
            "data_fingerprint": self.data_fingerprint,
            "preprocessing": self.preprocessing and self.preprocessing.model_dump(mode="json"),
            "stage": stage.name,
            "step": step,
            "model": self.model.state_dict(),
            "projector": self.projector.state_dict(),
            "optimizer": stage.optimizer.state_dict(),
            "schedule": schedule,
            "rng": random_state(),
            "best": self.best,
            "remembered": self.remembered,
            "elapsed": self.elapsed,
        }

    def _build_stage(self, name: str, start: int) -> Stage:
        settings, context = self.settings, self.context
        steps = self._steps(name)
        common = {"seed": settings.train.seed, "split": settings.data.train_split}
        position = {"rank": context.rank, "world": context.world, "start_step": start, "steps": steps}
        if name == "pretrain":
            pretrain = settings.pretrain
            step: nn.Module = build_pretrain_step(self.model, self.projector, settings)
            optimizer = build_pretrain_optimizer([self.model.encoder, self.projector], pretrain)
            rows_too = {"with_rows": True} if step.needs_rows else {}
            stream: Any = image_batches(self.data, batch=pretrain.batch, **rows_too, **common, **position)
            schedule, images_per_step = pretrain.schedule, pretrain.batch
        else:
            step = self.method.step(self.model, settings)
            optimizer = build_optimizer(self.model, settings.train)
            stream = self._meta_stream(start, common | position)
            schedule, images_per_step = settings.train.schedule, self.method.images_per_step(settings)
        return Stage(
            name=name,
            steps=steps,
            module=distributed.data_parallel(step, context.device),
            optimizer=optimizer,
            schedule=build_schedule(optimizer, schedule, steps, max(1, len(self.data) // images_per_step)),
            stream=iter(stream),
            images_per_step=images_per_step,
            clip_norm=settings.train.clip_norm if name == "meta" else 0.0,
            start_step=partial(self._start_step, step, optimizer) if isinstance(step, PretrainStep) else None,
        )

    def _start_step(self, module: PretrainStep, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Let the objective work before a step; what it initialises again also starts anew in the optimiser."""
        for parameter in module.start_step(step, self.data):
            for value in optimizer.state.get(parameter, {}).values():
                value.zero_()

    def _meta_stream(self, start: int, position: dict[str, Any]) -> Iterable[Any]:
        """Batches of meta-training; none, if nothing is trained."""
        raw = cache(self._raw_features)
        rows = self._scaled_features(raw(), start) if self.method.on_features(self.settings) else self.data
        if not position["steps"]:
            return ()
        every_row = np.arange(len(self.data))
        data = MethodData(rows, self.data, self.labels, lambda: np.asarray(raw()[every_row]), self._remember)
        return self.method.stream(data, self.settings, **position)

    def _remember(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of this name in the checkpoint, or a new one, which all later checkpoints have."""
        if name not in self.remembered:
            self.remembered[name] = torch.from_numpy(compute())
        return self.remembered[name].numpy()

    def _scaled_features(self, raw: Rows, start: int) -> ScaledRows | DeviceRows:
        """Training features, scaled. Step 0 fits the scaling, and initialises the model by them.

        Every rank encodes all images with equal weights and buffers, so the result is the same on all ranks.
        """
        assert isinstance(self.model, MetaLearner)
        assert not isinstance(self.data, StreamedImages)
        if start == 0:
            encode_views = partial(view_features, self.model, self.settings, self.data, self.context.device)
            fit_feature_scaling(self.model, raw, encode_views)
        scaled = ScaledRows(raw, copy.deepcopy(self.model.scale).cpu())
        if start == 0:
            self.method.start(self.model, self.settings, scaled)
        return DeviceRows(scaled, self.context.device) if self.keep_on_device else scaled

    def _raw_features(self) -> Rows:
        """Features of the frozen encoder for the training images, float32 (n, F)."""
        assert not isinstance(self.data, StreamedImages)  # refused by the settings
        if self.encoder is not None:
            return self.data
        return training_features(self.model, self.settings, self.data, self.context.device)

    def _after_step(self, name: str, step: int) -> MetricLine:
        """The global step, and the validation results where validation is due."""
        line: MetricLine = {"global_step": sum(map(self._steps, self.stages[: self.stages.index(name)])) + step}
        every = self.settings.validation.every
        due = every and (step % every == 0 or step == self._steps(name))
        if name != self.stages[-1] or not due or self.validate is None:
            return line
        if self.context.rank == 0:
            self.model.eval()
            with torch.no_grad():
                results = self.validate(self.model)
            for task, result in results.items():
                score = {key: float(value) for key, value in result.items()}  # no NumPy types in a checkpoint
                line[f"validation/{task}"] = score["accuracy"]
                if "ci95" in score:
                    line[f"validation/{task}_ci95"] = score["ci95"]
                    self._keep_best(task, score, step)
        distributed.barrier()
        return line

    def _keep_best(self, task: str, score: dict[str, float], step: int) -> None:
        """Keep the weights if they are the best so far on a task. (Linear probes, without `ci95`, select no model.)"""
        if task not in self.best or score["accuracy"] > self.best[task]["accuracy"]:
            weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            self.best[task] = {**score, "step": step, "model": weights}
