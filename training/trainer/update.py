"""One training step: loss, gradients, clipping and optimiser, without an update from values that are not finite.

On a CPU the values are checked before the update. Reading a value of a GPU waits for it, so there the check runs on the
device (as the `found_inf` of `torch.amp.GradScaler`): the optimiser skips the failed update and all later ones, and the
error is raised when the next metric line is due. On one GPU the whole step is replayed as a CUDA graph, because
launching its kernels one by one takes longer than running them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from metagmvae.training.device import distributed

EAGER_STEPS = 3
"""Steps before the capture: they allocate the optimiser's state and let the libraries choose their algorithms."""

log = logging.getLogger(__name__)


class NonFiniteLossError(ValueError):
    """The loss or a gradient is not finite. The update was not applied, and the last checkpoint stays."""


class Update:
    """A training step whose values are read before the update.

    Args:
        name: of the stage, for error messages.
        module: a step module, batch -> (loss, terms), maybe wrapped for data parallelism.
        optimizer: updates the parameters.
        clip_norm: largest gradient norm; 0: no clipping.
    """

    def __init__(self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        self.name = name
        self.module = module
        self.optimizer = optimizer
        self.clip_norm = clip_norm or float("inf")
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.metrics: list[str] = []
        """Names of the values that a step returns."""

    def __call__(self, batch: Any, step: int) -> Tensor:
        """Train on one batch; return loss, terms and gradient norm before clipping, (metrics,) without gradient."""
        values = self._gradients(batch)
        self._raise_if_failed(step, values)
        self.optimizer.step()
        return values

    def check(self) -> None:
        """Raise the error of a step since the last call, if its values have not been read yet.

        Raises:
            NonFiniteLossError: the loss or a gradient was not finite.
        """

    def _gradients(self, batch: Any) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return self._backward(*self.module(*_arguments(batch)))

    def _backward(self, loss: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """Clipped gradients in the parameters; returns the values of the step."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        values = {"loss": loss.detach(), **terms, "gradient_norm": norm.detach()}
        self.metrics = list(values)
        return torch.stack([value.float() for value in values.values()])

    def _raise_if_failed(self, step: int, values: Tensor) -> None:
        loss, norm = values[0], values[-1]
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            explain = getattr(self.module, "explain_failure", None)
            if explain is not None:
                explain()
            raise NonFiniteLossError(
                f"{self.name} step {step}: loss {loss.item():g}, gradient norm {norm.item():g}; the update was not "
                "applied and the last checkpoint stays: lower the learning rate, or set train.clip_norm"
            )


class DeviceUpdate(Update):
    """A training step of Adam that never waits for the device.

    After a failed step, `failed` is 1 and the optimiser changes neither weights nor state. `check` raises the error.
    """

    optimizer: torch.optim.Adam

    def __init__(self, name: str, module: nn.Module, optimizer: torch.optim.Adam, clip_norm: float) -> None:
        super().__init__(name, module, optimizer, clip_norm)
        device = self.parameters[0].device
        self.failed = torch.zeros((), device=device)
        self.failed_values: Tensor | None = None
        self.learning_rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.steps: list[int] = []
        """Steps since the last check."""
        self.succeeded = torch.zeros((), device=device, dtype=torch.int64)
        """Successful steps since the last check."""
        for state in optimizer.state.values():  # of a checkpoint, which may be of a CPU
            state["step"] = state["step"].to(device)

    def __call__(self, batch: Any, step: int) -> Tensor:
        self.steps.append(step)
        for tensor, group in zip(self.learning_rates, self.optimizer.param_groups, strict=True):
            tensor.fill_(group["lr"])
        return self._train(batch)

    def check(self) -> None:
        if self.failed.item():
            assert self.failed_values is not None
            self._raise_if_failed(self.steps[int(self.succeeded)], self.failed_values)
        self.steps.clear()
        self.succeeded.zero_()

    def _train(self, batch: Any) -> Tensor:
        return self._step(self._gradients(batch))

    def _step(self, values: Tensor) -> Tensor:
        """Update the parameters, if this step and all before it are finite."""
        finite = values[0].isfinite() & values[-1].isfinite()
        if self.failed_values is None:
            self.failed_values = torch.zeros_like(values)
        self.failed_values.copy_(torch.where(self.failed.bool(), self.failed_values, values))
        self.failed.copy_(torch.maximum(self.failed, (~finite).float()))
        self.succeeded += 1 - self.failed.to(torch.int64)
        self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]
        kept = [group.copy() for group in self.optimizer.param_groups]
        for group, learning_rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group.update(lr=learning_rate, fused=True, capturable=learning_rate.is_cuda)
        self.optimizer.step()
        # Checkpoints and schedules see the usual groups, so that any device can continue.
        for group, before in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(before)
        return values


class GraphedUpdate(DeviceUpdate):
    """A `DeviceUpdate` that is replayed as a CUDA graph after `EAGER_STEPS` steps.

    The step module has `prepare`, batch -> tensors of fixed shapes (random numbers included), and `compute`, which is
    captured. The captured step reads its inputs from static tensors. Where capture is impossible (an operator waits for
    the device), training continues without it, and a warning says so.
    """

    def __init__(self, name: str, module: nn.Module, optimizer: torch.optim.Adam, clip_norm: float) -> None:
        super().__init__(name, module, optimizer, clip_norm)
        self.eager_steps: float = EAGER_STEPS
        self.stream = torch.cuda.Stream(self.parameters[0].device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.values = torch.empty(0)

    def _train(self, batch: Any) -> Tensor:
        inputs = self.module.prepare(*_arguments(batch))  # type: ignore[operator]
        if self.graph is None and self.eager_steps > 0:
            self.eager_steps -= 1
            return self._on_side_stream(inputs)
        if self.graph is None:
            self._capture(inputs)
        if self.graph is None:
            return self._compute(inputs)
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.values

    def _compute(self, inputs: Iterable[Tensor]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return self._step(self._backward(*self.module.compute(*inputs)))  # type: ignore[operator]

    def _on_side_stream(self, inputs: Iterable[Tensor]) -> Tensor:
        """One step on another stream than the default, which the documentation of CUDA graphs asks for."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            values = self._compute(inputs)
        current.wait_stream(self.stream)
        return values

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(value.clone() for value in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": the thread that reads batches ahead may allocate memory meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.values = self._compute(self.inputs)
        except RuntimeError as error:
            log.warning("%s: no CUDA graph (%s); kernels are launched one by one", self.name, str(error).split("\n")[0])
            self.eager_steps = float("inf")
            return
        self.graph = graph


def _arguments(batch: Any) -> tuple[Any, ...]:
    """Arguments of the step module: a tuple is unpacked."""
    return batch if isinstance(batch, tuple) else (batch,)


def build_update(
    name: str, module: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, device: torch.device
) -> Update:
    """The fastest kind of update that the device, the optimiser and the number of ranks allow."""
    if device.type != "cuda" or not isinstance(optimizer, torch.optim.Adam):
        return Update(name, module, optimizer, clip_norm)
    kind = GraphedUpdate if distributed.world_size() == 1 and hasattr(module, "prepare") else DeviceUpdate
    return kind(name, module, optimizer, clip_norm)
