"""Writer, index and readers of a dataset on disk."""

import gc
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from metagmvae.pipelines.records import DataError, ImageRecord
from metagmvae.pipelines.shards import shard_writer, writer
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset

SHAPE = (1, 4, 4)


@dataclass
class FakeSource:
    name: str = "fake"
    image_shape: tuple[int, int, int] = SHAPE
    fingerprint: str = "f" * 64
    dtype: str = "uint8"
    permuted: bool = False
    attachments: dict[str, Path] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"train": 50, "validation": 12, "test": 0})

    @property
    def row_shape(self):
        return self.image_shape

    @property
    def about(self):
        return {"kind": "images", "image_shape": list(self.image_shape)}

    @property
    def splits(self):
        return {
            split: [ImageRecord(f"{split}/{i}", f"c{i // 5:02d}", lambda: None) for i in range(count)]
            for split, count in self.counts.items()
        }

    def load_block(self, split, rows):
        return np.stack([self.image(split, row) for row in rows])

    def image(self, split, row):
        return np.random.default_rng([len(split), row]).integers(0, 256, SHAPE, dtype=np.uint8)


def write(folder, **options):
    return write_dataset(FakeSource(), folder, block=8, shard_rows=20, **options)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run_in_reverse(function, tasks):
    """Runs the tasks in another order, as several workers do."""
    for task in reversed(tasks):
        yield function(*task)


def test_every_sample_is_stored_once_at_the_offset_in_the_index(tmp_path):
    write(tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    images, table = dataset.images("train"), dataset.index("train").to_pylist()
    assert sorted(row["key"] for row in table) == sorted(f"train/{i}" for i in range(50))
    for number, row in enumerate(table):
        expected = FakeSource().image("train", int(row["key"].split("/")[1]))
        raw = (tmp_path / "d" / "train" / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        assert row["row"] == number
        assert np.array_equal(images[number], expected)
        assert raw == expected.tobytes()
        assert dataset.class_names("train")[row["class_id"]] == row["class_name"] == f"c{int(row['key'][6:]) // 5:02d}"
    assert [row["key"] for row in table] != [f"train/{i}" for i in range(50)]
    assert len(dataset.images("test")) == 0


def test_bytes_do_not_depend_on_task_order_or_interruption(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two", map_tasks=run_in_reverse)

    def interrupt(function, tasks):
        yield function(*tasks[0])
        (tmp_path / "three" / "train" / ".shard-000001.tar.x.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "three", map_tasks=interrupt)
    with pytest.raises(DataError, match="not finished"):
        Dataset.open(tmp_path / "three")
    done = []
    write(tmp_path / "three", on_progress=lambda n, total: done.append((n, total)))
    assert done[0] == (2, 4)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_temporary_files_of_a_killed_worker_are_removed(tmp_path):
    """Another worker repeats its task under another temporary name."""

    def lose_worker(function, tasks):
        for task in tasks:
            path = Path(task[3])
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / f".{path.name}.dead.tmp").write_bytes(b"half")
            yield function(*task)

    write(tmp_path / "out", map_tasks=lose_worker)
    write(tmp_path / "uninterrupted")
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


LIMITED_FILE_SIZE = """
import resource, sys
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_dataset(open_source("glyphs", classes=(4, 2, 2), drawings=20), sys.argv[1])
except DataError as error:
    print(error)
"""


def test_full_disk_gives_one_error_line(tmp_path):
    """A file size limit of the operating system leaves unwritten buffers in the tar file, as a full disk does."""
    command = [sys.executable, "-c", LIMITED_FILE_SIZE, str(tmp_path / "data")]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert "cannot be written (File too large); free some space, and run the command again" in process.stdout
    assert process.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_leaves_no_files_and_keeps_foreign_files(tmp_path, monkeypatch):
    def fail(self, split, rows):
        raise DataError("not finite")

    monkeypatch.setattr(FakeSource, "load_block", fail)
    with pytest.raises(DataError, match="not finite"):
        write(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []

    def leave_temporary_file(function, tasks):
        (tmp_path / "d" / "train").mkdir()
        (tmp_path / "d" / "train" / ".shard-000000.tar.x.tmp").write_bytes(b"half")
        return [function(*task) for task in tasks]

    with pytest.raises(DataError, match="not finite"):
        write(tmp_path / "d", map_tasks=leave_temporary_file)
    assert list(tmp_path.iterdir()) == []

    def add_foreign_file(function, tasks):
        (tmp_path / "d" / "notes.txt").write_text("mine")
        return [function(*task) for task in tasks]

    with pytest.raises(DataError, match="not finite"):
        write(tmp_path / "d", map_tasks=add_foreign_file)
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["notes.txt"]


def test_writing_continues_after_a_full_disk(tmp_path, monkeypatch):
    original = writer.atomic_file

    def fail_on_second_shard(path):
        if Path(path).name == "shard-000001.tar":
            raise DataError(f"{path}: cannot be written (No space left on device); the partial file was deleted")
        return original(path)

    monkeypatch.setattr(shard_writer, "atomic_file", fail_on_second_shard)
    with pytest.raises(DataError, match="No space left on device"):
        write(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not (tmp_path / "out" / "dataset.json").exists()
    monkeypatch.undo()
    write(tmp_path / "out")
    write(tmp_path / "uninterrupted")
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def test_a_finished_dataset_is_not_written_again_and_another_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "d")
    monkeypatch.setattr(writer, "write_shard", None)
    assert write(tmp_path / "d")["name"] == "fake"
    with pytest.raises(DataError, match="contains another dataset"):
        write(tmp_path / "d", seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("dear reader")
    with pytest.raises(DataError, match="not empty"):
        write(tmp_path / "other")
    with pytest.raises(DataError, match="has no images"):
        write_dataset(FakeSource(counts={"train": 0}), tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_webdataset_reads_the_shards_and_finds_no_labels(tmp_path):
    write(tmp_path / "d")
    paths = [str(p) for p in sorted((tmp_path / "d" / "train").glob("*.tar"))]
    with warnings.catch_warnings():
        # webdataset does not close its files.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(wds.WebDataset(paths, shardshuffle=False).decode())
        gc.collect()
    assert sum(len(sample["x.npy"]) for sample in samples) == 50
    assert {key for sample in samples for key in sample if not key.startswith("__")} == {"json", "x.npy"}
    assert set(samples[0]["json"]) == {"split", "block", "rows"}


def test_memory_and_mmap_readers_agree_and_need_no_index(tmp_path):
    write(tmp_path / "d")
    (tmp_path / "d" / "train" / "index.parquet").unlink()
    dataset = Dataset.open(tmp_path / "d")
    memory, mapped = dataset.images("train", "memory"), dataset.images("train", "mmap")
    rows = np.array([3, 49, 3, 0, 21])
    assert np.array_equal(mapped[rows], memory[rows])
    assert np.array_equal(mapped[5:30], memory[5:30])
    assert np.array_equal(mapped[7], memory[7])
    assert mapped.shape == memory.shape
    assert not isinstance(dataset.images("train", "auto", memory_limit_mb=0), np.ndarray)


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_the_error_names_a_damaged_shard(tmp_path, damage):
    write(tmp_path / "d")
    shard = tmp_path / "d" / "train" / "shard-000001.tar"
    raw = bytearray(shard.read_bytes())
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(raw[:-100])
    if damage == "altered":
        raw[2000] ^= 1
        shard.write_bytes(raw)
    with pytest.raises(DataError, match=r"shard-000001.tar: shard"):
        Dataset.open(tmp_path / "d").images("train")


def test_missing_dataset_split_and_index(tmp_path):
    with pytest.raises(DataError, match=r"no dataset.json there"):
        Dataset.open(tmp_path)
    write(tmp_path / "d")
    with pytest.raises(DataError, match="no split 'exam'; choose one of train, validation, test"):
        Dataset.open(tmp_path / "d").images("exam")
    shutil.copy(tmp_path / "d" / "train" / "shard-000000.tar", tmp_path / "d" / "train" / "index.parquet")
    with pytest.raises(DataError, match=r"index.parquet: index was altered after writing"):
        Dataset.open(tmp_path / "d").labels("train")
