"""`metagmvae bench step`: one training step at the paper's setting, beside the literal step, in one run.

Every variant lives in a process of its own, so that peak memory is its own; the parent asks them in turns, so
that a change of the machine's load falls on all of them alike.

Notation: B episodes, M points, N samples, R decoded samples, K components, D latent size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metagmvae.configs.schema import ModelSettings, TrainSettings
from metagmvae.evaluation.bench.memory import peak_rss
from metagmvae.evaluation.bench.reference import step_loss
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.device.allocator import keep_freed_memory
from metagmvae.training.device.default import default_device
from metagmvae.training.objectives.mixture import init_indices
from metagmvae.training.trainer.builders import build_model, build_optimizer
from metagmvae.training.trainer.steps import MetaStep

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
"""What differs from the paper's setting (the defaults of `TrainSettings`); `literal` runs `step_loss`."""
GIVEN_BACK = ("literal", "R=1, memory given back", "R=1, bfloat16, memory given back")
"""Those that leave the C library's allocator as it is; the others keep freed memory, as training does."""

Step = Callable[[], Tensor]


def bench_step(repeats: int, threads: int) -> dict[str, Any]:
    """Seconds (median of `repeats`, after one step to warm up) and peak memory of each variant; a profile.

    Args:
        repeats: timed steps of each variant, taken in turns.
        threads: of torch in each variant; the others wait meanwhile.
    """
    with _children(threads) as children:
        for child in children.values():
            _ask(child, "step")
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(repeats):
            for name, child in children.items():
                times[name].append(_ask(child, "step"))
        memory = {name: _ask(child, "memory") for name, child in children.items()}
        profiles = {name: _ask(children[name], "profile") for name in ("R=1", "R=1, bfloat16")}
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
    return {"setting": _setting(), "repeats": repeats, "threads": threads, "rows": rows, "profile": profiles}


def _setting() -> dict[str, Any]:
    keys = {"batch", "set_size", "samples", "components", "em_iterations"}
    return {**TrainSettings().model_dump(include=keys), "image_shape": list(SHAPE), "latent": ModelSettings().latent}


@contextmanager
def _children(threads: int) -> Iterator[dict[str, Any]]:
    context = get_context("spawn")
    started = {}
    try:
        for name in VARIANTS:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(name, threads, theirs), daemon=True)
            process.start()
            theirs.close()
            started[name] = (process, ours)
        yield {name: pipe for name, (_, pipe) in started.items()}
    finally:
        for process, pipe in started.values():
            pipe.close()
            process.join(timeout=10)
            process.kill()


def _ask(pipe: Any, question: str) -> Any:
    pipe.send(question)
    answer = pipe.recv()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _serve(name: str, threads: int, pipe: Any) -> None:
    """Answer the parent's questions until it hangs up."""
    torch.set_num_threads(threads)
    if name not in GIVEN_BACK:
        keep_freed_memory()
    step = _variant(name)
    before = _peak_mib()
    answers: dict[str, Callable[[], Any]] = {
        "step": lambda: _seconds(step),
        "memory": lambda: _peak_mib() - before,
        "profile": lambda: _profile(step, VARIANTS[name].get("precision") == "bfloat16"),
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


def _variant(name: str) -> Step:
    """One whole step: forward, backward, update; on the GPU where there is one."""
    settings = TrainSettings.model_validate(VARIANTS[name])
    device = default_device()
    model = build_model(ModelSettings(), SHAPE, 0).to(device)
    optimizer = build_optimizer(model, settings)
    images = np.random.default_rng(0).integers(0, 2, (settings.batch, settings.set_size, *SHAPE), dtype=np.uint8) * 255
    compute = _literal(model, settings, images) if name == "literal" else _ours(model, settings, images)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = compute()
        loss.backward()
        optimizer.step()
        return loss

    return step


def _ours(model: Any, settings: TrainSettings, images: np.ndarray) -> Step:
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    module = MetaStep(model, settings)
    batch = SetBatch(images, np.arange(settings.batch), 0)
    return lambda: module(batch)[0]


def _literal(model: Any, settings: TrainSettings, images: np.ndarray) -> Step:
    device = next(model.parameters()).device
    sets = torch.as_tensor(images).to(device)
    generator = torch.Generator(device).manual_seed(0)
    B, M, N = settings.batch, settings.set_size, settings.samples

    def compute() -> Tensor:
        noise = torch.randn(B, M, N, model.latent, generator=generator, device=device)
        rows = init_indices(noise.flatten(1, 2), settings.components, [generator] * B)
        return step_loss(model, sets, noise, rows, settings.em_iterations)

    return compute


def _seconds(step: Step) -> float:
    since = time.perf_counter()
    step().item()  # waits for the device as well
    return time.perf_counter() - since


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_rss() / 2**20


def _profile(step: Step, half: bool) -> dict[str, Any]:
    """Where the time of a step goes, and how far its arithmetic is from what this processor can do."""
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = _seconds(step)
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    total = sum(spent.values())
    largest = sorted(spent.items(), key=lambda item: -item[1])[:8]
    rate = _matmul_rate(torch.bfloat16 if half else torch.float32)
    return {
        "share_of_time": {key.removeprefix("aten::"): value / total for key, value in largest},
        "gflop": counter.get_total_flops() / 1e9,
        "gflop_per_s": counter.get_total_flops() / 1e9 / seconds,
        "matmul_gflop_per_s": rate,
        "share_of_matmul_rate": counter.get_total_flops() / 1e9 / seconds / rate,
    }


def _matmul_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """GFLOP/s of a large square matrix product here: what the processor can do."""
    device = default_device()
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        since = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - since)
    return 2 * size**3 / best / 1e9
