"""The check that the tests of another package call for a method that it adds (entry point).

It raises an AssertionError that names the rule and what breaks it.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metagmvae.configs.schema import Settings
from metagmvae.infra.api.testing import check_rule
from metagmvae.training.methods.method import MethodData
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.package import LoadedModel, load_package, save_package
from metagmvae.training.trainer.stages import train

CLASSES, PER_CLASS = 5, 8
"""Classes of the generated images, and images of each."""
LABELS = torch.tensor([1, 0, 2, 0, 1, 1])
"""Classes of the labelled images: in any order, with unequal shots."""


def check_method(name: str, image_shape: tuple[int, int, int] = (1, 28, 28), **method: Any) -> MetaLearner:
    """Check a method as `method.name = NAME` trains it on generated images (C, H, W).

    The seed decides the initial weights; the batch of a step depends on its number alone; `prepare` draws the same
    random numbers again; a killed and resumed training equals an uninterrupted one bit for bit; the model answers in
    each of its modes with probabilities that depend on nothing else than they may; and it is packaged.

    Args:
        name: of the method.
        image_shape: of the images.
        method: other settings of [method]; without them tasks are 3-way 1-shot with classes from labels.

    Returns:
        The trained model, for further checks.

    Raises:
        AssertionError: a rule is broken.
        DataError: the method refuses the settings.
    """
    settings = _method_settings(name, method)
    models = [build_model(settings.model, image_shape, seed, settings.method) for seed in (0, 0, 1)]
    equal = [equal_tensors(models[0].state_dict(), other.state_dict()) for other in models[1:]]
    check_rule(equal[0], "two models with the same seed differ; draw weights from torch's generator only")
    if settings.train.steps:
        check_rule(not equal[1], "the seed does not decide the initial weights")
        _check_step(settings, models[0], image_shape)
    whole, killed = (
        MemoryContext(),
        MemoryContext(killed_at=settings.pretrain.steps + (3 if settings.train.steps else 0)),
    )
    state = _train(settings, whole, image_shape)
    try:
        _train(settings, killed, image_shape)
    except InterruptedError:
        again = _train(settings, MemoryContext(killed.state), image_shape)
        check_rule(
            equal_tensors(state["model"], again["model"]), "a killed and resumed training ends with other weights"
        )
    model = models[2]
    model.load_state_dict(state["model"])
    _check_answers(settings, model.eval(), image_shape)
    with tempfile.TemporaryDirectory() as folder:
        save_package(Path(folder) / "package", LoadedModel(model, settings, image_shape, {}))
        loaded = load_package(Path(folder) / "package").model
        assert isinstance(loaded, MetaLearner)
        answers = [_answer(settings, each, image_shape, each.modes[0]) for each in (model, loaded)]
        # Another memory format of the weights rounds differently.
        check_rule(
            torch.allclose(answers[0], answers[1], atol=1e-4),
            "a packaged model answers differently: its state_dict does not hold everything",
        )
    return model


def _method_settings(name: str, method: dict[str, Any]) -> Settings:
    task = {"way": 3, "shot": 1, "query": 2, "tasks": "labels", "clusters": 4, "partitions": 1}
    sections: dict[str, Any] = {
        "method": task | {"name": name} | method,
        "model": {"channels": 8, "latent": 4, "width": 16, "heads": 2, "layers": 1},
        "adapt": {"samples": 4, "iterations": 2},
        "pretrain": {"batch": 8},
        "train": {"steps": 4, "batch": 2, "set_size": 12, "samples": 4, "components": 3, "checkpoint_every": 2},
        "validation": {"every": 0},
    }
    settings = Settings.model_validate(sections)
    found = find_method(settings.method)
    sections["pretrain"]["steps"] = 2 if found.needs_encoder(settings) else 0
    sections["train"]["steps"] = 4 if found.needs_steps(settings) else 0
    return Settings.model_validate(sections)


class MemoryContext(RunContext):
    """Keeps the last checkpoint, and ends the training before it records the line of a step."""

    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self, state: TrainState | None = None, killed_at: int = 0) -> None:
        self.state, self.killed_at = state, killed_at

    def load(self) -> TrainState | None:
        return self.state

    def report(self, line: MetricLine | None, state: TrainState | None) -> None:
        if line is not None and self.killed_at and int(line["global_step"]) >= self.killed_at:
            raise InterruptedError
        self.state = copy.deepcopy(state) or self.state


def generated_images(image_shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images of some classes, uint8, and their classes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    bright = rng.random((CLASSES, *image_shape)) < 0.4
    return (bright[labels] ^ (rng.random((len(labels), *image_shape)) < 0.1)).astype(np.uint8) * 255, labels


def _train(settings: Settings, context: MemoryContext, image_shape: tuple[int, int, int]) -> TrainState:
    images, labels = generated_images(image_shape)
    torch.manual_seed(0 if context.state is None else 1)
    return train(settings, images, image_shape, "generated", context, labels=labels)


def _check_step(settings: Settings, model: MetaLearner, image_shape: tuple[int, int, int]) -> None:
    """Check the batches and the step module of a method."""
    images, labels = generated_images(image_shape)
    method, raw = find_method(settings.method), encode_images(model, images, MemoryContext.device, raw=True).numpy()
    data = MethodData(raw if method.on_features(settings) else images, images, labels, lambda: raw)
    first, later = (method.stream(data, settings, seed=0, split="train", start_step=start) for start in (0, 2))
    batch = first.at(2)
    step: Any = method.step(model, settings).train()
    before = torch.get_rng_state()
    prepared, again, other = (step.prepare(each) for each in (batch, batch, later.at(2)))
    check_rule(equal_tensors(prepared, other), "the batch of a step depends on the steps before")
    check_rule(equal_tensors(prepared, again), "`prepare` draws other random numbers for the same batch")
    loss, metrics = step.compute(*prepared)
    check_rule(torch.equal(before, torch.get_rng_state()), "a step draws from the global generator; use keyed ones")
    check_rule(
        loss.ndim == 0 and bool(loss.isfinite()) and loss.requires_grad, "the loss is no finite scalar with gradient"
    )
    check_rule(not any(value.requires_grad for value in metrics.values()), "metrics have a gradient; detach them")


def _answer(
    settings: Settings, model: MetaLearner, image_shape: tuple[int, int, int], mode: PredictionMode, episodes: int = 2
) -> Tensor:
    images, labels = generated_images(image_shape)
    x = model.scale_images(torch.tensor(images))
    with torch.no_grad():
        h = model.encode_images(x)
        rows = [int(np.flatnonzero(labels == k)[i]) for i, k in enumerate(LABELS.tolist())]
        support, query = (h[r].expand(episodes, *h[r].shape) for r in (rows, [0, 9, 17, 25]))
        options: dict[str, Any] = {"mode": mode, "seed_by_episode": range(episodes)}
        return model.log_posteriors(settings.adapt, support, LABELS, query, **options)


def _check_answers(settings: Settings, model: MetaLearner, image_shape: tuple[int, int, int]) -> None:
    """Check `log_posteriors` in each mode."""
    for mode in model.modes:
        log_p = _answer(settings, model, image_shape, mode)
        found = f"{log_p.dtype} {tuple(log_p.shape)}"
        right = log_p.dtype == torch.float64 and log_p.shape == (2, 4, 3)
        check_rule(right, f"{mode}: log_posteriors returns {found}, not torch.float64 (2, 4, 3)")
        total = log_p.exp().sum(dim=2)
        check_rule(bool(torch.allclose(total, torch.ones_like(total))), f"{mode}: probabilities do not sum to 1")
        check_rule(
            torch.equal(log_p, _answer(settings, model, image_shape, mode)), f"{mode}: answers differ when repeated"
        )
        alone = _answer(settings, model, image_shape, mode, episodes=1)
        check_rule(bool(torch.allclose(alone[0], log_p[0], atol=1e-4)), f"{mode}: an episode depends on the others")
    if "inductive" in model.modes:
        _check_inductive(settings, model, image_shape)


def _check_inductive(settings: Settings, model: MetaLearner, image_shape: tuple[int, int, int]) -> None:
    images, _ = generated_images(image_shape)
    with torch.no_grad():
        h = model.encode_images(model.scale_images(torch.tensor(images)))
        answer = partial(model.log_posteriors, settings.adapt, mode="inductive", seed_by_episode=[0])
        together = answer(h[None, : len(LABELS)], LABELS, h[None, 20:24])
        alone = answer(h[None, : len(LABELS)], LABELS, h[None, 20:21])
    check_rule(bool(torch.allclose(alone[0, 0], together[0, 0], atol=1e-4)), "inductive: a query depends on the others")


def equal_tensors(left: Any, right: Any) -> bool:
    """Whether two batches or state dictionaries hold equal tensors."""
    pairs = zip(
        *((list(each.values()) if isinstance(each, dict) else list(each)) for each in (left, right)), strict=True
    )
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)
