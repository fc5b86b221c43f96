"""MAML in elementary operations, and a small model and tasks to compare it with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from small_tasks import SHAPE
from torch import Tensor

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import AdaptSettings, ModelSettings
from metagmvae.training.methods.maml import MAML

ADAPT = AdaptSettings()
K, S, Q = 3, 2, 3


def network(kind: type[MAML] = MAML, **method: Any) -> MAML:
    """A small model in float64; on a constant map of zeros a ReLU would be at its kink, so the maps have a bias."""
    torch.manual_seed(0)
    options = {"name": "maml", "tasks": "labels", "way": K, "inner_steps": 2, "inner_rate": 0.1, "test_steps": 3}
    model = kind(ModelSettings(channels=3), MethodSettings(**options | method), SHAPE).double()
    for name, value in model.named_parameters():
        if name.endswith("norm.bias"):
            torch.nn.init.uniform_(value, 0.1, 0.5)
    if model.on_features:
        model.scale.set_statistics(torch.zeros(model.feature_dim), torch.full((model.feature_dim,), 0.5))
    return model.eval()


def tasks(model: MAML, b: int = 2, shots: int = S) -> tuple[Tensor, Tensor]:
    """Support (b, K, S, ...) and queries (b, K, Q, ...)."""
    generator = torch.Generator().manual_seed(1)
    shape = (model.feature_dim,) if model.on_features else SHAPE
    values = torch.rand(b, K, shots + Q, *shape, generator=generator, dtype=torch.float64)
    return values[:, :, :shots], values[:, :, shots:]


def literal_logits(theta: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network in elementary operations, with the statistics of the batch: Table 3 and a linear classifier."""
    if "own_body.0.weight" in theta:
        hidden = (x @ theta["own_body.0.weight"].T + theta["own_body.0.bias"]).clamp_min(0)
        h = hidden @ theta["own_body.2.weight"].T + theta["own_body.2.bias"]
    else:
        for level in range(4):
            block = f"encoder.blocks.{level}"
            x = F.conv2d(x, theta[f"{block}.conv.weight"], padding=1)
            mean = x.mean(dim=(0, 2, 3), keepdim=True)
            variance = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
            weight, bias = (theta[f"{block}.norm.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
            x = F.relu((x - mean) / (variance + 1e-5).sqrt() * weight + bias)
            x = F.max_pool2d(x, 2, ceil_mode=True)
        h = x.flatten(1)
    return h @ theta["classifier.weight"].T + theta["classifier.bias"]


def literal_fit(
    theta: dict[str, Tensor], images: Tensor, labels: list[int], steps: int, rate: float, first_order: bool
) -> dict[str, Tensor]:
    """Steps of gradient descent on the mean cross-entropy of the labelled images."""
    ways = max(labels) + 1
    for _ in range(steps):
        logits = literal_logits(theta, images)[:, :ways]
        total = torch.zeros((), dtype=torch.float64)
        for t, label in enumerate(labels):
            total = total - (logits[t, label] - torch.logsumexp(logits[t], dim=0))
        loss = total / len(labels)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
        theta = {name: value - rate * g for (name, value), g in zip(theta.items(), gradients, strict=True)}
    return theta


def leaves(model: MAML) -> dict[str, Tensor]:
    """Copies of the parameters, with gradients of their own."""
    return {name: p.detach().clone().requires_grad_() for name, p in model.initial_parameters().items()}


def literal_loss(model: MAML, theta: dict[str, Tensor], support: Tensor, query: Tensor) -> tuple[Tensor, float]:
    """Loss and accuracy of Eq. 1, task by task and query by query."""
    settings = model.settings
    total, correct = torch.zeros((), dtype=torch.float64), 0
    for task in range(len(support)):
        labels = [k for k in range(K) for _ in range(support.shape[2])]
        options = (settings.inner_steps, settings.inner_rate, settings.first_order)
        fitted = literal_fit(theta, support[task].flatten(0, 1), labels, *options)
        logits = literal_logits(fitted, query[task].flatten(0, 1))
        for p in range(K * Q):
            total = total - (logits[p, p // Q] - torch.logsumexp(logits[p], dim=0))
            correct += int(logits[p].argmax() == p // Q)
    queries = len(support) * K * Q
    return total / queries, correct / queries


def gradients(model: MAML, support: Tensor, query: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss of the tasks by parameter."""
    model.zero_grad()
    model.task_loss(support, query)[0].backward()
    return {name: p.grad.clone() for name, p in model.initial_parameters().items() if p.grad is not None}


KINDS: dict[str, dict[str, Any]] = {
    "second order": {},
    "first order": {"first_order": True},
    "one step": {"inner_steps": 1},
    "features": {"network": "mlp"},
    "first order on features": {"network": "mlp", "first_order": True},
}


def answer(model: MAML, support: Tensor, labels: Tensor, query_EP: Tensor, mode: str) -> Tensor:
    """`log_posteriors` in inference mode, as evaluation calls it."""
    with torch.inference_mode():
        return model.log_posteriors(
            ADAPT,
            (support.flatten(1, 2) if support.ndim > query_EP.ndim else support) + 0,
            labels + 0,
            query_EP + 0,
            mode=mode,  # type: ignore[arg-type]
            seed_by_episode=range(len(support)),
        )
