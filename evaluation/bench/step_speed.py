"""`metagmvae bench step`: one training step with the paper's settings, compared with a literal step.

Every variant has its own process, so its peak memory can be measured. The variants take turns, so that a change of the
machine's load affects all of them, and give their memory back at the end of a turn. On a GPU the data are in its
memory, a time is the mean of several steps, and the step is a CUDA graph, as in training.

Notation: B episodes, M points, N samples, R decoded samples, K components, D latent size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metagmvae.configs.schema import ModelSettings, TrainSettings
from metagmvae.evaluation.bench.memory import peak_rss
from metagmvae.evaluation.bench.reference import step_loss
from metagmvae.pipelines.records import SetBatch, WorkError
from metagmvae.training.device.allocator import give_back_freed_memory, keep_freed_memory
from metagmvae.training.device.default import default_device
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.methods.meta_step import MetaStep
from metagmvae.training.objectives.distinct_points import init_indices
from metagmvae.training.trainer.builders import build_model, build_optimizer
from metagmvae.training.trainer.update import build_update

SHAPE = (1, 28, 28)
VARIANTS: dict[str, dict[str, Any]] = {
    "literal": {"decode_samples": 32, "channels_last": False},
    "R=32": {"decode_samples": 32},
    "R=4": {"decode_samples": 4},
    "R=1": {},
    "R=1, bfloat16": {"precision": "bfloat16"},
    "R=1, memory given back": {},
    "R=1, bfloat16, memory given back": {"precision": "bfloat16"},
}
"""Differences from the paper's settings (the defaults of `TrainSettings`); `literal` runs `step_loss`."""
DEFAULT_ALLOCATOR = ("literal", "R=1, memory given back", "R=1, bfloat16, memory given back")
"""Variants with the C library's default allocator; the others keep freed memory, as training does."""

GPU_STEPS = 20
"""Steps of one measured time on a GPU, which works while the host prepares the next step."""

NEEDED_MEMORY = "the seven processes need about 13 GiB together; close other programs, or use another machine"
"""On a CPU, according to `evaluation/results/bench-step.json` and with the libraries of each process."""

Step = Callable[[], Tensor]


def bench_step(repeats: int, threads: int) -> dict[str, Any]:
    """Measure seconds (median of `repeats`) and peak memory of a step of each variant, and profile two.

    Args:
        repeats: timed steps of each variant.
        threads: PyTorch threads of each variant; only one variant runs at a time.
    """
    with _children(threads) as children:
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(repeats):
            for name, child in children.items():
                times[name].append(child.ask("step"))
        memory = {name: child.ask("memory") for name, child in children.items()}
        profiles = {name: children[name].ask("profile") for name in ("R=1", "R=1, bfloat16")}
    slowest = statistics.median(times["literal"])
    rows = [
        {
            "variant": name,
            "seconds": statistics.median(values),
            "seconds_min": min(values),
            "seconds_max": max(values),
            "times_faster": slowest / statistics.median(values),
            "peak_mib": memory[name],
        }
        for name, values in times.items()
    ]
    return {"setting": _settings(), "repeats": repeats, "threads": threads, "rows": rows, "profile": profiles}


def _settings() -> dict[str, Any]:
    keys = {"batch", "set_size", "samples", "components", "em_iterations"}
    return {**TrainSettings().model_dump(include=keys), "image_shape": list(SHAPE), "latent": ModelSettings().latent}


@contextmanager
def _children(threads: int) -> Iterator[dict[str, _Child]]:
    """Start one process per variant; yield them by name."""
    context = get_context("spawn")
    started: dict[str, _Child] = {}
    try:
        for name in VARIANTS:
            parent_end, child_end = context.Pipe()
            process = context.Process(target=_serve, args=(name, threads, child_end), daemon=True)
            process.start()
            child_end.close()
            started[name] = _Child(name, process, parent_end)
        yield started
    finally:
        for child in started.values():
            child.pipe.close()
            child.process.join(timeout=10)
            child.process.kill()


@dataclass(frozen=True)
class _Child:
    """The process of one variant."""

    name: str
    process: BaseProcess
    pipe: Any

    def ask(self, question: str) -> Any:
        """Send a question and return the answer.

        Raises:
            WorkError: the process ran out of memory or has ended.
        """
        try:
            self.pipe.send(question)
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(timeout=10)
            raise WorkError(
                f"the process of variant {self.name!r} ended (exit code {self.process.exitcode}), probably because "
                f"memory ran out: {NEEDED_MEMORY}"
            ) from error
        if isinstance(answer, RuntimeError) and "memory" in str(answer):
            raise WorkError(f"variant {self.name!r} ran out of memory: {NEEDED_MEMORY}") from answer
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(name: str, threads: int, pipe: Any) -> None:
    """Answer the parent's questions until it closes the pipe."""
    torch.set_num_threads(threads)
    if name not in DEFAULT_ALLOCATOR:
        keep_freed_memory()
    step, gradients = _make_step(name)
    peak_before = _peak_mib()
    answers: dict[str, Callable[[], Any]] = {
        "step": lambda: _turn(step),
        "memory": lambda: _peak_mib() - peak_before,
        "profile": lambda: _profile(step, gradients, VARIANTS[name].get("precision") == "bfloat16"),
    }
    try:
        while True:
            question = pipe.recv()
            try:
                pipe.send(answers[question]())
            except RuntimeError as error:
                pipe.send(error)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return


def _make_step(name: str) -> tuple[Step, Step]:
    """Functions that run one training step of a variant and that compute its loss and gradients only."""
    settings = TrainSettings.model_validate(VARIANTS[name])
    device = default_device()
    model = build_model(ModelSettings(), SHAPE, 0).to(device)
    assert isinstance(model, MetaGMVAE)
    optimizer = build_optimizer(model, settings)
    shape = (settings.batch, settings.set_size, *SHAPE)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 2, shape, dtype=np.uint8) * 255).to(device)
    if name == "literal":
        module: nn.Module = _LiteralStep(model, settings)
    else:
        module = MetaStep(model.to(memory_format=torch.channels_last) if settings.channels_last else model, settings)
    batch = SetBatch(images, np.arange(settings.batch), 0)
    update = build_update(name, module, optimizer, settings.clip_norm, device)

    def step() -> Tensor:
        return update(batch, 1)[0]

    def gradients() -> Tensor:
        loss, _ = module(batch)
        loss.backward()
        return loss

    return step, gradients


class _LiteralStep(nn.Module):
    """`step_loss` as a step module."""

    def __init__(self, model: MetaGMVAE, settings: TrainSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.generator = torch.Generator(next(model.parameters()).device).manual_seed(0)

    def forward(self, batch: SetBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the images of a batch."""
        sets, settings = torch.as_tensor(batch.images), self.settings
        shape = (*sets.shape[:2], settings.samples, self.model.latent)
        noise = torch.randn(shape, generator=self.generator, device=sets.device)
        rows = init_indices(noise.flatten(1, 2), settings.components, [self.generator] * len(sets))
        return step_loss(self.model, sets, noise, rows, settings.em_iterations), {}


def _turn(step: Step) -> float:
    """Seconds of one step after a warm-up step, which allocates the memory; then others can have the memory."""
    step()
    seconds = _seconds(step)
    give_back_freed_memory()
    return seconds


def _seconds(step: Step) -> float:
    """Seconds of one step."""
    repeats = GPU_STEPS if torch.cuda.is_available() else 1
    start = time.perf_counter()
    for _ in range(repeats):
        loss = step()
    loss.item()  # waits for the device
    return (time.perf_counter() - start) / repeats


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_rss() / 2**20


def _profile(step: Step, gradients: Step, bfloat16: bool) -> dict[str, Any]:
    """Operators (kernels on a GPU) that take most of the time of a step, and its FLOP/s against a matrix product.

    The operations are counted in `gradients`: a CUDA graph shows none.
    """
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        gradients()
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        seconds = _seconds(step)
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    seconds_by_operator = {event.key: getattr(event, time_of) / 1e6 for event in profiler.key_averages()}
    total = sum(seconds_by_operator.values())
    largest = sorted(seconds_by_operator.items(), key=lambda item: -item[1])[:8]
    rate = _matmul_rate(torch.bfloat16 if bfloat16 else torch.float32)
    return {
        "share_of_time": {key.removeprefix("aten::")[:80]: value / total for key, value in largest},
        "gflop": counter.get_total_flops() / 1e9,
        "gflop_per_s": counter.get_total_flops() / 1e9 / seconds,
        "matmul_gflop_per_s": rate,
        "share_of_matmul_rate": counter.get_total_flops() / 1e9 / seconds / rate,
    }


def _matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a large square matrix product on this machine, as an upper bound for a step; the best of six."""
    device, size = default_device(), 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
