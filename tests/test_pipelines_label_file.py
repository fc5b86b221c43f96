"""Tables of labels: their columns, the files that rows name, and what is refused; datasets that are made with them."""

import json

import numpy as np
import pytest
from PIL import Image

from metagmvae.infra.cli import main
from metagmvae.pipelines.label_file import read_labels
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.sources.source import open_source

NAMES = ["a/1.png", "a/2.png", "b/1.png", "b/3.v2.png"]


def table(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "file,label\na/1.png,x\n2.png,y\n3.v2,x\n",
        "\ufeffImage ID;Class\r\n./a/1.png;x\r\n2;y\r\n3.v2.png; x \r\n\r\n",
        'idx\tlabel\tfile_name\n0\tx\ta/1.png\n1\ty\t"a/2.png"\n2\tx\tb\\3.v2.png\n',
        "filename,label,class_id\na/1.png,x,7\na/2.png,y,8\nb/3.v2.png,x,7\n",
        "path,dx\na/1.png,x\na/1.png,x\na/2,y\nb/3.v2.png,x\n",
    ],
)
def test_files_are_named_by_path_name_or_stem(tmp_path, text):
    text = text.replace("\na/2,y", "\n2,y")
    expected = {"a/1.png": ("x", "", ""), "a/2.png": ("y", "", ""), "b/3.v2.png": ("x", "", "")}
    assert read_labels(table(tmp_path, text), NAMES) == expected


def test_json_lines_are_read_as_the_csv_file_with_the_same_rows(tmp_path):
    """`metadata.jsonl` of Hugging Face: numbers, missing values, keys in another order."""
    path = tmp_path / "metadata.jsonl"
    lines = [
        '{"file_name": "a/1.png", "label": 3, "patient": "p", "score": 0.5}',
        "",
        '{"label": "y", "file_name": "2.png", "patient": 7, "box": [1, 2]}',
    ]
    path.write_text("\n".join(lines))
    assert read_labels(path, NAMES) == {"a/1.png": ("3", "", ""), "a/2.png": ("y", "", "")}
    assert {row.group for row in read_labels(path, NAMES, "Patient").values()} == {"p", "7"}
    for text, reason in (
        ('{"file_name": "a/1.png", "label": "x"}\n[1]', "line 2 is no JSON object; write {"),
        ('{"file_name": "a/1.png", "label"', "line 1: not valid JSON"),
        ('{"file_name": "a/1.png"}', "no column of file_name can be label"),
        ('{"file_name": "a/1.png", "label": "x"}\n{"file_name": "2.png"}', r"row 2 \(2.png\) has no class"),
        ('{"file_name": "a/1.png", "label": "x"}\n{"file_name": "2.png", "label": null}', "has no class; complete"),
        ("\n", "has no lines; write objects with the keys file and label"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=reason) as caught:
            read_labels(path, NAMES)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_a_path_comes_before_shorter_names(tmp_path):
    """`1.png` is a path and also the name of another file; `a` is a name and the stem of a third one."""
    names = ["1.png", "a/1.png", "b/a", "c/a.png"]
    found = read_labels(table(tmp_path, "file,label\n1.png,x\na/1.png,y\na,z\nc/a.png,x\n"), names)
    assert {name: row.label for name, row in found.items()} == dict(zip(names, "xyzx", strict=True))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no rows below a heading"),
        ("file,label\n", "has no rows below a heading"),
        ("a/1.png,x\na/2.png,y\n", "no column of a/1.png, x can be file; name it file in the heading"),
        ("file,melanoma,nevus\na/1.png,1,0\n", "no column of file, melanoma, nevus can be label"),
        ("image,path,label\nx,a/1.png,1\n", "several columns of image, path, label can be file"),
        ("file,label\n1.png,x\n", "row 2: 1.png is a/1.png and b/1.png; give paths in the folder"),
        ("file,label\na/1.png,\n", r"row 2 \(a/1.png\) has no class"),
        ("file,label\na/1.png,x\na/1.png,y\n", "row 3 gives a/1.png another class"),
        ("file,label\na/1.png,x,y\n", "row 2 has 3 columns, but the heading has 2"),
        ("file,label\na/1.png,x\nc.png,y\nd.png,y\n", r"2 of 3 rows name no image of the folder \(c.png, d.png\)"),
        ('file,label\na/1.png,"x\n', "is no CSV file in UTF-8"),
    ],
)
def test_wrong_tables_are_one_line(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read_labels(table(tmp_path, text), NAMES)
    assert str(caught.value).startswith(f"{tmp_path}/labels.csv: ")
    assert "\n" not in str(caught.value)


def test_accents_of_file_systems_and_tables(tmp_path):
    """macOS writes ö as o and a mark, spreadsheets as one letter."""
    names = ["Ro\u0308ntgen 1.png", "R\u00f6ntgen 2.png"]
    found = read_labels(table(tmp_path, "file,label\nR\u00f6ntgen 1,x\nRo\u0308ntgen 2.png,y\n"), names)
    assert {name: row.label for name, row in found.items()} == dict(zip(names, "xy", strict=True))


def test_the_column_of_groups(tmp_path):
    path = table(tmp_path, "file;Patient_ID;label\na/1.png;p;x\na/2.png;q;y\n")
    assert read_labels(path, NAMES, "patient id") == {"a/1.png": ("x", "", "p"), "a/2.png": ("y", "", "q")}
    with pytest.raises(DataError, match="no column is named case among file, Patient_ID, label"):
        read_labels(path, NAMES, "case")
    with pytest.raises(DataError, match=r"row 2 \(a/1.png\) has no patient; complete or remove it"):
        read_labels(table(tmp_path, "file,patient,label\na/1.png,,x\n"), NAMES, "patient")
    with pytest.raises(DataError, match="another class or patient than a row before"):
        read_labels(table(tmp_path, "file,patient,label\na/1.png,p,x\na/1.png,q,x\n"), NAMES, "patient")


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(DataError, match="is no CSV file in UTF-8"):
        read_labels(table(tmp_path, "file,label\nä,x\n", "latin-1"), NAMES)
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "none.csv", NAMES)


def pictures(root, count):
    """Images whose grey value is their number."""
    root.mkdir()
    for number in range(count):
        Image.new("L", (8, 8), number).save(root / f"{number}.png")
    return root


def test_a_dataset_has_the_classes_and_splits_of_the_table(tmp_path, capsys):
    folder = pictures(tmp_path / "in", 9)
    rows = [f"{n},{'abcd'[n % 4]},{('train', 'Train', 'val', 'test')[n % 4]}" for n in range(8)]
    labels = table(tmp_path, "\n".join(["id,label,split", *rows]))
    words = ["--source", str(folder), "--labels", str(labels), "--size", "8", "--out", str(tmp_path / "out"), "--json"]
    assert main(["prepare", "folder", *words, "--dry-run"]) == 0
    dry_run = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert main(["prepare", "folder", *words]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert all(dry_run[key] == answer[key] for key in ("files", "left_out", "division", "samples"))
    assert answer["classes"] == {"train": 2, "validation": 1, "test": 1}
    assert answer["left_out"] == [{"reason": "not in labels.csv", "files": 1, "names": "8.png"}]
    dataset = Dataset.open(tmp_path / "out")
    found = {}
    for split in dataset.splits:
        names = dataset.class_names(split)
        images = dataset.images(split)[list(range(len(dataset.labels(split))))]
        for image, label in zip(images, dataset.labels(split), strict=True):
            assert np.ptp(image) == 0
            found[int(image[0, 0, 0])] = (split, names[label])
    splits = ("train", "train", "validation", "test")
    assert found == {n: (splits[n % 4], "abcd"[n % 4]) for n in range(8)}


def test_classes_of_the_table_are_divided_and_checked_like_folders(tmp_path):
    folder = str(pictures(tmp_path / "in", 8))
    rows = [f"{n}.png,{'abcd'[n % 4]}" for n in range(8)]
    labels = str(table(tmp_path, "\n".join(["file,label", *rows])))
    source = open_source("folder", folder, size=8, labels=labels, fractions=(0.5, 0.25, 0.25))
    assert {split: len({r.class_name for r in records}) for split, records in source.splits.items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    fingerprint = open_source("folder", folder, size=8, labels=labels).fingerprint
    assert fingerprint != open_source("folder", folder, size=8).fingerprint
    table(tmp_path, "\n".join(["file,label", *rows[::-1]]))
    assert open_source("folder", folder, size=8, labels=labels).fingerprint == fingerprint
    table(tmp_path, "\n".join(["file,label", *rows[:-1], "7.png,a"]))
    assert open_source("folder", folder, size=8, labels=labels).fingerprint != fingerprint
    for rows, reason in (
        (["0.png,cat", "1.png,Cat", "2.png,dog"], "labels.csv: train/Cat and train/cat are classes with"),
        (["split", "0.png,a,train", "1.png,a,test", "2.png,b,test", "3.png,c,train"], "with the same name"),
        (["split", "0.png,a,train", "1.png,b,fold3"], "split 'fold3'; write train, validation or test in every row"),
        (["split", "0.png,a,train", "1.png,b,"], "split ''; write train"),
    ):
        heading = "file,label" + (",split" if rows[0] == "split" else "")
        table(tmp_path, "\n".join([heading, *[row for row in rows if row != "split"]]))
        with pytest.raises(DataError, match=reason):
            open_source("folder", folder, size=8, labels=labels)
    with pytest.raises(DataError, match="--labels gives classes and --unlabelled takes none"):
        open_source("folder", folder, size=8, labels=labels, classes=False)


def test_a_folder_with_the_table_of_hugging_face_says_that_it_was_not_read(tmp_path):
    for number in range(4):
        Image.fromarray(np.full((8, 8), 60 * number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(f"{n}.png,{'ab'[n % 2]}\n" for n in range(4)))
    plain = open_source("folder", str(tmp_path), size=8)
    assert plain.files["labels"] == "metadata.csv may hold the classes: --labels PATH reads it"
    labelled = open_source("folder", str(tmp_path), size=8, labels=str(tmp_path / "metadata.csv"))
    assert "labels" not in labelled.files
    assert labelled.report["classes"] == {"train": 2}
