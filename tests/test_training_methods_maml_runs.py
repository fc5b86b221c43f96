"""Complete runs of MAML and of training from scratch: killed and resumed, on two ranks, and with a loss of NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_on_two_ranks
from small_runs import FolderContext, assert_equal, without_times
from small_tasks import LABELS, SHAPE, images, run, settings

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import Settings, TrainSettings
from metagmvae.training.methods.method import MethodData
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.trainer import stages
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.update import NonFiniteLossError

MAML = {"name": "maml", "inner_rate": 0.1}
RUNS: dict[str, Settings] = {
    "labels": settings(MAML | {"tasks": "labels"}),
    "first order": settings(MAML | {"tasks": "labels", "first_order": True}),
    "images": settings(MAML | {"tasks": "images", "shot": 1}),
    "clusters": settings(MAML | {"tasks": "clusters"}, pretrain={"steps": 4}),
    "features": settings(MAML | {"tasks": "clusters", "network": "mlp"}, pretrain={"steps": 4}),
}


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_run_equals_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """Killed after the checkpoint of meta step 4; bit for bit, metric lines too."""
    contexts, first = [], RUNS[name].pretrain.steps
    for folder, killed_at in (("whole", None), ("parts", first + 7)):
        (tmp_path / folder).mkdir()
        torch.manual_seed(1)
        contexts.append(FolderContext(tmp_path / folder, killed_at))
        if killed_at is None:
            run(RUNS[name], contexts[0])
        else:
            with pytest.raises(InterruptedError):
                run(RUNS[name], contexts[1])
    whole, killed = contexts
    torch.manual_seed(9)
    resumed = FolderContext(tmp_path / "parts")
    run(RUNS[name], resumed)
    assert killed.saved[-1] == ("meta", 4)
    assert_equal(whole.load(), resumed.load())
    before = [line for line in killed.lines if int(line["global_step"]) <= first + 4]
    assert without_times(whole.lines) == without_times(before) + without_times(resumed.lines)


@pytest.mark.parametrize("first_order", [False, True])
def test_it_learns(first_order: bool, tmp_path: Path) -> None:
    method = MAML | {"tasks": "labels", "inner_rate": 0.5, "first_order": first_order}
    train = {"steps": 40, "batch": 4, "schedule": "constant", "log_every": 10}
    options = settings(method, train=train, model={"channels": 16}, validation={"every": 0})
    context = FolderContext(tmp_path)
    run(options, context)
    lines = [line for line in context.lines if line["step"] % 10 == 0]
    assert float(lines[-1]["loss"]) < 0.7 * float(lines[0]["loss"])
    assert float(lines[-1]["accuracy"]) > 0.9  # chance: a third


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    options = settings({"name": "maml", "tasks": "labels", "inner_rate": 1e38})
    context = FolderContext(tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"meta step 1: .* the update was not applied"):
        run(options, context)
    assert context.saved == []


def test_training_from_scratch_saves_a_new_model(tmp_path: Path) -> None:
    """Also killed and resumed: the checkpoint of step 0 is complete."""
    context = FolderContext(tmp_path)
    state = run(settings({"name": "scratch"}, train={"steps": 0}), context)
    assert [(line["stage"], line["step"]) for line in context.lines] == [("meta", 0)]
    again = FolderContext(tmp_path)
    assert_equal(state, run(settings({"name": "scratch"}, train={"steps": 0}), again))
    assert again.lines == []


RANK_RUNS = ("labels", "first order", "images")


def trained(rank: int, world: int, name: str) -> dict[str, Any]:
    """MAML on images: each task is normalised alone, so that ranks do not matter; four tasks a step over all ranks.

    By plain gradient descent: Adam would turn the rounding errors of gradients of 0 into steps (see the next test).
    """

    class Memory(FolderContext):
        def load(self) -> None:
            return None

        def report(self, line: Any, state: Any) -> None:
            self.lines.append(line)

    def descent(model: torch.nn.Module, train: TrainSettings) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], train.learning_rate)

    context = Memory(Path("/nowhere"))
    context.rank, context.world = rank, world
    changes = {"train": RUNS[name].train.model_copy(update={"batch": 4, "steps": 3, "learning_rate": 0.05})}
    changes["validation"] = RUNS[name].validation.model_copy(update={"every": 0})  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "build_optimizer", descent)
        state = run(RUNS[name].model_copy(update=changes), context)
    return {"model": dict(state["model"]), "loss": [line["loss"] for line in context.lines]}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save({name: trained(rank, 2, name) for name in RANK_RUNS}, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Each step has other tasks and views; a rank with those of another step or rank would differ by far more."""
    ranks = run_on_two_ranks(worker, tmp_path)
    for name in RANK_RUNS:
        one, two = trained(0, 1, name), [rank[name] for rank in ranks]
        for key, value in one["model"].items():
            assert torch.equal(two[0]["model"][key], two[1]["model"][key]), (name, key)
            assert torch.allclose(two[0]["model"][key], value, rtol=1e-4, atol=1e-5), (name, key)
        assert one["loss"] == pytest.approx(two[0]["loss"], rel=1e-5)
        moved = {key: (value - initial(name)[key]).abs().max() for key, value in one["model"].items()}
        assert min(moved["classifier.weight"], moved["encoder.blocks.0.conv.weight"]) > 1e-3


@pytest.mark.parametrize("name", RANK_RUNS)
def test_a_bias_that_the_next_normalisation_removes_has_no_gradient(name: str) -> None:
    """In these small images block 2 ends in one position, the largest of four. Where it is above 0 for every image, a
    bias only shifts all of them alike, which the normalisation of block 3 takes away."""
    options, method = RUNS[name], find_method(MethodSettings(name="maml"))
    model = build_model(options.model, SHAPE, options.train.seed, options.method)
    step: Any = method.step(model, options).train()
    data = MethodData(images(), images(), LABELS, images)
    prepared = step.prepare(method.stream(data, options, seed=0, split="train").at(0))
    found: dict[torch.dtype, dict[str, torch.Tensor]] = {}
    for dtype in (torch.float32, torch.float64):
        model.to(dtype).zero_grad()
        step.compute(*(part.to(dtype) for part in prepared))[0].backward()
        found[dtype] = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    exact, rounded = (found[dtype]["encoder.blocks.2.norm.bias"] for dtype in (torch.float64, torch.float32))
    without = exact.abs() < 1e-14
    assert without.any()
    assert rounded[without].abs().max() > 1e-9
    assert found[torch.float64]["encoder.blocks.1.norm.bias"].abs().min() > 1e-4


def initial(name: str) -> dict[str, torch.Tensor]:
    options = RUNS[name]
    return build_model(options.model, SHAPE, options.train.seed, options.method).state_dict()
