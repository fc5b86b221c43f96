"""Methods that learn from tasks: the step, the stream of tasks, and what a method needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_tasks import LABELS, RUNS, SHAPE, images

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.pipelines.records import DataError, TaskBatch
from metagmvae.training.methods.cactus import feature_partitions
from metagmvae.training.methods.method import MethodData
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.methods.protonets import ProtoNets
from metagmvae.training.methods.task_method import TaskMethod, TaskStep
from metagmvae.training.trainer.builders import build_model


def step_of(name: str) -> tuple[ProtoNets, TaskStep]:
    options = RUNS[name]
    model = build_model(options.model, SHAPE, 0, options.method)
    step = find_method(MethodSettings(name="protonets")).step(model, options)
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
    method = find_method(MethodSettings(name="protonets"))
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
    method, untrained = find_method(MethodSettings(name="protonets")), TaskMethod(ProtoNets, trains=False)
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
    method = find_method(MethodSettings(name="protonets"))
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
