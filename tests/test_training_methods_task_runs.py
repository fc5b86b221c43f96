"""Complete runs of a method that learns from tasks: killed and resumed, alone and on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_on_two_ranks
from small_runs import FolderContext, assert_equal, flat, without_times
from small_tasks import PROTONETS, RUNS, SHAPE, images, run, settings

from metagmvae.configs.schema import Settings
from metagmvae.training.methods import methods_by_name
from metagmvae.training.methods.protonets import ProtoNets
from metagmvae.training.methods.task_method import TaskMethod
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.trainer.builders import build_encoder_model, build_model
from metagmvae.training.trainer.checkpoint import load_state
from metagmvae.training.trainer.stages import train

UNINTERRUPTED: dict[str, FolderContext] = {}


def uninterrupted(name: str, factory: pytest.TempPathFactory) -> FolderContext:
    if name not in UNINTERRUPTED:
        UNINTERRUPTED[name] = FolderContext(factory.mktemp("run"))
        torch.manual_seed(1)
        run(RUNS[name], UNINTERRUPTED[name], stored=name == "dataset of features")
    return UNINTERRUPTED[name]


@pytest.mark.parametrize("killed_at", [3, 7])
@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_run_equals_the_uninterrupted_one(
    name: str, killed_at: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed at meta step 3 or 7, before and after its checkpoint of step 4; bit for bit, metric lines too."""
    expected, stored = uninterrupted(name, tmp_path_factory), name == "dataset of features"
    first = RUNS[name].pretrain.steps
    killed = FolderContext(tmp_path, first + killed_at)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        run(RUNS[name], killed, stored)
    reached = killed.saved[-1] if killed.saved else None
    assert reached == (("meta", 4) if killed_at == 7 else ("pretrain", 4) if first else None)
    torch.manual_seed(9 if reached else 1)
    resumed = FolderContext(tmp_path)
    run(RUNS[name], resumed, stored)
    assert_equal(expected.load(), resumed.load())
    steps = 0 if reached is None else reached[1] + (first if reached[0] == "meta" else 0)
    before = [line for line in killed.lines if int(line["global_step"]) <= steps]
    assert without_times(expected.lines) == without_times(before) + without_times(resumed.lines)


@pytest.mark.parametrize("name", RUNS)
def test_only_the_body_is_meta_trained(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A frozen encoder keeps its weights and its running statistics; features are scaled by those of the images."""
    context = uninterrupted(name, tmp_path_factory)
    state = context.load()
    assert state is not None
    options, stored = RUNS[name], name == "dataset of features"
    model = build_model(options.model, SHAPE, options.train.seed, options.method)
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state["model"])
    changed = {key for key, value in initial.items() if not torch.equal(value, state["model"][key])}
    assert isinstance(model, ProtoNets)
    trained = "encoder." if model.own_body is None else "own_body."
    assert all(key in changed for key, _ in model.named_parameters() if key.startswith(trained))
    if model.own_body is not None:
        encoder = build_encoder_model(options.model, SHAPE, seed=7) if stored else None
        expected = pretrained(options) if encoder is None else encoder.encoder.state_dict()
        assert all(torch.equal(model.encoder.state_dict()[key], value) for key, value in expected.items())
    if model.on_features:
        raw = EncoderModel(model.encoder, SHAPE)
        h_nF = encode_images(raw, images(), torch.device("cpu"))
        assert torch.allclose(model.scale.mean, h_nF.mean(dim=0), atol=1e-5)
    meta = [line for line in context.lines if line["stage"] == "meta"]
    assert all({"loss", "accuracy", "gradient_norm"} <= line.keys() for line in meta)


def pretrained(options: Settings) -> dict[str, Any]:
    """Weights of the encoder after pre-training alone."""

    class Memory(FolderContext):
        def report(self, line: Any, state: Any) -> None:
            self.lines.append(line)

    context = Memory(Path("/nowhere"))
    torch.manual_seed(1)
    state = train(options, images(), SHAPE, "data", context, kind="encoder")
    return {key.removeprefix("encoder."): value for key, value in state["model"].items()}


def test_it_learns(tmp_path: Path) -> None:
    options = settings(PROTONETS | {"tasks": "labels"}, train={"steps": 60, "schedule": "constant", "log_every": 10})
    context = FolderContext(tmp_path)
    run(options, context)
    lines = [line for line in context.lines if line["step"] % 10 == 0]
    assert float(lines[0]["accuracy"]) < 0.95 < float(lines[-1]["accuracy"])
    assert float(lines[-1]["loss"]) < 0.5 * float(lines[0]["loss"])


def test_data_on_the_device_give_the_same_run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("labels", "features", "views of features"):
        expected = uninterrupted(name, tmp_path_factory).load()
        assert expected is not None
        on_device = RUNS[name].model_copy(update={"data": RUNS[name].data.model_copy(update={"reader": "device"})})
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(1)
        assert flat(run(on_device, FolderContext(folder))["model"]) == flat(expected["model"])


@pytest.mark.parametrize("pretrain", [0, 4])
def test_a_method_without_meta_training_saves_its_model(
    pretrain: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the run is killed before it is saved; the features are scaled, and the model is validated once."""
    monkeypatch.setitem(methods_by_name.METHODS, "protonets", TaskMethod(ProtoNets, trains=False))
    options = settings(PROTONETS | {"network": "mlp"}, pretrain={"steps": pretrain}, train={"steps": 0})
    killed = FolderContext(tmp_path, killed_at=pretrain) if pretrain else None
    if killed is not None:
        with pytest.raises(InterruptedError):
            run(options, killed)
    context = FolderContext(tmp_path)
    state = run(options, context)
    line = context.lines[-1]
    assert (line["stage"], line["step"], line["global_step"], line["checkpoint"]) == ("meta", 0, pretrain, 1)
    assert "validation/3w2s" in line
    saved = load_state(context.path)
    assert (saved["stage"], saved["step"], saved["best"]["3w2s"]["step"]) == ("meta", 0, 0)
    assert flat(saved["model"]) == flat(state["model"])
    assert saved["model"]["scale.deviation"].max() > 0
    assert saved["model"]["scale.mean"].abs().max() > 0
    done = FolderContext(tmp_path)
    assert_equal(saved, run(options, done))
    assert done.lines == []


def trained_on_features(rank: int, world: int) -> dict[str, Any]:
    """ProtoNets on stored features, without batch normalisation; four tasks a step over all ranks."""

    class Memory(FolderContext):
        def load(self) -> None:
            return None

        def report(self, line: Any, state: Any) -> None:
            self.lines.append(line)

    context = Memory(Path("/nowhere"))
    context.rank, context.world = rank, world
    options = settings(PROTONETS | {"network": "mlp"}, train={"batch": 4, "steps": 6}, validation={"every": 0})
    state = run(options, context, stored=True)
    return {"model": dict(state["model"]), "loss": [line["loss"] for line in context.lines]}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(trained_on_features(rank, 2), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    one, two = trained_on_features(0, 1), run_on_two_ranks(worker, tmp_path)
    for name, value in one["model"].items():
        assert torch.equal(two[0]["model"][name], two[1]["model"][name]), name
        if name == "own_body.2.bias":
            continue  # it cancels in the distances: Adam amplifies rounding errors
        # Adam divides by the gradient's size: where that is nearly zero, rounding changes a weight.
        close = torch.isclose(two[0]["model"][name], value, rtol=1e-4, atol=1e-5)
        assert (~close).sum() <= 0.03 * value.numel(), name
        assert torch.allclose(two[0]["model"][name], value, rtol=0, atol=5e-3), name
    assert one["loss"] == pytest.approx(two[0]["loss"], rel=1e-4)
