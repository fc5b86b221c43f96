"""The checks that the tests of another package call for an objective of pre-training and a baseline that it adds.

They raise an AssertionError that names the rule and what breaks it. For a method: `method_testing`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.fewshot.baselines import Baseline, all_baselines
from metagmvae.infra.api.method_testing import MemoryContext, equal_tensors, generated_images
from metagmvae.infra.api.testing import check_rule
from metagmvae.pipelines.records import DataError
from metagmvae.training.pretraining.objectives_by_name import build_auxiliary, build_pretrain_step
from metagmvae.training.pretraining.step import PretrainStep
from metagmvae.training.trainer.builders import build_encoder_model
from metagmvae.training.trainer.stages import train

WAY, QUERIES, FEATURES, EPISODES = 3, 12, 16, 5


def check_objective(name: str, image_shape: tuple[int, int, int] = (1, 28, 28), **pretrain: Any) -> PretrainStep:
    """Check an objective as `pretrain.objective = NAME` trains an encoder on generated images (C, H, W).

    A step draws its random numbers in `prepare` only, and again the same ones; its loss is a finite scalar whose
    gradient reaches the encoder; a killed and resumed training equals an uninterrupted one bit for bit.

    Args:
        name: of the objective.
        image_shape: of the images.
        pretrain: other settings of [pretrain].

    Returns:
        The step module of a new model, for further checks.

    Raises:
        AssertionError: a rule is broken.
        DataError: the objective refuses the settings.
    """
    sections: dict[str, Any] = {
        "model": {"channels": 8},
        "pretrain": {"steps": 4, "batch": 8, "objective": name} | pretrain,
        "train": {"checkpoint_every": 2},
        "validation": {"every": 0},
    }
    settings, (images, _) = Settings.model_validate(sections), generated_images(image_shape)
    model = build_encoder_model(settings.model, image_shape, seed=0)
    auxiliaries = [build_auxiliary(model, settings, len(images)) for _ in range(2)]
    same = equal_tensors(*(each.state_dict() for each in auxiliaries))
    check_rule(same, "two auxiliary modules with the same seed differ; draw weights from torch's generator only")
    step = build_pretrain_step(model, auxiliaries[0], settings).train()
    batch = (images[:8], 3, np.arange(8)) if step.needs_rows else (images[:8], 3)
    state = torch.get_rng_state()
    step.start_step(3, images)
    prepared, again = (step.prepare(*batch) for _ in range(2))
    check_rule(equal_tensors(prepared, again), "`prepare` draws other random numbers for the same step")
    loss, metrics = step.compute(*prepared)
    check_rule(torch.equal(state, torch.get_rng_state()), "a step draws from the global generator; use keyed ones")
    is_loss = loss.ndim == 0 and bool(loss.isfinite()) and loss.requires_grad
    check_rule(is_loss, "the loss is no finite scalar with gradient")
    check_rule(not any(value.requires_grad for value in metrics.values()), "metrics have a gradient; detach them")
    loss.backward()
    reached = any(weight.grad is not None and weight.grad.any() for weight in model.encoder.parameters())
    check_rule(reached, "the gradient of the loss does not reach the encoder")
    whole, killed = MemoryContext(), MemoryContext(killed_at=3)
    run = partial(train, settings, images, image_shape, "generated", kind="encoder")
    state_at_end = run(whole)
    try:
        run(killed)
    except InterruptedError:
        resumed = run(MemoryContext(killed.state))
        for part in ("model", "projector"):
            same = equal_tensors(state_at_end[part], resumed[part])
            check_rule(same, f"a killed and resumed training ends with other weights ({part})")
    return step


def check_baseline(name: str) -> Baseline:
    """Check a baseline as `evaluate --baselines` runs it, on generated features.

    Its scores have the right shape for each candidate of its settings; separated classes are told apart; an inductive
    one gives a query the same scores whatever the other queries are.

    Returns:
        The baseline, for further checks.

    Raises:
        AssertionError: a rule is broken.
        DataError: no package adds it, or its package cannot be used.
    """
    baselines = all_baselines()
    if name not in baselines:
        raise DataError(f"{name}: no such baseline; known: {', '.join(baselines)}")
    baseline, generator = baselines[name], torch.Generator().manual_seed(0)
    centre_K1F = 5 * torch.eye(FEATURES)[:WAY, None]
    truth_P = torch.arange(QUERIES) % WAY
    support_EKSF = centre_K1F + 0.1 * torch.randn(EPISODES, WAY, 2, FEATURES, generator=generator)
    query_EPF = centre_K1F[truth_P, 0] + 0.1 * torch.randn(EPISODES, QUERIES, FEATURES, generator=generator)
    for settings in ({}, *({key: value} for key, values in baseline.grid.items() for value in values)):
        score_EPK = baseline.scores(support_EKSF, query_EPF, **settings)
        shape = tuple(score_EPK.shape)
        check_rule(shape == (EPISODES, QUERIES, WAY), f"{settings}: scores have the shape {shape}, not (E, P, K)")
        check_rule(not bool(score_EPK.isnan().any()), f"{settings}: scores are NaN")
        right = bool((score_EPK.argmax(dim=2) == truth_P).all())
        check_rule(right, f"{settings}: separated classes are not told apart; the scores stand in the order of K")
    if baseline.mode == "inductive":
        alone = baseline.scores(support_EKSF, query_EPF[:, :1])
        together = baseline.scores(support_EKSF, query_EPF)[:, :1]
        check_rule(bool(torch.allclose(alone, together, atol=1e-4)), "inductive: a query depends on the others")
    return baseline
