"""Streaming reader: every row once per epoch, reproducible, from any step, on any number of ranks."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest

from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.sequential import StreamedImageBatches, StreamedImages, StreamedSets
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """6 shards of 20, the last one of 5 rows."""
    out = tmp_path_factory.mktemp("stream") / "data"
    write_dataset(open_source("glyphs", classes=(7, 3, 3), drawings=15), out, block=8, shard_rows=20)
    return out


@pytest.fixture
def images(folder):
    return StreamedImages(Dataset.open(folder), "train", 16)


def batches(images, kind=StreamedImageBatches, **options):
    position = {"batch": 6, "seed": 1, "split": "train", "steps": 40} | options
    stream = kind(images, **position)
    result = list(stream)
    stream.close()
    return result


def keys(rows) -> list[bytes]:
    return [row.tobytes() for row in rows]


def test_every_row_occurs_once_per_epoch_in_a_new_order(images, folder):
    everything = sorted(keys(Dataset.open(folder).images("train")))
    assert len(images) == 105
    rows = keys(row for batch, _ in batches(images, batch=7, steps=30) for row in batch)
    assert sorted(rows[:105]) == sorted(rows[105:]) == everything
    assert rows[:105] != rows[105:]
    stored = keys(Dataset.open(folder).images("train"))
    positions = [stored.index(row) for row in rows[:105]]
    assert max(abs(np.diff(positions))) > 20


@pytest.mark.parametrize(("kind", "more"), [(StreamedImageBatches, {}), (StreamedSets, {"set_size": 5})])
def test_a_stream_can_start_at_any_step_of_any_epoch(images, kind, more):
    complete = batches(images, kind, **more)
    for start in (3, 38):
        tail = batches(images, kind, start_step=start, **more)
        assert len(tail) == 40 - start
        for late, early in zip(tail, complete[start:], strict=True):
            late, early = (b.images if kind is StreamedSets else b[0] for b in (late, early))
            np.testing.assert_array_equal(late, early)
    assert not np.array_equal(batches(images, seed=2)[0][0], batches(images)[0][0])


def test_ranks_make_equal_numbers_of_steps_on_unequal_shards(images, folder):
    ranks = [batches(images, batch=6, rank=r, world=3, steps=60) for r in range(3)]
    assert [len(rank) for rank in ranks] == [60, 60, 60]
    assert all(batch.shape == (2, 1, 28, 28) for rank in ranks for batch, _ in rank)
    rank_rows = [keys(row for batch, _ in rank[:12] for row in batch) for rank in ranks]
    assert len(set().union(*rank_rows)) == 72  # the first epoch of every rank: no row twice
    sets = batches(images, StreamedSets, batch=6, set_size=4, rank=1, world=3, steps=2)
    assert sets[1].episodes.tolist() == [7, 10]
    assert sets[1].images.shape == (2, 4, 1, 28, 28)


def test_the_shuffle_buffer_does_not_keep_blocks_in_memory(tmp_path):
    write_dataset(open_source("glyphs", classes=(40, 3, 3), drawings=40), tmp_path / "d", block=50, shard_rows=200)
    rows = StreamedImages(Dataset.open(tmp_path / "d"), "train", 400).rows(0, 0, 1, 0)
    next(rows)  # memory of the imports is not counted
    tracemalloc.start()
    rows = StreamedImages(Dataset.open(tmp_path / "d"), "train", 400).rows(0, 0, 1, 0)
    count = sum(1 for _ in itertools.islice(rows, 1150))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 1150
    # 400 rows of the buffer with their Python overhead, and the current block; views would keep 1,000 rows or more.
    assert held < 800 * 28 * 28


def test_labels_are_not_read(folder, images, monkeypatch):
    monkeypatch.setattr("metagmvae.pipelines.shards.dataset.read_index", lambda *_: pytest.fail("the index was read"))
    assert len(batches(images, steps=2)) == 2


def test_the_error_names_a_damaged_shard(tmp_path):
    write_dataset(open_source("glyphs", classes=(4, 3, 3), drawings=15), tmp_path / "d", block=8, shard_rows=20)
    shard = tmp_path / "d" / "train" / "shard-000001.tar"
    complete = shard.read_bytes()
    images = StreamedImages(Dataset.open(tmp_path / "d"), "train", 16)
    shard.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(DataError, match=r"shard-000001\.tar: shard has \d+ bytes instead of"):
        batches(images)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: shard is missing"):
        batches(images)


def test_more_ranks_than_shards(images):
    with pytest.raises(DataError, match="6 shards for 7 workers"):
        batches(images, batch=7, world=7)


def test_shards_without_images_are_left_out(images):
    """A rank that got only these would search for an image forever."""
    empty = [{"name": f"shard-{number:06d}.tar", "rows": 0} for number in range(6, 12)]
    split = images.dataset.split("train")
    manifest = images.dataset.manifest | {"splits": {"train": split | {"shards": [*split["shards"], *empty]}}}
    padded = StreamedImages(Dataset(images.dataset.root, manifest), "train", 16)
    for rank in range(3):
        ours, theirs = (batches(kind, rank=rank, world=3) for kind in (padded, images))
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    with pytest.raises(DataError, match="6 shards for 7 workers"):
        batches(padded, batch=7, world=7)


def test_training_with_the_stream_reader(folder, tmp_path, capsys):
    small = {"model.channels": 8, "model.width": 32, "train.steps": 4, "train.set_size": 10, "train.samples": 4}
    off = {"validation.every": 0, "tracking.enabled": "false", "run.figures": "false", "train.checkpoint_every": 2}
    settings = small | off | {"data.uri": folder, "data.reader": "stream", "pretrain.steps": 2, "pretrain.batch": 6}

    def train(out, *more: str) -> dict:
        options = [f"--set={key}={value}" for key, value in (settings | {"run.out": tmp_path / out}).items()]
        assert main(["train", "omniglot-5way", *options, "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)["last"]

    assert train("run")["global_step"] == 6
    arguments = ["train", "omniglot-cpu", f"--set=data.uri={folder}", "--set=data.reader=stream"]
    assert main(arguments) == 2
    assert "set data.reader to mmap" in capsys.readouterr().err
