"""Tasks depend on (seed, split, index) alone; their classes come from a partition, or are single images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from metagmvae.pipelines.grouped_labels import GroupedLabels
from metagmvae.pipelines.records import DataError, TaskBatch
from metagmvae.pipelines.sampling.group_draw import GroupDraw
from metagmvae.pipelines.sampling.task_stream import TaskStream, large_classes

IMAGES = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)
"""The value of an image is its row."""
LABELS = np.repeat(np.arange(6), 10)
BY_PARITY = np.arange(60) % 4
OPTIONS: dict[str, Any] = {"batch": 4, "way": 3, "per_class": 5, "seed": 1, "split": "train", "steps": 6}


def tasks(partitions: list[np.ndarray] | None = None, **options: Any) -> list[TaskBatch]:
    stream = TaskStream(IMAGES, [LABELS] if partitions is None else partitions, **OPTIONS | options)
    batches = list(stream)
    stream.close()
    return batches


def test_classes_of_a_task_differ_and_have_different_images() -> None:
    drawn = set()
    for step, batch in enumerate(tasks(steps=40)):
        assert batch.step == step
        assert batch.images.shape == (4, 3, 5, 1, 1, 1)
        assert batch.images.dtype == np.uint8
        assert batch.tasks.tolist() == list(range(4 * step, 4 * step + 4))
        for rows in batch.images.reshape(4, 3, 5):
            classes = [set(LABELS[rows[k]]) for k in range(3)]
            assert all(len(labels) == 1 for labels in classes)
            assert len(set().union(*classes)) == 3
            assert all(len(set(rows[k])) == 5 for k in range(3))
            drawn |= set(rows.ravel().tolist())
    assert drawn == set(range(60))


def test_classes_and_images_are_uniform() -> None:
    """Each row is in a task with probability 15 / 60: 2,400 tasks give 600 of each, with a deviation of about 21."""
    counts = np.zeros(60)
    for batch in tasks(steps=600):
        counts += np.bincount(batch.images.ravel(), minlength=60)
    assert abs(counts - 600).max() < 5 * np.sqrt(2400 * 0.25 * 0.75)


@pytest.mark.parametrize("partitions", [[LABELS], [LABELS, BY_PARITY], []], ids=["labels", "clusters", "images"])
def test_ranks_together_have_the_tasks_of_one_process(partitions: list[np.ndarray]) -> None:
    per_class = {"per_class": 5 if partitions else 1}
    complete = tasks(partitions, **per_class)
    ranks = [tasks(partitions, rank=rank, world=2, **per_class) for rank in range(2)]
    for step, batch in enumerate(complete):
        joined = {int(e): x for rank in ranks for e, x in zip(rank[step].tasks, rank[step].images, strict=True)}
        assert {len(rank[step].tasks) for rank in ranks} == {2}
        assert sorted(joined) == batch.tasks.tolist()
        assert all(np.array_equal(joined[int(e)], x) for e, x in zip(batch.tasks, batch.images, strict=True))


def test_a_task_depends_on_seed_split_and_index_alone() -> None:
    first = tasks()
    for late, early in zip(tasks(start_step=4), first[4:], strict=True):
        assert np.array_equal(late.images, early.images)
    # Task 8 is the first of step 2 in batches of four, and the third of step 1 in batches of six.
    assert np.array_equal(tasks(batch=6)[1].images[2], first[2].images[0])
    for other in ({"seed": 2}, {"split": "test"}):
        assert not np.array_equal(tasks(**other)[0].images, first[0].images)


def test_each_task_is_drawn_from_one_partition_and_all_partitions_are_used() -> None:
    found = []
    for batch in tasks([LABELS, BY_PARITY], steps=50):
        for rows in batch.images.reshape(4, 3, 5):
            pure = [all(len(set(labels[rows[k]])) == 1 for k in range(3)) for labels in (LABELS, BY_PARITY)]
            assert sum(pure) == 1
            found.append(pure[0])
    assert 70 < sum(found) < 130  # of 200


def test_without_partitions_each_image_is_a_class() -> None:
    drawn = set()
    for batch in tasks([], per_class=1, steps=60):
        assert batch.images.shape == (4, 3, 1, 1, 1, 1)
        for rows in batch.images.reshape(4, 3):
            assert len(set(rows.tolist())) == 3
            drawn |= set(rows.tolist())
    assert drawn == set(range(60))


def test_small_classes_and_images_of_no_class_are_left_out() -> None:
    labels = np.array([-1] * 8 + [7] * 5 + [3] * 4 + [9] * 5 + [2] * 6)
    labels = np.concatenate([labels, np.full(60 - len(labels), -1)])
    assert [rows.tolist() for rows in large_classes(labels, 5)] == [
        [*range(22, 28)],
        [*range(8, 13)],
        [*range(17, 22)],
    ]
    used = {int(row) for batch in tasks([labels], steps=40) for row in batch.images.ravel()}
    assert used == {*range(8, 13), *range(17, 28)}


def test_too_few_classes_or_images_are_one_line() -> None:
    with pytest.raises(DataError, match=r"^method.way is 7, but only 6 classes of split 'train' have 5 images") as one:
        tasks(way=7)
    assert "partition" not in str(one.value)
    with pytest.raises(DataError, match=r"only 0 classes of split 'train' have 11 images \(method.shot \+"):
        tasks(per_class=11)
    with pytest.raises(DataError, match=r"only 4 classes .* in partition 2 of 2; lower one of these settings$"):
        tasks([LABELS, BY_PARITY], way=5)
    with pytest.raises(DataError, match=r"^method.way is 61, but split 'train' has only 60 images; lower method.way$"):
        tasks([], way=61, per_class=1)
    with pytest.raises(DataError, match="is not a multiple of 3 ranks"):
        tasks(world=3)
    with pytest.raises(DataError, match="has no images"):
        TaskStream(IMAGES[:0], [LABELS[:0]], **OPTIONS)


def test_the_first_images_of_each_class_are_of_other_groups_than_the_rest() -> None:
    groups = np.arange(60) % 10 // 3 + np.where(LABELS < 4, 0, 4)  # classes 0 to 3 share groups, and 4 and 5 do
    draw = GroupDraw(GroupedLabels(LABELS, groups, list("abcdef")), shot=2, query=3)
    seen = set()
    for batch in tasks(steps=20, grouped=draw):
        for rows_KN in batch.images.reshape(4, 3, 5):
            assert len(set(rows_KN.ravel().tolist())) == 15
            assert all(len(set(LABELS[rows])) == 1 for rows in rows_KN)
            assert len(set(LABELS[rows_KN[:, 0]])) == 3
            assert not set(groups[rows_KN[:, :2].ravel()]) & set(groups[rows_KN[:, 2:].ravel()])
            seen |= set(rows_KN.ravel().tolist())
    assert seen == set(range(60))
    few = GroupDraw(GroupedLabels(LABELS, LABELS + 0, list("abcdef")), shot=2, query=3)
    with pytest.raises(DataError, match=r"only 0 classes of split 'train' have 2 and 3 images .* of different groups"):
        tasks(grouped=few)
