"""Feature vectors of a user as a dataset: file formats, classes and splits, stored bytes, and what is refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folder_contents import contents

import metagmvae
from metagmvae.infra.cli import main
from metagmvae.pipelines.arrays import file_rows, numpy_arrays, vector_files
from metagmvae.pipelines.arrays.file_rows import FileRows
from metagmvae.pipelines.arrays.vector_files import read_vector_file
from metagmvae.pipelines.arrays.vectors import open_vector_files, open_vectors
from metagmvae.pipelines.records import DataError, WorkError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.verify import verify_dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.vectors import vector_digest

X = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
Y = np.arange(48) % 6
HELD_OUT = {"validation_classes": 2, "test_classes": 2, "seed": 3}


def table(path: Path, vectors: pa.Array, **columns: Any) -> Path:
    pq.write_table(pa.table({"vectors": vectors, **columns}), path, row_group_size=7)
    return path


def lists(kind: pa.DataType, values: np.ndarray = X) -> pa.Array:
    return pa.array(values.tolist(), kind)


def save(path: Path, write: Callable[..., Any], *arrays: Any, **named: Any) -> Path:
    with open(path, "wb") as file:
        write(file, *arrays, **named)
    return path


def forms(folder: Path) -> list[Path]:
    """The same vectors and classes in every format."""
    order = {"vectors": np.asfortranarray(X), "labels": Y.reshape(-1, 1)}
    words = np.array([str(label) for label in Y])
    (folder / "parts").mkdir()
    for part, rows in enumerate((slice(0, 10), slice(10, 48))):
        save(folder / "parts" / f"{part}.npz", np.savez, x=X[rows], y=Y[rows])
    return [
        save(folder / "stored.npz", np.savez, vectors=X, labels=Y),
        save(folder / "compressed.npz", np.savez_compressed, Embeddings=X.astype(">f4"), Targets=words),
        save(folder / "columns.npz", np.savez, **order),
        save(folder / "columns-compressed.npz", np.savez_compressed, **order),
        table(folder / "list.parquet", lists(pa.list_(pa.float32())), label=Y),
        table(folder / "large.parquet", lists(pa.large_list(pa.float32())), label=pa.array(words).dictionary_encode()),
        table(folder / "fixed.parquet", lists(pa.list_(pa.float32(), 5)), label=Y.astype(np.int8)),
        table(
            folder / "tensor.parquet",
            pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [5]), lists(pa.list_(pa.float32(), 5))),
            label=words,
        ),
        folder / "parts",
    ]


def test_all_formats_give_the_same_dataset_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_arrays, "BLOCK_BYTES", 64)  # several blocks
    monkeypatch.setattr(vector_files, "PARQUET_ROWS", 5)
    expected = open_vectors(X, Y, **HELD_OUT)
    write_dataset(expected, tmp_path / "expected", shard_rows=10, block=4)
    for number, path in enumerate(forms(tmp_path)):
        source = pickle.loads(pickle.dumps(open_vector_files(str(path), **HELD_OUT)))  # as it is sent to workers
        assert source.fingerprint == expected.fingerprint, path
        if "compressed" not in path.name and path.suffix != ".parquet":  # their temporary files end with the source
            write_dataset(source, tmp_path / str(number), shard_rows=10, block=4)
            assert contents(tmp_path / str(number)) == contents(tmp_path / "expected")
        again = open_vector_files(str(path), **HELD_OUT)
        write_dataset(again, tmp_path / f"here{number}", shard_rows=10, block=4)
        assert contents(tmp_path / f"here{number}") == contents(tmp_path / "expected")
    assert verify_dataset(tmp_path / "expected") == []


def test_the_dataset_holds_each_vector_with_its_class(tmp_path: Path) -> None:
    data = metagmvae.prepare_vectors(X, [f"class {label}" for label in Y], out=tmp_path / "out", **HELD_OUT)
    assert (data.feature_size, data.image_shape, data.classes) == (5, None, {"train": 2, "validation": 2, "test": 2})
    dataset = data.open()
    assert (dataset.kind, dataset.content, dataset.row_shape, dataset.dtype) == ("features", "vectors", (5,), "float32")
    assert dataset.manifest["encoder"] == {"sha256": vector_digest(5), "encoder": "vectors"}
    seen = []
    for split in dataset.splits:
        index, rows = dataset.index(split).to_pylist(), dataset.rows(split)
        for position, row in enumerate(index):
            number = int(row["key"])
            np.testing.assert_array_equal(rows[np.array([position])][0], X[number])
            assert row["class_name"] == f"class {Y[number]}"
            seen.append(number)
    assert sorted(seen) == list(range(48))
    again = metagmvae.prepare_vectors(X, [f"class {label}" for label in Y], out=tmp_path / "out", **HELD_OUT)
    assert again == data
    with pytest.raises(DataError, match="contains another dataset"):
        metagmvae.prepare_vectors(X[::-1].copy(), Y, out=tmp_path / "out", **HELD_OUT)
    assert metagmvae.prepare_vectors(X, out=tmp_path / "plain").classes == {"train": 0}
    half = metagmvae.prepare_vectors(X.astype(np.float16), out=tmp_path / "half").open()
    assert half.dtype == "float16"
    stored = half.rows("train")[np.arange(48)]
    np.testing.assert_array_equal(stored[np.argsort(half.index("train")["key"].to_numpy())], X.astype(np.float16))


def test_the_fingerprint_changes_with_values_classes_splits_names_and_format() -> None:
    other = X.copy()
    other[47, 4] = np.nextafter(other[47, 4], np.float32(9))
    splits = ["train"] * 24 + ["test"] * 24
    two = np.repeat([0, 1], 24)
    variants = [
        open_vectors(X, Y, **HELD_OUT),
        open_vectors(other, Y, **HELD_OUT),
        open_vectors(X, Y[::-1], **HELD_OUT),
        open_vectors(X, Y, **HELD_OUT | {"seed": 4}),
        open_vectors(X, Y, names=[f"n{row}" for row in range(48)], **HELD_OUT),
        open_vectors(X, Y, dtype="float16", **HELD_OUT),
        open_vectors(X),
        open_vectors(X, two, splits=splits),
    ]
    assert len({source.fingerprint for source in variants}) == len(variants)


def test_splits_come_from_an_array_from_file_names_and_from_a_file_of_labels(tmp_path: Path) -> None:
    names = np.array(["train", "val", "test"])[Y // 2]
    own = open_vectors(X, Y, splits=names)
    assert {split: {r.class_name for r in records} for split, records in own.splits.items()} == {
        "train": {"0", "1"},
        "validation": {"2", "3"},
        "test": {"4", "5"},
    }
    (tmp_path / "files").mkdir()
    for split, part in (
        ("train", "train-00000-of-00002"),
        ("train", "train_1"),
        ("val", "validation"),
        ("test", "test"),
    ):
        rows = np.flatnonzero(names == split)
        rows = rows[:3] if part.startswith("train-") else rows[3:] if part.startswith("train_") else rows
        save(tmp_path / "files" / f"{part}.npz", np.savez, vectors=X[rows], labels=Y[rows])
    (tmp_path / "files" / "notes.txt").write_text("")
    by_file = open_vector_files(str(tmp_path / "files"))
    assert {s: len(r) for s, r in by_file.splits.items()} == {"train": 16, "validation": 16, "test": 16}
    assert by_file.files["left_out"] == [{"reason": "is no file of vectors", "files": 1, "names": "notes.txt"}]
    assert open_vector_files(str(tmp_path / "files"), classes=False).splits.keys() == {"train"}

    vectors = save(tmp_path / "x.npy", np.save, X)
    rows = "".join(f"class {label};{split}\n" for label, split in zip(Y, names, strict=True))
    (tmp_path / "labels.csv").write_text("label;split\n" + rows)
    given = open_vector_files(str(vectors), labels=str(tmp_path / "labels.csv"))
    assert {r.class_name for r in given.splits["test"]} == {"class 4", "class 5"}
    plain = open_vector_files(str(vectors), labels=str(save(tmp_path / "y.npy", np.save, Y)), **HELD_OUT)
    assert plain.fingerprint == open_vectors(X, Y, **HELD_OUT).fingerprint

    same = open_vectors(X, Y, splits=["train", "test"] * 24, join_splits=True, **HELD_OUT)
    assert same.fingerprint == open_vectors(X, Y, **HELD_OUT).fingerprint


def test_equal_vectors_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twins = X.copy()
    twins[[20, 30]] = twins[4]
    path = save(tmp_path / "twins.npz", np.savez, vectors=twins, labels=Y, notes=np.arange(3))
    assert main(["prepare", "vectors", "--source", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    note = "2 of 48 vectors equal an earlier one (row 20 equals row 4); 2 have another class than it"
    assert (answer["duplicates"], answer["unused"], answer["samples"]) == (note, ["notes"], {"train": 48})
    assert "duplicates" not in open_vectors(X, Y).files


def test_files_are_mapped_and_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the file was replaced; the temporary file of the others is deleted with the source."""
    path = save(tmp_path / "x.npy", np.save, X)
    rows = read_vector_file(path).rows
    assert isinstance(rows, FileRows)
    np.testing.assert_array_equal(rows[np.array([3, 1])], X[[3, 1]])
    path.unlink()
    save(path, np.save, X + 1)
    np.testing.assert_array_equal(read_vector_file(path).rows[np.array([3])], X[[3]] + 1)
    unpacked = read_vector_file(table(tmp_path / "x.parquet", lists(pa.list_(pa.float32()))))
    assert isinstance(unpacked.rows, FileRows)
    place = Path(unpacked.rows.path)
    assert place.stat().st_size == X.nbytes
    np.testing.assert_array_equal(unpacked.rows[np.arange(48)], X)
    del unpacked
    assert not place.exists()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_rows, "open", full, raising=False)
    with pytest.raises(WorkError, match=r"x\.parquet: cannot be unpacked into .* set TMPDIR"):
        read_vector_file(tmp_path / "x.parquet")


BROKEN = X.copy()
BROKEN[7, 2] = np.nan
LARGE = X.copy()
LARGE[7, 2] = 1e30
RAGGED = pa.array([[1.0, 2.0], [1.0, 2.0], [1.0]], pa.list_(pa.float32()))
EMPTY_VALUE = pa.array([[1.0, 2.0], [1.0, None]], pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vectors": X[0]}, r"vectors have shape \(5,\), but \(number, values\) is needed"),
        ({"vectors": X[None]}, r"vectors have shape \(1, 48, 5\)"),
        ({"vectors": X[:0]}, r"vectors have shape \(0, 5\)"),
        ({"vectors": [[1.0], [1.0, 2.0]]}, "vectors are no array of numbers"),
        ({"vectors": np.array([["a", "b"]])}, "vectors are <U1, not numbers; save them as float32"),
        ({"vectors": X.astype(float)}, "vectors are float64; give --dtype float32"),
        ({"vectors": (10 * X).astype(int)}, "vectors are int64; give --dtype float32"),
        ({"vectors": X, "dtype": "float64"}, "dtype is 'float64'; choose float16 or float32"),
        ({"vectors": BROKEN}, "vectors: value 2 of row 7 is nan; every value must be finite"),
        ({"vectors": LARGE, "dtype": "float16"}, r"value 2 of row 7 is 1e\+30, too large for float16"),
        ({"vectors": np.ones((5, 3), np.float32)}, "all 5 vectors are equal"),
        ({"vectors": X, "labels": Y[:9]}, "9 labels for 48 vectors"),
        ({"vectors": X, "labels": Y / 2}, "labels are float64; give whole numbers or words"),
        ({"vectors": X, "labels": [""] * 48}, "label 0 is empty"),
        ({"vectors": X, "labels": Y, "splits": ["train"] * 47}, "47 split for 48 vectors"),
        ({"vectors": X, "labels": Y, "splits": ["train"] * 47 + ["b"]}, "split 'b'; write train, validation or test"),
        ({"vectors": X, "labels": Y, "splits": ["train", "test"] * 24 + []}, None),
        ({"vectors": X, "labels": Y // 3, "splits": ["train", "test"] * 24}, "--join-splits joins the splits"),
        ({"vectors": X, "labels": Y, "join_splits": True}, "has no splits to join"),
        ({"vectors": X, "validation_classes": 2}, "no classes"),
        ({"vectors": X, "names": ["a"] * 48}, "the name 'a' occurs twice"),
        ({"vectors": X, "labels": Y, "seed": -1}, "seed is -1"),
    ],
)
def test_one_line_says_what_is_wrong(arguments: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert set(open_vectors(**arguments).splits) == {"train", "test"}
        return
    with pytest.raises(DataError, match=message) as error:
        open_vectors(**arguments)
    assert "\n" not in str(error.value)


def damaged(folder: Path, kind: str) -> Path:
    """A file that cannot be used."""
    path = folder / f"{kind}.npz"
    if kind == "objects":
        return save(path, np.savez, vectors=X, labels=np.array([None] * 48))
    if kind == "pickled vectors":
        return save(path, np.savez, vectors=np.array([[1, "a"]], dtype=object))
    if kind == "two names":
        return save(path, np.savez, x=X, features=X)
    if kind == "no names":
        return save(path, np.savez, a=X, b=Y)
    if kind == "one array":
        return save(path, np.savez, X)
    if kind == "cut":
        save(path, np.savez, vectors=X)
        path.write_bytes(path.read_bytes()[:-200])
    if kind == "flipped":
        save(path, np.savez, vectors=X)
        content = bytearray(path.read_bytes())
        content[400] ^= 1
        path.write_bytes(content)
    if kind == "short":
        path = save(folder / "short.npy", np.save, X)
        path.write_bytes(path.read_bytes()[:-1])
    if kind == "negative":
        path = save(folder / "negative.npy", np.save, X)
        path.write_bytes(path.read_bytes().replace(b"(48, 5)", b"(-8, 5)"))
    if kind == "rank":
        return save(folder / "rank.npy", np.save, Y)
    if kind == "text":
        path = folder / "x.parquet"
        path.write_text("no table")
    if kind == "wide":
        pq.write_table(pa.table({"f0": X[:, 0], "f1": X[:, 1]}), path := folder / "wide.parquet")
    if kind == "ragged":
        return table(folder / "ragged.parquet", RAGGED)
    if kind == "empty value":
        return table(folder / "empty.parquet", EMPTY_VALUE)
    if kind == "no rows":
        return table(folder / "none.parquet", lists(pa.list_(pa.float32()), X[:0]))
    if kind == "empty label":
        return table(folder / "label.parquet", lists(pa.list_(pa.float32())), label=pa.array([None, *Y[1:].tolist()]))
    if kind == "float label":
        return table(folder / "label.parquet", lists(pa.list_(pa.float32())), label=Y / 2)
    if kind == "suffix":
        path = folder / "x.csv"
        path.write_text("1,2\n")
    if kind in ("widths", "formats", "some labels", "some splits"):
        folder = folder / "parts"
        folder.mkdir()
        second = {"widths": X[:, :3], "formats": X.astype(np.float16)}.get(kind, X)
        save(folder / ("train.npz" if kind == "some splits" else "a.npz"), np.savez, vectors=X)
        save(folder / "b.npz", np.savez, vectors=second, **({"labels": Y} if kind == "some labels" else {}))
        return folder
    if kind == "empty folder":
        (path := folder / "parts").mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("objects", "labels: holds Python objects"),
        ("pickled vectors", "holds Python objects"),
        ("two names", "several arrays can be the vectors; it has x, features"),
        ("no names", "no array can be the vectors; it has a, b"),
        ("cut", r"no intact \.npz file"),
        ("flipped", r"no intact \.npz file .*CRC"),
        ("short", r"short\.npy: has .* bytes, but .* are needed"),
        ("negative", r"no intact \.npy file"),
        ("rank", r"vectors have shape \(48,\).*--labels"),
        ("text", r"no intact \.parquet file"),
        ("wide", "no column holds lists of numbers, one vector a row; it has f0"),
        ("ragged", "row 2 has 1 values, and those before have 2"),
        ("empty value", "row 1 has an empty value"),
        ("no rows", "holds no vectors"),
        ("empty label", "column label is empty in row 0"),
        ("float label", "column label is double; give whole numbers or words"),
        ("suffix", r"is none of \.npy, \.npz, \.parquet"),
        ("widths", r"b\.npz: vectors have 3 values, and those of .*a\.npz 5"),
        ("formats", r"vectors are float32 .* and float16 .*; give --dtype float32"),
        ("some labels", r"a\.npz: has no labels, and other files have"),
        ("some splits", r"b\.npz: other files are named as splits"),
        ("empty folder", r"holds no \.npy, \.npz, \.parquet files"),
        ("missing", "no such file"),
    ],
)
def test_a_damaged_file_is_refused_and_nothing_is_written(
    kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(tmp_path, kind)
    assert main(["prepare", "vectors", "--source", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    with pytest.raises(DataError, match=message):
        open_vector_files(str(path))
    assert not (tmp_path / "out").exists()


def test_wrong_labels_of_a_file_of_their_own_are_refused(tmp_path: Path) -> None:
    vectors = str(save(tmp_path / "x.npy", np.save, X))
    short = save(tmp_path / "short.npy", np.save, Y[:5])
    objects = save(tmp_path / "objects.npy", np.save, np.array([None] * 48))
    (tmp_path / "five.csv").write_text("label\n" + "a\n" * 5)
    (tmp_path / "hole.csv").write_text("label,x\n" + "a,1\n" * 47 + " ,1\n")
    (tmp_path / "none.csv").write_text("colour\n" + "a\n" * 48)
    for file, message in (
        (short, r"shape \(5,\) for 48 vectors"),
        (objects, "cannot be read .*Python objects are never read"),
        (tmp_path / "five.csv", "5 rows for 48 vectors"),
        (tmp_path / "hole.csv", "row 49 has no class"),
        (tmp_path / "none.csv", "no column of colour can be label"),
    ):
        with pytest.raises(DataError, match=message):
            open_vector_files(vectors, labels=str(file))
    twice = save(tmp_path / "twice.npz", np.savez, vectors=X, labels=Y)
    with pytest.raises(DataError, match="holds classes too; omit --labels"):
        open_vector_files(str(twice), labels=str(short))
    with pytest.raises(DataError, match="omit one of them"):
        open_vector_files(vectors, labels=str(short), classes=False)


def test_a_single_array_needs_no_name(tmp_path: Path) -> None:
    assert open_vector_files(str(damaged(tmp_path, "one array"))).fingerprint == open_vectors(X).fingerprint
    named = save(tmp_path / "named.npz", np.savez, whatever=X)
    assert open_vector_files(str(named)).fingerprint == open_vectors(X).fingerprint
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    with pytest.raises(DataError, match="no array can be the vectors; it has none"):
        open_vector_files(str(tmp_path / "empty.npz"))


def test_a_manifest_of_vectors_states_their_shape(tmp_path: Path) -> None:
    write_dataset(open_vectors(X), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(manifest | {"image_shape": [3, 1, 1]}))
    with pytest.raises(DataError, match=r"image_shape is \[3, 1, 1\], but the vectors have 5 values"):
        Dataset.open(tmp_path / "out")
