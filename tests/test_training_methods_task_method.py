"""Methods that learn from tasks: the step, and complete runs, killed and resumed, alone and on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_processes import run_on_two_ranks
from small_tasks import LABELS, SHAPE, images, settings
from test_training_trainer_stages import FolderContext, assert_equal, flat, without_times

from metagmvae.configs.schema import Settings
from metagmvae.pipelines.records import DataError, TaskBatch
from metagmvae.training.methods import methods_by_name
from metagmvae.training.methods.cactus import feature_partitions
from metagmvae.training.methods.method import MethodData
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.methods.protonets import ProtoNets
from metagmvae.training.methods.task_method import TaskMethod, TaskStep
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.trainer.builders import build_encoder_model, build_model
from metagmvae.training.trainer.checkpoint import load_state
from metagmvae.training.trainer.context import TrainState
from metagmvae.training.trainer.stages import train

PROTONETS = {"name": "protonets"}
RUNS: dict[str, Settings] = {
    "labels": settings(PROTONETS | {"tasks": "labels"}),
    "images": settings(PROTONETS | {"tasks": "images", "shot": 1}),
    "clusters": settings(PROTONETS | {"tasks": "clusters"}, pretrain={"steps": 4}),
    "features": settings(PROTONETS | {"tasks": "labels", "network": "mlp"}, pretrain={"steps": 4}),
    "features and clusters": settings(PROTONETS | {"tasks": "clusters", "network": "mlp"}, pretrain={"steps": 4}),
    "views of features": settings(PROTONETS | {"tasks": "images", "network": "mlp", "shot": 1}, pretrain={"steps": 4}),
    "dataset of features": settings(PROTONETS | {"tasks": "clusters", "network": "mlp"}),
}
"""Each kind of tasks and of networks; those with pre-training need it."""


def validate(model: Any) -> dict[str, dict[str, float]]:
    """A number that depends on all weights."""
    assert not model.training
    total = sum(p.detach().double().abs().sum() for p in model.parameters())
    return {"3w2s": {"accuracy": float(total) % 1.0, "ci95": 0.1}}


def run(options: Settings, context: FolderContext, stored: bool = False) -> TrainState:
    """Train; with `stored` on the features of an encoder, as of a dataset of features."""
    method, data, encoder = find_method(options.method.name), images(), None
    if stored:
        model = build_encoder_model(options.model, SHAPE, seed=7)
        encoder = model.encoder.state_dict()
        data = encode_images(model, data, torch.device("cpu"), raw=True).numpy()
    labels = LABELS if method.needs_labels(options) else None
    return train(options, data, SHAPE, "data", context, validate, labels=labels, encoder=encoder)


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


def step_of(name: str) -> tuple[ProtoNets, TaskStep]:
    options = RUNS[name]
    model = build_model(options.model, SHAPE, 0, options.method)
    step = find_method("protonets").step(model, options)
    assert isinstance(model, ProtoNets)
    assert isinstance(step, TaskStep)
    return model, step


def batch(tasks: tuple[int, ...], per_class: int) -> TaskBatch:
    rows = np.stack([np.random.default_rng(t).choice(50, size=(3, per_class), replace=False) for t in tasks])
    return TaskBatch(images()[rows], np.array(tasks), step=0)


def test_support_and_queries_of_labelled_tasks() -> None:
    _, step = step_of("labels")
    given = batch((4, 7), 5)
    support, query = step.prepare(given)
    x = torch.tensor(given.images).float() / 255
    assert torch.equal(support, x[:, :, :2])
    assert torch.equal(query, x[:, :, 2:])
    assert support.shape == (2, 3, 2, *SHAPE)


def test_features_are_given_to_the_perceptron_as_they_are() -> None:
    model, step = step_of("features")
    given = TaskBatch(np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32), np.arange(2), step=0)
    support, query = step.prepare(given)
    assert torch.equal(torch.cat([support, query], dim=2), torch.tensor(given.images))
    assert torch.isfinite(step(given)[0])
    assert not any(p.requires_grad for p in model.encoder.parameters())


@pytest.mark.parametrize("name", ["images", "views of features"])
def test_views_are_keyed_by_seed_and_task(name: str) -> None:
    """With features, the frozen encoder gives those of images and of views, without gradient."""
    model, step = step_of(name)
    step.train()
    assert model.encoder.training == (name == "images")
    with torch.no_grad():
        together = step.prepare(batch((4, 7), 1))
        shape = SHAPE if name == "images" else (4,)
        assert [part.shape for part in together] == [(2, 3, 1, *shape), (2, 3, 3, *shape)]
        x = torch.tensor(batch((4, 7), 1).images).float() / 255
        expected = x if name == "images" else model.scale(model.encoder(x.flatten(0, 2))).unflatten(0, (2, 3, 1))
        assert torch.equal(together[0], expected)
        for position, task in enumerate((4, 7)):
            alone = step.prepare(batch((task,), 1))
            assert torch.allclose(alone[1][0], together[1][position], atol=1e-6)
        renamed = TaskBatch(batch((4, 7), 1).images, np.array([5, 7]), step=0)
        other = step.prepare(renamed)[1]
        assert not torch.allclose(other[0], together[1][0], atol=1e-3)
        assert torch.allclose(other[1], together[1][1], atol=1e-6)
        step.settings = step.settings.model_copy(update={"train": step.settings.train.model_copy(update={"seed": 1})})
        assert not torch.allclose(step.prepare(batch((4, 7), 1))[1], together[1], atol=1e-3)
    if name == "views of features":
        assert not any(part.requires_grad for part in step.prepare(batch((4, 7), 1)))


def test_the_stream_draws_from_labels_clusters_or_images() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 4)).astype(np.float32)
    data = MethodData(features + 1, images(), LABELS, lambda: features)
    position = {"seed": 0, "split": "train"}
    method = find_method("protonets")
    labels = method.stream(data, RUNS["labels"], **position)
    assert [rows.tolist() for rows in labels.classes[0]] == [[*range(10 * k, 10 * k + 10)] for k in range(5)]  # type: ignore[attr-defined]
    clusters = method.stream(data, RUNS["features and clusters"], **position)
    expected = feature_partitions(features, RUNS["features and clusters"].method, seed=0)
    for classes, partition in zip(clusters.classes, expected, strict=True):  # type: ignore[attr-defined]
        for rows in classes:
            assert len(set(partition[rows])) == 1
            assert len(rows) >= 5
    assert clusters.at(0).images.shape == (2, 3, 5, 4)
    assert clusters.images is data.rows  # type: ignore[attr-defined]
    views = method.stream(data, RUNS["views of features"], **position)
    assert views.at(0).images.shape == (2, 3, 1, *SHAPE)
    assert method.images_per_step(RUNS["labels"]) == 2 * 3 * 5
    assert method.images_per_step(RUNS["images"]) == 2 * 3 * 4


def test_what_a_method_needs() -> None:
    method, untrained = find_method("protonets"), TaskMethod(ProtoNets, trains=False)
    needs = {name: (method.on_features(s), method.needs_encoder(s), method.needs_labels(s)) for name, s in RUNS.items()}
    assert needs == {
        "labels": (False, False, True),
        "images": (False, False, False),
        "clusters": (False, True, False),
        "features": (True, True, True),
        "features and clusters": (True, True, False),
        "views of features": (True, True, False),
        "dataset of features": (True, True, False),
    }
    assert method.needs_steps(RUNS["labels"])
    assert not untrained.needs_steps(RUNS["labels"])
    assert not untrained.needs_labels(RUNS["labels"])


def test_data_that_do_not_suffice_are_found_before_the_training() -> None:
    method = find_method("protonets")
    method.check_data(RUNS["labels"], 50, LABELS)
    method.check_data(RUNS["images"], 3, None)
    method.check_data(RUNS["clusters"], 15, None)
    with pytest.raises(DataError, match="only 2 classes of split 'train' have 5 images"):
        method.check_data(RUNS["labels"], 20, LABELS[:20])
    with pytest.raises(DataError, match="has only 2 images"):
        method.check_data(RUNS["images"], 2, None)
    with pytest.raises(DataError, match="a task has 15 images, but there are only 14"):
        method.check_data(RUNS["clusters"], 14, None)
    untrained = TaskMethod(ProtoNets, trains=False)
    untrained.check_data(RUNS["dataset of features"], 14, None)
    with pytest.raises(DataError, match=r"pretrain.steps is 4, but protonets trains a new network on each task"):
        untrained.check_data(RUNS["clusters"], 14, None)


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
