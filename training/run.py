"""A whole training run as one function, the same under every engine: contrastive warm-up, meta-training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from configs.schema import Settings
from pipelines.tar_stream import image_batches, unlabelled_sets
from training import parallel
from training.builders import build_model, build_optimizer, build_schedule, build_warmup_optimizer
from training.checkpoint import random_state, restore_random_state
from training.hooks import Line, State, Surroundings, Validate
from training.loop import Hooks, Stage, fit
from training.meta_gmvae import MetaGMVAE
from training.networks import FeatureScale
from training.steps import ContrastiveStep, MetaStep, to_device

STAGES = ("warmup", "meta")
ENCODE_ROWS = 1024


def train(
    settings: Settings,
    images: Any,
    image_shape: tuple[int, int, int],
    data_fingerprint: str,
    surroundings: Surroundings,
    validate: Validate | None = None,
) -> State:
    """Train from the newest checkpoint, or from the start, to the end; return the final state.

    Args:
        settings: of the whole run.
        images: unlabelled training images by row, `images[rows] -> uint8 (n, C, H, W)`, or `StreamedImages`.
        image_shape: (C, H, W).
        data_fingerprint: kept in every checkpoint.
        surroundings: rank, device, checkpoints and metric lines.
        validate: judges the model on validation episodes; given on every rank, called on rank 0.

    Raises:
        NonFiniteLossError: training went wrong; the last checkpoint stays.
    """
    return _Run(settings, images, image_shape, data_fingerprint, surroundings, validate).to_the_end()


class _Run:
    def __init__(
        self,
        settings: Settings,
        images: Any,
        image_shape: tuple[int, int, int],
        data_fingerprint: str,
        surroundings: Surroundings,
        validate: Validate | None,
    ) -> None:
        self.settings = settings
        self.images = images
        self.surroundings = surroundings
        self.validate = validate
        self.fixed: State = {
            "settings": settings.model_dump_json(),
            "image_shape": list(image_shape),
            "data_fingerprint": data_fingerprint,
        }
        self.model = self._placed(build_model(settings.model, image_shape, settings.train.seed))
        self.best: dict[str, dict[str, Any]] = {}
        self.elapsed = 0.0

    def _placed(self, model: MetaGMVAE) -> MetaGMVAE:
        model = model.to(self.surroundings.device)
        if self.settings.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if self.settings.train.compile:
            model.encoder.compile()
            model.attention.compile()
            model.decoder.compile()
        return model

    def to_the_end(self) -> State:
        saved = self.surroundings.load()
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.best = saved["best"]
            self.elapsed = saved["elapsed"]
        at = STAGES.index(saved["stage"]) if saved is not None else 0
        final = self.settings.train.steps
        state = saved
        for position in range(at, len(STAGES)):
            name = STAGES[position]
            resumed = saved if saved is not None and position == at else None
            if resumed is not None and resumed["step"] == self._steps(name):
                restore_random_state(resumed["rng"])
            elif self._steps(name) or name == "meta":
                state = self._stage(name, resumed)
        if state is None or (state["stage"], state["step"]) != ("meta", final):
            raise AssertionError("a run ends with the last step of its last stage")
        return state

    def _steps(self, name: str) -> int:
        return self.settings.warmup.steps if name == "warmup" else self.settings.train.steps

    def _stage(self, name: str, saved: State | None) -> State:
        start = saved["step"] if saved is not None else 0
        parallel.share_buffers(self.model)
        stage = self._build(name, start)
        if saved is not None:
            stage.optimizer.load_state_dict(saved["optimizer"])
            stage.schedule.load_state_dict(saved["schedule"])
            restore_random_state(saved["rng"])

        def state(step: int) -> State:
            return {
                **self.fixed,
                "stage": name,
                "step": step,
                "model": self.model.state_dict(),
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
            validate_every=self.settings.validation.every if name == "meta" and self.validate else 0,
        )
        self.elapsed = fit(stage, hooks, self.surroundings, start=start, elapsed=self.elapsed)
        return state(stage.steps)

    def _build(self, name: str, start: int) -> Stage:
        settings, world, rank = self.settings, self.surroundings.world, self.surroundings.rank
        steps = self._steps(name)
        common = {"seed": settings.train.seed, "split": settings.data.train_split}
        position = {"rank": rank, "world": world, "start_step": start, "steps": steps}
        if name == "warmup":
            warm = settings.warmup
            step: torch.nn.Module = ContrastiveStep(self.model, settings.train, warm.temperature)
            optimizer = build_warmup_optimizer(self.model.encoder, warm)
            stream: Any = image_batches(self.images, batch=warm.batch, **common, **position)
            schedule, per_step = "one-cycle", warm.batch
        else:
            step = MetaStep(self.model, settings.train)
            optimizer = build_optimizer(self.model, settings.train)
            size = settings.train.set_size
            data = self._frozen_features(start) if settings.model.reconstruct == "features" else self.images
            stream = unlabelled_sets(data, batch=settings.train.batch, set_size=size, **common, **position)
            schedule, per_step = settings.train.schedule, settings.train.batch * size
        return Stage(
            name=name,
            steps=steps,
            module=parallel.wrap(step, self.surroundings.device),
            optimizer=optimizer,
            schedule=build_schedule(optimizer, schedule, steps),
            stream=_Arguments(stream),
            images_per_step=per_step,
            clip_norm=settings.train.clip_norm if name == "meta" else 0.0,
        )

    @torch.no_grad()
    def _frozen_features(self, start: int) -> np.ndarray:
        """Features of all training images, each encoded once: (n, F) float32, at one scale.

        Every rank encodes all of them by the same weights and buffers, so all ranks have the same statistics
        without a word between them.
        """
        self.model.eval()
        pieces = []
        for first in range(0, len(self.images), ENCODE_ROWS):
            rows = np.arange(first, min(first + ENCODE_ROWS, len(self.images)))
            x = self.model.scale_images(to_device(self.images[rows], self.surroundings.device))
            if self.settings.train.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            pieces.append(self.model.encoder(x).cpu())
        raw = torch.cat(pieces)
        scale = self.model.scale
        assert isinstance(scale, FeatureScale)
        scale.cpu()
        if start == 0:
            scale.set_statistics(raw)
        features = torch.cat([scale(piece) for piece in raw.split(ENCODE_ROWS)]).numpy()
        scale.to(self.surroundings.device)
        return features

    def _after_step(self, name: str, step: int) -> Line:
        """global_step always; validation results where they are due, the best model kept for each shot."""
        warm = self.settings.warmup.steps
        line: Line = {"global_step": step if name == "warmup" else warm + step}
        every = self.settings.validation.every
        due = every and (step % every == 0 or step == self.settings.train.steps)
        if name != "meta" or not due or self.validate is None:
            return line
        if self.surroundings.rank == 0:
            self.model.eval()
            with torch.no_grad():
                scores = self.validate(self.model)
            for task, judged in scores.items():
                score = {name: float(value) for name, value in judged.items()}  # no numpy in a checkpoint
                line[f"validation/{task}"] = score["accuracy"]
                line[f"validation/{task}_ci95"] = score["ci95"]
                if task not in self.best or score["accuracy"] > self.best[task]["accuracy"]:
                    weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
                    self.best[task] = {**score, "step": step, "model": weights}
        parallel.barrier()
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
