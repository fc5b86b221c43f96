"""Training steps that do not wait for the device: skipped updates, no reads inside a step, and whole-graph capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import batch, model, settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metagmvae.configs.schema import PretrainSettings
from metagmvae.training.device.seeding import host_permutation
from metagmvae.training.methods.meta_step import MetaStep
from metagmvae.training.objectives.distinct_points import MixtureError
from metagmvae.training.pretraining.contrastive import ContrastiveStep
from metagmvae.training.trainer.update import DeviceUpdate, NonFiniteLossError, Update, build_update

CPU = torch.device("cpu")
READS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "is_nonzero", "item", "equal", "masked_select"}
"""Operators whose result the host has to wait for."""


class Line(nn.Module):
    """Loss of a linear function; not finite for inputs that are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.net(x)
        return (out - 1).square().mean(), {"largest": out.detach().max()}


def inputs(step: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(step))


def train(kind: type[Update], batches: list[Tensor], optimizer: type[torch.optim.Adam] = torch.optim.Adam) -> Any:
    module = Line()
    adam = optimizer(module.parameters(), lr=0.1, weight_decay=0.01)
    update = kind("toy", module, adam, 0.5)
    values = []
    for step, x in enumerate(batches, start=1):
        adam.param_groups[0]["lr"] = 0.1 / step  # what a schedule does
        values.append(update(x, step))
    return module, adam, update, torch.stack(values)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_update_on_the_device_equals_the_plain_update(optimizer: type[torch.optim.Adam]) -> None:
    batches = [inputs(step) for step in range(8)]
    plain, adam, _, values = train(Update, batches, optimizer)
    module, fused, update, device_values = train(DeviceUpdate, batches, optimizer)
    update.check()
    assert update.metrics == ["loss", "largest", "gradient_norm"]
    torch.testing.assert_close(device_values, values)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight)
    assert fused.state_dict()["param_groups"] == adam.state_dict()["param_groups"]
    assert [float(state["step"]) for state in fused.state.values()] == [8.0, 8.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_failed_step_and_all_later_ones_change_nothing(bad: float) -> None:
    good = [inputs(step) for step in range(4)]
    expected, adam, _, _ = train(DeviceUpdate, good)
    module, optimizer, update, _ = train(DeviceUpdate, [*good, torch.full((5, 3), bad), inputs(5), inputs(6)])
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), module.parameters(), strict=True))
    for state, other in zip(adam.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(state[key], other[key]) for key in state)
    with pytest.raises(NonFiniteLossError, match=r"toy step 5: loss (nan|inf).*not applied"):
        update.check()


def test_check_counts_the_steps_since_the_last_check() -> None:
    _, _, update, _ = train(DeviceUpdate, [inputs(1), inputs(2)])
    update.check()
    update(inputs(3), 3)
    update(torch.full((5, 3), float("nan")), 4)
    update(inputs(5), 5)
    with pytest.raises(NonFiniteLossError, match="toy step 4"):
        update.check()


@pytest.mark.parametrize("kind", [Update, DeviceUpdate])
def test_too_few_distinct_points_is_the_reason_that_is_raised(kind: type[Update]) -> None:
    net = model(torch.float32)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias[2:] = -2000.0
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    update = kind("meta", MetaStep(net, settings()), torch.optim.Adam(net.parameters()), 0.0)

    def train_and_check() -> None:
        update(batch(), 1)
        update.check()

    with pytest.raises(MixtureError, match="3 components"):
        train_and_check()
    assert all(torch.equal(before[name], weight) for name, weight in net.named_parameters())


def test_processors_and_other_optimisers_are_checked_at_once() -> None:
    module = Line()
    assert type(build_update("toy", module, torch.optim.Adam(module.parameters()), 0.0, CPU)) is Update
    sgd = torch.optim.SGD(module.parameters())
    assert type(build_update("toy", module, sgd, 0.0, torch.device("cuda"))) is Update


class NoReads(TorchDispatchMode):
    """Fails at any operator that the host has to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in READS:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def meta_step() -> tuple[nn.Module, tuple[Tensor, ...]]:
    step = MetaStep(model(torch.float32), settings()).train()
    return step, step.prepare(batch())


def feature_step() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = model(torch.float32, reconstruct="features")
    step = MetaStep(net, settings(clip_norm=1.0)).train()
    data, *rest = step.prepare(batch())
    features = torch.randn(*data.shape[:2], net.feature_dim, generator=torch.Generator().manual_seed(0))
    return step, (features, *rest)


def denoising_step() -> tuple[nn.Module, tuple[Tensor, ...]]:
    step = MetaStep(model(torch.float32), settings(denoise=True), lambda x, generator: x.flip(-1)).train()
    return step, step.prepare(batch())


def contrastive_step() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = model(torch.float32)
    step = ContrastiveStep(net, nn.Linear(net.feature_dim, 4), settings(), PretrainSettings()).train()
    return step, step.prepare(batch().images[0], 1)


STEPS = [meta_step, feature_step, denoising_step, contrastive_step]


@pytest.mark.parametrize("make", STEPS)
def test_no_operator_of_a_step_waits_for_the_device(make: Any) -> None:
    step, tensors = make()
    optimizer = torch.optim.Adam([p for p in step.parameters() if p.requires_grad])
    update = DeviceUpdate("toy", step, optimizer, 0.0)
    update.learning_rates[0].fill_(1e-3)
    with NoReads():
        update._step(update._backward(*step.compute(*tensors)))
    with pytest.raises(AssertionError, match="waits"), NoReads():
        tensors[0].sum().item()


@pytest.mark.parametrize("make", STEPS)
def test_a_step_compiles_to_one_graph_and_equals_the_eager_step(make: Any) -> None:
    step, tensors = make()
    loss, terms = step.compute(*tensors)
    compiled_loss, compiled_terms = torch.compile(step.compute, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_terms, terms)


def test_order_of_colour_changes_is_drawn_without_waiting_for_the_device() -> None:
    """On a GPU the order comes from a generator of the host, a function of the state of the device's generator."""

    class GpuGenerator:
        device = torch.device("cuda")

        def __init__(self, seed: int, offset: int) -> None:
            self.initial_seed, self.get_offset = lambda: seed, lambda: offset

    orders = [host_permutation(8, GpuGenerator(seed, offset)) for seed, offset in ((1, 0), (1, 0), (2, 0), (1, 4))]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(8))
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]
    cpu = torch.Generator().manual_seed(3)
    assert host_permutation(8, cpu) == torch.randperm(8, generator=torch.Generator().manual_seed(3)).tolist()
