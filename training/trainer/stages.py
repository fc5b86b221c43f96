"""A whole training run as one function, the same under every engine: contrastive training, meta-training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from metagmvae.configs.schema import Settings
from metagmvae.pipelines.records import Rows
from metagmvae.pipelines.sampling.factory import image_batches, unlabelled_sets
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.training.device import distributed
from metagmvae.training.models.encoders import EncoderModel, build_projector
from metagmvae.training.models.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.builders import (
    build_encoder_model,
    build_model,
    build_optimizer,
    build_pretrain_optimizer,
    build_schedule,
    build_view,
)
from metagmvae.training.trainer.checkpoint import random_state, restore_random_state
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState, Validate
from metagmvae.training.trainer.device_rows import DeviceRows
from metagmvae.training.trainer.frozen_features import ScaledRows, encode_all, init_head, set_scale
from metagmvae.training.trainer.loop import Hooks, Stage, fit
from metagmvae.training.trainer.steps import ContrastiveStep, MetaStep

ModelKind = Literal["meta-gmvae", "encoder"]
"""What a run trains: the whole model, or an encoder alone."""

STAGES: dict[ModelKind, tuple[str, ...]] = {"meta-gmvae": ("pretrain", "meta"), "encoder": ("pretrain",)}


def train(
    settings: Settings,
    data: Rows | StreamedImages,
    image_shape: tuple[int, int, int],
    data_fingerprint: str,
    surroundings: RunContext,
    validate: Validate | None = None,
    *,
    kind: ModelKind = "meta-gmvae",
    encoder: TrainState | None = None,
) -> TrainState:
    """Train from the newest checkpoint, or from the start, to the end; return the final state.

    Args:
        settings: of the whole run.
        data: unlabelled training images by row, `data[rows] -> uint8 (n, C, H, W)`, or `StreamedImages`; with
            `encoder` its features of them, float (n, F).
        image_shape: (C, H, W) of the images.
        data_fingerprint: kept in every checkpoint.
        surroundings: rank, device, checkpoints and metric lines.
        validate: judges the model on validation episodes; given on every rank, called on rank 0.
        kind: what is trained.
        encoder: weights of the encoder that made the features, which the model then carries; None: data are images.

    Raises:
        NonFiniteLossError: training went wrong; the last checkpoint stays.
    """
    return _Trainer(settings, data, image_shape, data_fingerprint, surroundings, validate, kind, encoder).to_the_end()


class _Trainer:
    def __init__(
        self,
        settings: Settings,
        data: Rows | StreamedImages,
        image_shape: tuple[int, int, int],
        data_fingerprint: str,
        surroundings: RunContext,
        validate: Validate | None,
        kind: ModelKind,
        encoder: TrainState | None,
    ) -> None:
        self.settings = settings
        self.on_feature_shards = encoder is not None
        self.resident = settings.data.reader == "device"
        # Features go there at the scale of the model, which is not known yet.
        if self.resident and not self.on_feature_shards:
            assert not isinstance(data, StreamedImages)  # which data.reader = "stream" gives
            data = DeviceRows(data, surroundings.device)
        self.data = data
        self.stages = STAGES[kind]
        self.surroundings = surroundings
        self.validate = validate
        self.fixed: TrainState = {
            "kind": kind,
            "settings": settings.model_dump_json(),
            "image_shape": list(image_shape),
            "data_fingerprint": data_fingerprint,
        }
        build = build_model if kind == "meta-gmvae" else build_encoder_model
        model: EncoderModel = build(settings.model, image_shape, settings.train.seed)
        if encoder is not None:
            model.encoder.load_state_dict(encoder)
        self.model = self._placed(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.train.seed)
            self.projector = build_projector(model.features, settings.pretrain.projector).to(surroundings.device)
        self.best: dict[str, dict[str, Any]] = {}
        self.elapsed = 0.0

    def _placed(self, model: EncoderModel) -> EncoderModel:
        model = model.to(self.surroundings.device)
        if self.settings.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if self.settings.train.compile:
            model.encoder.compile()
            if isinstance(model, MetaGMVAE):
                model.attention.compile()
                model.decoder.compile()
        return model

    def to_the_end(self) -> TrainState:
        saved = self.surroundings.load()
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.projector.load_state_dict(saved["projector"])
            self.best = saved["best"]
            self.elapsed = saved["elapsed"]
        at = self.stages.index(saved["stage"]) if saved is not None else 0
        last = self.stages[-1]
        state = saved
        for position in range(at, len(self.stages)):
            name = self.stages[position]
            resumed = saved if saved is not None and position == at else None
            if resumed is not None and resumed["step"] == self._steps(name):
                restore_random_state(resumed["rng"])
            elif self._steps(name) or name == last:
                state = self._stage(name, resumed)
        if state is None or (state["stage"], state["step"]) != (last, self._steps(last)):
            raise AssertionError("a run ends with the last step of its last stage")
        return state

    def _steps(self, name: str) -> int:
        return self.settings.pretrain.steps if name == "pretrain" else self.settings.train.steps

    def _stage(self, name: str, saved: TrainState | None) -> TrainState:
        start = saved["step"] if saved is not None else 0
        distributed.share_buffers(self.model)
        stage = self._build(name, start)
        if saved is not None:
            stage.optimizer.load_state_dict(saved["optimizer"])
            stage.schedule.load_state_dict(saved["schedule"])
            restore_random_state(saved["rng"])

        def state(step: int) -> TrainState:
            return {
                **self.fixed,
                "stage": name,
                "step": step,
                "model": self.model.state_dict(),
                "projector": self.projector.state_dict(),
                "optimizer": stage.optimizer.state_dict(),
                "schedule": _plain(stage.schedule.state_dict()),
                "rng": random_state(),
                "best": self.best,
                "elapsed": self.elapsed,
            }

        hooks = Hooks(
            state=state,
            after_step=lambda step: self._after_step(name, step),
            log_every=self.settings.train.log_every,
            checkpoint_every=self.settings.train.checkpoint_every,
            validate_every=self.settings.validation.every if name == self.stages[-1] and self.validate else 0,
        )
        self.elapsed = fit(stage, hooks, self.surroundings, start=start, elapsed=self.elapsed)
        return state(stage.steps)

    def _build(self, name: str, start: int) -> Stage:
        settings, world, rank = self.settings, self.surroundings.world, self.surroundings.rank
        steps = self._steps(name)
        common = {"seed": settings.train.seed, "split": settings.data.train_split}
        position = {"rank": rank, "world": world, "start_step": start, "steps": steps}
        if name == "pretrain":
            contrast = settings.pretrain
            step: nn.Module = ContrastiveStep(self.model, self.projector, settings.train, contrast)
            optimizer = build_pretrain_optimizer([self.model.encoder, self.projector], contrast)
            stream: Any = image_batches(self.data, batch=contrast.batch, **common, **position)
            schedule, per_step = contrast.schedule, contrast.batch
        else:
            assert isinstance(self.model, MetaGMVAE)
            view = build_view(settings.pretrain, self.model) if settings.train.denoise else None
            step = MetaStep(self.model, settings.train, view)
            optimizer = build_optimizer(self.model, settings.train)
            size = settings.train.set_size
            data = self._frozen_features(start) if self.model.reconstruct == "features" else self.data
            stream = unlabelled_sets(data, batch=settings.train.batch, set_size=size, **common, **position)
            schedule, per_step = settings.train.schedule, settings.train.batch * size
        return Stage(
            name=name,
            steps=steps,
            module=distributed.wrap(step, self.surroundings.device),
            optimizer=optimizer,
            schedule=build_schedule(optimizer, schedule, steps, max(1, len(self.data) // per_step)),
            stream=_Arguments(stream),
            images_per_step=per_step,
            clip_norm=settings.train.clip_norm if name == "meta" else 0.0,
        )

    def _frozen_features(self, start: int) -> ScaledRows | DeviceRows:
        """Training features at the scale of the model, which is set when the stage begins."""
        assert isinstance(self.model, MetaGMVAE)
        assert not isinstance(self.data, StreamedImages)  # refused by the settings
        raw: Rows = self.data
        if not self.on_feature_shards:
            raw = encode_all(self.model, self.data, self.surroundings.device, self.settings.train.channels_last)
        if start == 0:
            set_scale(self.model, raw)
        scaled = ScaledRows(raw, copy.deepcopy(self.model.scale).cpu())
        if start == 0 and self.settings.train.start == "components":
            init_head(self.model, scaled)
        return DeviceRows(scaled, self.surroundings.device) if self.resident else scaled

    def _after_step(self, name: str, step: int) -> MetricLine:
        """global_step always; validation results where they are due, the best model kept for each shot."""
        before = self.stages[: self.stages.index(name)]
        line: MetricLine = {"global_step": sum(map(self._steps, before)) + step}
        every = self.settings.validation.every
        due = every and (step % every == 0 or step == self._steps(name))
        if name != self.stages[-1] or not due or self.validate is None:
            return line
        if self.surroundings.rank == 0:
            self.model.eval()
            with torch.no_grad():
                scores = self.validate(self.model)
            for task, judged in scores.items():
                score = {name: float(value) for name, value in judged.items()}  # no numpy in a checkpoint
                line[f"validation/{task}"] = score["accuracy"]
                if "ci95" not in score:
                    continue  # a probe, which no model is chosen by
                line[f"validation/{task}_ci95"] = score["ci95"]
                if task not in self.best or score["accuracy"] > self.best[task]["accuracy"]:
                    weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
                    self.best[task] = {**score, "step": step, "model": weights}
        distributed.barrier()
        return line


class _Arguments:
    """A stream as the tuple of arguments that a step module takes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.batches = iter(stream)

    @property
    def waiting_s(self) -> float:
        return self.stream.waiting_s

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self

    def __next__(self) -> tuple[Any, ...]:
        batch = next(self.batches)
        return batch if isinstance(batch, tuple) else (batch,)

    def close(self) -> None:
        self.stream.close()


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without its functions, which no checkpoint may hold."""
    return {k: v for k, v in state.items() if k != "lr_lambdas"} | {"lr_lambdas": [None]}
