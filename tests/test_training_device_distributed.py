"""Two gloo ranks equal one process, except for batch normalisation; an error on one rank ends both.

One pair of processes runs all cases once and saves the results. The tests compare them with the same cases computed in
this process on the whole batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_processes import run_on_two_ranks
from torch import Tensor, nn

from metagmvae.configs.schema import ModelSettings, PretrainSettings, TrainSettings
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.device import distributed
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.methods.meta_step import MetaStep
from metagmvae.training.objectives.nt_xent import nt_xent
from metagmvae.training.pretraining.contrastive import ContrastiveStep
from metagmvae.training.trainer.builders import build_schedule
from metagmvae.training.trainer.context import RunContext
from metagmvae.training.trainer.loop import Hooks, Stage, fit_stage
from metagmvae.training.trainer.update import NonFiniteLossError

M, SHAPE, EPISODES, CPU = 6, (1, 6, 6), 4, torch.device("cpu")
SETTINGS = TrainSettings(
    batch=EPISODES,
    set_size=M,
    samples=4,
    decode_samples=2,
    components=3,
    em_iterations=3,
    channels_last=False,
)


def model(reconstruct: str = "pixels") -> MetaGMVAE:
    torch.manual_seed(0)
    sizes = {"latent": 2, "channels": 4, "width": 8, "heads": 2, "layers": 1}
    net = MetaGMVAE(ModelSettings(reconstruct=reconstruct, **sizes), SHAPE).double()
    net.scale_images = lambda images: images.double() / 255  # type: ignore[method-assign]
    return net


def sets(episodes: list[int]) -> SetBatch:
    images = [np.random.default_rng(e).integers(0, 256, (M, *SHAPE), dtype=np.uint8) for e in episodes]
    return SetBatch(np.stack(images), np.array(episodes, dtype=np.int64), step=0)


def feature_sets(episodes: list[int]) -> SetBatch:
    h = [2 * np.random.default_rng(e).normal(size=(M, 4)) for e in episodes]
    return SetBatch(np.stack(h), np.array(episodes, dtype=np.int64), step=0)


def of_this_rank() -> slice:
    """Episodes b with b % world == rank, as the stream distributes them."""
    return slice(distributed.rank(), None, distributed.world_size())


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def meta(train: bool, episodes: list[int]) -> dict[str, Tensor]:
    net = model()
    step = distributed.data_parallel(MetaStep(net, SETTINGS), CPU).train(train)
    loss, terms = step(sets(episodes[of_this_rank()]))
    loss.backward()
    return {
        "loss": distributed.mean_over_ranks(loss),
        "elbo": distributed.mean_over_ranks(terms["elbo"]),
        "gradient": gradient(net),
    }


class FeatureSets:
    """A stream of sets of features, new episodes in each step."""

    def __init__(self) -> None:
        self.step = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> SetBatch:
        self.step += 1
        return feature_sets([self.step * EPISODES + b for b in range(EPISODES)][of_this_rank()])


class RankContext(RunContext):
    device = CPU

    def __init__(self) -> None:
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.lines: list[Any] = []

    def load(self) -> None:
        return None

    def report(self, line: Any, state: Any) -> None:
        assert (state is not None) == (self.rank == 0 and bool(line["checkpoint"]))
        self.lines.append(line)


def trained() -> dict[str, Any]:
    """Five Adam steps of the real loop, in training mode, on the model without batch normalisation."""
    net = model("features")
    step = distributed.data_parallel(MetaStep(net, SETTINGS), CPU)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    stage = Stage("meta", 5, step, optimizer, build_schedule(optimizer, "constant", 5), FeatureSets(), 24, 1.0)
    context = RankContext()
    fit_stage(stage, Hooks(lambda step: {}, lambda step: {}, 2, 5), context, start=0, elapsed=0.0)
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    return {"weights": weights, "losses": torch.tensor([line["loss"] for line in context.lines])}


class FailsOnOneRank(nn.Module):
    """The loss is NaN in the third step of rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, batch: SetBatch) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        bad = self.calls == 3 and distributed.rank() == 1
        return (self.w * (float("nan") if bad else 1.0)).sum(), {}


def fails_on_one_rank() -> dict[str, Any]:
    inner = FailsOnOneRank()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    schedule = build_schedule(optimizer, "constant", 9)
    stage = Stage("meta", 9, distributed.data_parallel(inner, CPU), optimizer, schedule, FeatureSets(), 24)
    try:
        fit_stage(stage, Hooks(lambda step: {}, lambda step: {}, 9, 9), RankContext(), start=0, elapsed=0.0)
    except NonFiniteLossError as error:
        return {"error": str(error), "weights": inner.w.detach(), "calls": inner.calls}
    return {"error": ""}


def contrastive_loss() -> dict[str, Tensor]:
    """NT-Xent through a linear encoder, negatives gathered from all ranks."""
    torch.manual_seed(0)
    encoder = nn.Linear(5, 3).double()
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    count = 8 // distributed.world_size()
    local = x[:, distributed.rank() * count : (distributed.rank() + 1) * count]
    wrapped = distributed.data_parallel(encoder, CPU)
    first, second = wrapped(local.flatten(0, 1)).chunk(2)
    loss = nt_xent(first, second, 0.2, distributed.all_gather, distributed.rank())
    loss.backward()
    return {"loss": distributed.mean_over_ranks(loss), "gradient": gradient(encoder)}


def contrastive_step() -> dict[str, Tensor]:
    """A step in evaluation mode. The views are replaced by fixed ones, because random views are keyed by rank."""
    views = iter([lambda x: x, lambda x: x.flip(-1)])
    torch.manual_seed(0)
    net = MetaGMVAE(ModelSettings(latent=2, channels=8, width=8, heads=2, layers=1), SHAPE)
    images = np.random.default_rng(3).integers(0, 256, (8, *SHAPE), dtype=np.uint8)
    step_module = ContrastiveStep(net, nn.Linear(net.feature_dim, 4), SETTINGS, PretrainSettings(temperature=0.2))
    step_module.view = lambda x, generator: next(views)(x)  # type: ignore[assignment]
    step = distributed.data_parallel(step_module, CPU).eval()
    loss, _ = step(np.array_split(images, distributed.world_size())[distributed.rank()], 1)
    loss.backward()
    return {"loss": distributed.mean_over_ranks(loss), "gradient": gradient(net.encoder)}


def cases() -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    episodes = list(range(EPISODES))
    return {
        "frozen": meta(False, episodes),
        "batch statistics": meta(True, episodes),
        "trained": trained(),
        "contrastive loss": contrastive_loss(),
        "contrastive step": contrastive_step(),
    }


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        gathered = distributed.all_gather(torch.full((2, 3), float(rank)))
        distributed.barrier()
        helpers = {
            "rank": distributed.rank(),
            "world": distributed.world_size(),
            "gathered": gathered,
            "mean": distributed.mean_over_ranks(torch.tensor([1.0, 5.0]) * (rank + 1)),
        }
        torch.save({**cases(), "fails": fails_on_one_rank(), "helpers": helpers}, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return run_on_two_ranks(worker, folder)


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Any]]:
    threads = torch.get_num_threads()
    try:
        return cases()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["frozen", "contrastive loss"])
def test_two_ranks_equal_one_process(
    case: str, ranks: list[dict[str, Any]], one_process: dict[str, dict[str, Any]]
) -> None:
    for key, expected in one_process[case].items():
        for rank in ranks:
            assert torch.allclose(rank[case][key], expected, rtol=1e-11, atol=1e-12), key
        assert torch.equal(ranks[0][case][key], ranks[1][case][key])


def test_two_ranks_equal_one_process_in_the_contrastive_step(
    ranks: list[dict[str, Any]], one_process: dict[str, dict[str, Any]]
) -> None:
    for key, expected in one_process["contrastive step"].items():
        for rank in ranks:
            assert torch.allclose(rank["contrastive step"][key], expected, rtol=1e-4, atol=1e-6), key  # float32


def test_training_on_two_ranks_equals_training_in_one_process(
    ranks: list[dict[str, Any]], one_process: dict[str, dict[str, Any]]
) -> None:
    for rank in ranks:
        assert torch.allclose(rank["trained"]["weights"], one_process["trained"]["weights"], rtol=0, atol=1e-10)
        assert torch.allclose(rank["trained"]["losses"], one_process["trained"]["losses"], rtol=1e-6)
    assert torch.equal(ranks[0]["trained"]["weights"], ranks[1]["trained"]["weights"])
    start = torch.cat([p.detach().flatten() for p in model("features").parameters()])
    assert (one_process["trained"]["weights"] - start).abs().max() > 0.01


def test_with_batch_normalisation_two_ranks_equal_the_mean_of_two_half_batches(
    ranks: list[dict[str, Any]], one_process: dict[str, dict[str, Any]]
) -> None:
    """In training mode a rank normalises by its own images: the result is exactly the mean of the results of the two
    halves, not the result of the whole batch."""
    halves = [meta(True, [0, 2]), meta(True, [1, 3])]
    for key in ("loss", "gradient"):
        mean = (halves[0][key] + halves[1][key]) / 2
        assert torch.allclose(ranks[0]["batch statistics"][key], mean, rtol=1e-11, atol=1e-12)
        assert torch.equal(ranks[0]["batch statistics"][key], ranks[1]["batch statistics"][key])
    assert not torch.allclose(mean, one_process["batch statistics"]["gradient"], rtol=1e-3)


def test_non_finite_loss_on_one_rank_ends_both_in_the_same_step(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["fails"]["error"].startswith("meta step 3:")
        assert rank["fails"]["calls"] == 3
        assert torch.allclose(rank["fails"]["weights"], torch.full((3,), 0.8))  # two steps of 0.1


def test_collectives(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        helpers = rank["helpers"]
        assert (helpers["rank"], helpers["world"]) == (number, 2)
        assert helpers["gathered"].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        assert helpers["mean"].tolist() == [1.5, 7.5]


def test_without_a_process_group_there_is_one_rank() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    module, values = nn.Linear(2, 2), torch.ones(2)
    assert distributed.data_parallel(module, CPU) is module
    assert distributed.all_gather(values) is values
    mean = distributed.mean_over_ranks(values)
    assert torch.equal(mean, values)
    assert mean is not values
    distributed.barrier()


def vote(rank: int, folder: str) -> None:
    """Rank 1 is asked to stop after step 5; the slow steps make the ranks communicate at every step."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    step = 0
    stop = distributed.StopVote(lambda: rank == 1 and step >= 5, torch.device("cpu"), start=0)
    for step in range(1, 200):
        time.sleep(0.02)
        if stop(step):
            break
    torch.save({"step": step}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    first, second = run_on_two_ranks(vote, tmp_path)
    assert first == second
    assert 5 <= first["step"] < 199
