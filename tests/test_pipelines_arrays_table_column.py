"""Columns of Parquet and Arrow files are mapped, not held in memory; temporary files end with their reader."""

import gc
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metagmvae.pipelines.arrays import table_column
from metagmvae.pipelines.arrays.table_column import TableColumn, read_column, read_schema
from metagmvae.pipelines.records import DataError, WorkError

RNG = np.random.default_rng(0)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
VALUES = [{"bytes": RNG.bytes(int(RNG.integers(1, 300))), "path": f"{row}.png"} for row in range(150)]
VALUES[7] = {"bytes": None, "path": "x"}
VALUES[8] = None


@pytest.fixture(autouse=True)
def _temporary(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def table(rows):
    return pa.table({"image": pa.array(VALUES[rows], STRUCT), "label": list(range(150))[rows]})


def write_stream(rows, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=11)


def write_file(rows, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=11)


WRITERS = {
    "parquet": lambda rows, path: pq.write_table(rows, path, row_group_size=13),
    "stream": write_stream,
    "file": write_file,
}


def files_of(folder, kind):
    suffix = ".parquet" if kind == "parquet" else ".arrow"
    paths = [folder / f"{part}{suffix}" for part in range(2)]
    for rows, path in zip((table(slice(0, 60)), table(slice(60, 150))), paths, strict=True):
        WRITERS[kind](rows, path)
    return tuple((str(path), path.stat().st_mtime_ns) for path in paths)


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_are_those_of_the_files_in_any_order(tmp_path, kind):
    files = files_of(tmp_path, kind)
    column = TableColumn.open(files, "image")
    assert len(column) == 150
    assert [column[int(row)] for row in RNG.permutation(150)] != [column[row] for row in range(150)]
    assert [column[row] for row in range(150)] == VALUES
    again = pickle.loads(pickle.dumps(column))
    assert [again[row] for row in (149, 0, 7, 60)] == [VALUES[row] for row in (149, 0, 7, 60)]
    assert read_column(files, "label") == list(range(150))
    assert read_schema(files[0][0]).names == ["image", "label"]


def test_the_temporary_file_ends_with_the_column_and_another_machine_makes_its_own(tmp_path):
    files = files_of(tmp_path, "parquet")
    column = TableColumn.open(files, "image")
    assert column[3] == VALUES[3]
    sent = pickle.dumps(column)
    (folder,) = (tmp_path / "temporary").iterdir()
    del column
    gc.collect()
    assert not folder.exists()
    table_column._mapped.cache_clear()
    elsewhere = pickle.loads(sent)
    assert [elsewhere[row] for row in range(150)] == VALUES
    assert not list((tmp_path / "temporary").iterdir())
    assert not TableColumn.open(files_of(tmp_path, "stream"), "image").unpacked
    assert not list((tmp_path / "temporary").iterdir())


def peak_bytes(path, work):
    """Most bytes that Arrow held at once while a process did a piece of work on a file."""
    lines = [
        "import sys, pyarrow as pa, pyarrow.parquet as pq",
        "from pathlib import Path",
        "from metagmvae.pipelines.arrays.table_column import TableColumn",
        "from metagmvae.pipelines.arrays.vector_files import read_vector_file",
        f"path = {str(path)!r}",
        f"kept = {work}",
        "print(pa.default_memory_pool().max_memory())",
    ]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.slow
def test_memory_holds_a_row_group_at_most(tmp_path):
    """40 row groups of 1 MB."""
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("image", pa.binary())]), compression="none") as writer:
        for _ in range(40):
            writer.write_table(pa.table({"image": pa.array([RNG.bytes(10_000) for _ in range(100)], pa.binary())}))
    assert peak_bytes(path, "TableColumn.open(((path, 0),), 'image')") < 8e6
    assert peak_bytes(path, "pq.read_table(path)") > 40e6  # the measure sees what is held


@pytest.mark.slow
def test_vectors_in_row_groups_are_not_held_either(tmp_path):
    """40 row groups of 256 kB."""
    path = tmp_path / "v.parquet"
    values = pa.FixedSizeListArray.from_arrays(pa.array(RNG.normal(size=40_000 * 64).astype(np.float32)), 64)
    pq.write_table(pa.table({"vectors": values}), path, row_group_size=1000, compression="none", use_dictionary=False)
    assert peak_bytes(path, "read_vector_file(Path(path))") < 6e6


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    files = files_of(tmp_path, "parquet")

    class Full:
        def write_batch(self, batch):
            raise OSError(28, os.strerror(28))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(table_column.pa.ipc, "new_stream", lambda sink, schema: Full())
    with pytest.raises(WorkError, match=r"cannot be unpacked into .* \(No space left on device\); set TMPDIR"):
        TableColumn.open(files, "image")
    assert not list((tmp_path / "temporary").iterdir())


def test_a_file_that_is_damaged_in_the_middle_is_named_and_leaves_nothing(tmp_path):
    files = files_of(tmp_path, "parquet")
    path = Path(files[1][0])
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"1\.parquet: no intact Parquet file"):
        TableColumn.open(files, "image")
    assert not list((tmp_path / "temporary").iterdir())
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 damaged")
    with pytest.raises(DataError, match=r"a\.arrow: no intact Arrow file"):
        TableColumn.open(((str(tmp_path / "a.arrow"), 0),), "image")
