"""Images in Parquet files: `prepare parquet` reads what data sets of Hugging Face hold."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.sources.source import open_source

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = [f"product {k}" for k in range(4)]


def png(number):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), (number, 0, 90), np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(rows, *, kind=STRUCT, names=NAMES, label="label"):
    """Row r is a picture whose red is r, of class r % 4."""
    images = [png(r) if pa.types.is_binary(kind) else {"bytes": png(r), "path": f"{r}.png"} for r in rows]
    columns = {"image": pa.array(images, kind), label: pa.array([r % 4 for r in rows]), "title": ["x"] * len(rows)}
    features = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    return pa.table(columns).replace_schema_metadata(metadata)


def content(source):
    """Red value of each image with its class, of all splits."""
    records = [record for part in source.splits.values() for record in part]
    return sorted((int(record.load()[0, 0, 0]), record.class_name) for record in records)


def test_the_files_of_a_folder_are_joined_and_numbers_have_their_names(tmp_path, capsys):
    (tmp_path / "ds" / "data").mkdir(parents=True)
    (tmp_path / "ds" / ".cache").mkdir()
    pq.write_table(table(range(24)), tmp_path / "ds" / "data" / "train-00000-of-00001.parquet", row_group_size=5)
    pq.write_table(table(range(24, 40)), tmp_path / "ds" / "data" / "test-00000-of-00001.parquet")
    pq.write_table(table(range(40, 44)), tmp_path / "ds" / ".cache" / "x.parquet")
    out = tmp_path / "out"
    words = ["prepare", "parquet", "--source", str(tmp_path / "ds"), "--out", str(out), "--test-classes", "2", "--json"]
    assert main([*words, "--size", "8"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["image_shape"] == [3, 8, 8]
    assert answer["classes"] == {"train": 2, "test": 2}
    dataset = Dataset.open(out)
    found = {}
    for split in ("train", "test"):
        reds, labels = dataset.rows(split)[np.arange(20)][:, 0, 0, 0], dataset.labels(split)
        found |= {int(red): dataset.class_names(split)[k] for red, k in zip(reds, labels, strict=True)}
    assert found == {r: NAMES[r % 4] for r in range(40)}


@pytest.mark.parametrize("kind", [STRUCT, pa.binary()])
def test_columns_of_structs_and_of_contents(tmp_path, kind):
    pq.write_table(table(range(8), kind=kind, names=None), tmp_path / "a.parquet")
    source = open_source("parquet", str(tmp_path / "a.parquet"), size=8)
    assert content(source) == [(r, str(r % 4)) for r in range(8)]
    assert content(pickle.loads(pickle.dumps(source))) == content(source)
    plain = open_source("parquet", str(tmp_path / "a.parquet"), size=8, classes=False)
    assert content(plain) == [(r, "") for r in range(8)]
    assert plain.fingerprint != source.fingerprint


def test_columns_of_other_names(tmp_path):
    path = tmp_path / "a.parquet"
    rows = table(range(8), label="brand")
    pq.write_table(rows.append_column("back", pa.array([{"bytes": png(99), "path": ""}] * 8, STRUCT)), path)
    with pytest.raises(DataError, match=r"columns image, back can be the image .* name it with --option image=COLUMN"):
        open_source("parquet", str(path))
    chosen = open_source("parquet", str(path), size=8, image="image", label="brand")
    assert content(chosen) == [(r, NAMES[r % 4]) for r in range(8)]
    assert content(open_source("parquet", str(path), size=8, image="back")) == [(99, "")] * 8
    with pytest.raises(DataError, match="no column 1 "):
        open_source("parquet", str(path), image="back", label=1)  # as `--option label=1` gives it


def without(rows, column, value):
    place = rows.schema.get_field_index(column)
    values = [*rows[column].to_pylist()[:-1], value]
    return rows.set_column(place, rows.schema.field(place), pa.array(values, rows.schema.field(place).type))


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        (table(range(4)).drop_columns("image"), {}, r"a.parquet: no column image \(it has label: int64"),
        (table(range(4)), {"label": "brand"}, r"no column brand \(it has image: struct"),
        (without(table(range(4)), "label", None), {}, "row 3 has no class; leave such rows out, or use --unlabelled"),
        (without(table(range(4)), "label", -1), {}, "row 3 has class -1, which has no name in the metadata"),
        (without(table(range(4)), "image", {"bytes": None, "path": "a"}), {}, "row 3 has no image file in the column"),
        (without(table(range(4)), "image", None), {}, "row 3 has no image file in the column image"),
        (without(table(range(4)), "image", {"bytes": b"x", "path": "a"}), {}, "image 3: broken image"),
        (table(range(0)), {}, "there are no images"),
    ],
)
def test_wrong_tables_are_one_line(tmp_path, rows, options, reason):
    pq.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=reason) as caught:
        open_source("parquet", str(tmp_path / "a.parquet"), **options)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_wrong_files_are_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged")
    for path, reason in (
        ("a.parquet", "no intact Parquet file"),
        ("none.parquet", "no such file"),
        (".", "no intact Parquet file"),
    ):
        with pytest.raises(DataError, match=reason):
            open_source("parquet", str(tmp_path / path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.parquet or \.arrow files"):
        open_source("parquet", str(tmp_path / "empty"))
    (tmp_path / "a.parquet").unlink()
    pq.write_table(table(range(4)), tmp_path / "a.parquet")
    pq.write_table(table(range(4), kind=pa.binary()), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="the column image differs in type from other files"):
        open_source("parquet", str(tmp_path))
    pq.write_table(table(range(4)).drop_columns("label"), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: has no column label; .*a.parquet has"):
        open_source("parquet", str(tmp_path))


def test_a_folder_of_other_files_names_what_reads_them(tmp_path):
    pq.write_table(table(range(4)), tmp_path / "a.parquet")
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"; \.parquet files: prepare parquet; \.tar files: give one of them$"):
        open_source("folder", str(tmp_path))


def save_to_disk(folder, rows):
    """What `datasets` writes: a stream, its description, and beside it a result of `map`."""
    folder.mkdir(parents=True)
    for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=3)
    (folder / "state.json").write_text("{}")


def test_the_folder_of_save_to_disk_is_read_without_results_of_map(tmp_path):
    save_to_disk(tmp_path / "ds" / "train", table(range(24)))
    save_to_disk(tmp_path / "ds" / "test", table(range(24, 40)))
    source = open_source("parquet", str(tmp_path / "ds"), size=8)
    assert content(source) == [(r, NAMES[r % 4]) for r in range(40)]
    assert content(pickle.loads(pickle.dumps(source))) == content(source)
    assert source.files["files"] == {"seen": 6, "read": 2, "left_out": 4}
    assert {row["reason"]: row["files"] for row in source.files["left_out"]} == {
        "holds results of `datasets`": 2,
        "is no table": 2,
    }
    # The rows are read in the order of the file names: test, train.
    pq.write_table(pa.concat_tables([table(range(24, 40)), table(range(24))]), tmp_path / "all.parquet")
    assert open_source("parquet", str(tmp_path / "all.parquet"), size=8).fingerprint == source.fingerprint
    pq.write_table(table(range(4)), tmp_path / "ds" / "a.parquet")
    with pytest.raises(DataError, match=r"holds \.parquet and \.arrow files; give the folder of one kind"):
        open_source("parquet", str(tmp_path / "ds"))
    with pytest.raises(DataError, match=r"; \.arrow files: prepare parquet; \.parquet files: prepare parquet$"):
        open_source("folder", str(tmp_path / "ds"))


def test_groups_are_a_column(tmp_path):
    rows = table(range(40)).append_column("shop", pa.array([r // 4 for r in range(40)]))
    pq.write_table(rows, tmp_path / "a.parquet")
    source = open_source("parquet", str(tmp_path / "a.parquet"), size=8, groups="shop")
    shops = [{int(record.key) // 4 for record in records} for records in source.splits.values()]
    assert sorted(shop for part in shops for shop in part) == list(range(10))
    assert source.report["classes"] == {"train": 4, "validation": 4, "test": 4}
    with pytest.raises(DataError, match=r"no column brand .*; name it with --groups COLUMN"):
        open_source("parquet", str(tmp_path / "a.parquet"), groups="brand")
    with pytest.raises(DataError, match="the column title is string; give one of contents of image files"):
        open_source("parquet", str(tmp_path / "a.parquet"), image="title")


def test_images_of_which_only_the_path_is_stored_are_refused(tmp_path):
    pq.write_table(without(table(range(4)), "image", {"bytes": None, "path": "x/3.png"}), tmp_path / "a.parquet")
    reason = "row 3 has no image file in the column image, only the path x/3.png; save the files in it, as"
    with pytest.raises(DataError, match=reason):
        open_source("parquet", str(tmp_path / "a.parquet"))
