"""Streams depend on (seed, step) alone, episodes on (seed, index) alone."""

import itertools

import numpy as np
import pytest

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.pipelines.sampling.indexed import ImageBatchStream, SetStream, batches_per_epoch

IMAGES = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)


def sets(**options):
    stream = SetStream(IMAGES, **{"batch": 4, "set_size": 6, "seed": 1, "split": "train", "steps": 5} | options)
    batches = list(stream)
    stream.close()
    return batches


def test_ranks_together_get_the_episodes_of_one_process():
    complete, ranks = sets(), [sets(rank=r, world=2) for r in range(2)]
    for step, batch in enumerate(complete):
        assert batch.step == step
        assert batch.images.shape == (4, 6, 1, 1, 1)
        joined = {int(e): x for rank in ranks for e, x in zip(rank[step].episodes, rank[step].images, strict=True)}
        assert sorted(joined) == batch.episodes.tolist() == list(range(4 * step, 4 * step + 4))
        for episode, images in zip(batch.episodes, batch.images, strict=True):
            assert np.array_equal(joined[int(episode)], images)


def test_a_stream_can_start_at_any_step():
    for late, early in zip(sets(start_step=3), sets()[3:], strict=True):
        assert np.array_equal(late.images, early.images)
    assert not np.array_equal(sets(seed=2)[0].images, sets()[0].images)


def test_image_batches_contain_every_image_once_per_epoch():
    position = {"batch": 8, "seed": 0, "split": "train", "steps": 10}
    stream = ImageBatchStream(IMAGES, **position)
    batches = list(stream)
    stream.close()
    for epoch in (batches[:5], batches[5:]):
        assert sorted(np.concatenate([images.ravel() for images, _ in epoch])) == list(range(40))
    assert not np.array_equal(batches[0][0], batches[5][0])
    half = next(iter(ImageBatchStream(IMAGES, **position, rank=1, world=2)))[0]
    assert np.array_equal(half, batches[0][0][1::2])


def test_image_batches_with_row_indices():
    position = {"batch": 8, "seed": 0, "split": "train", "steps": 7, "with_rows": True}
    whole = list(ImageBatchStream(IMAGES, **position))
    halves = [list(ImageBatchStream(IMAGES, **position, rank=rank, world=2)) for rank in range(2)]
    plain = list(ImageBatchStream(IMAGES, **position | {"with_rows": False}))
    for (images, step, rows), (same, _), *parts in zip(whole, plain, *halves, strict=True):
        assert np.array_equal(images, same)
        assert images.ravel().tolist() == rows.tolist()  # the value of an image is its row
        assert {(part[1], len(part[2])) for part in parts} == {(step, 4)}
        assert sorted(np.concatenate([part[2] for part in parts])) == sorted(rows)
    assert batches_per_epoch(40, 8) == 5 == batches_per_epoch(47, 8)


def test_close_stops_the_thread_and_errors_reach_the_consumer():
    endless = SetStream(IMAGES, batch=2, set_size=3, seed=0, split="train")
    assert len(list(itertools.islice(endless, 3))) == 3
    endless.close()
    assert not endless._thread.is_alive()

    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, rows):
            raise OSError("disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        next(iter(SetStream(Broken(), batch=1, set_size=2, seed=0, split="train")))


def test_impossible_batch_sizes_are_refused():
    with pytest.raises(DataError, match="is not a multiple of 3 ranks"):
        sets(world=3)
    with pytest.raises(DataError, match="has no images"):
        SetStream(IMAGES[:0], batch=1, set_size=1, seed=0, split="train")
    with pytest.raises(DataError, match="exceeds the"):
        ImageBatchStream(IMAGES, batch=41, seed=0, split="train")


LABELS = np.repeat(np.arange(7), 6)


def test_an_episode_depends_on_seed_and_index_alone():
    sampler = EpisodeSampler(LABELS, way=5, shot=2, query=3, seed=0)
    later, again = sampler.episode(9), EpisodeSampler(LABELS, way=5, shot=2, query=3, seed=0).episode(9)
    assert np.array_equal(later.support, again.support)
    assert np.array_equal(later.query, again.query)
    assert len(set(later.classes.tolist())) == 5
    for k, class_id in enumerate(later.classes):
        rows = np.concatenate([later.support[k], later.query[k]])
        assert len(set(rows.tolist())) == 5
        assert (LABELS[rows] == class_id).all()
    support, query = sampler.batch(8, 2)
    assert np.array_equal(support[1], later.support)
    assert query.shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"way": 8, "shot": 1, "query": 1}, "way 8 exceeds the 7 classes"),
        ({"way": 5, "shot": 3, "query": 4}, "need 7 images per class, but class 0 has 6"),
        ({"way": 1, "shot": 1, "query": 1}, "way must be at least 2"),
    ],
)
def test_impossible_episodes_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        EpisodeSampler(LABELS, seed=0, **options)
