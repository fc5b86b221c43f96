"""Vectors that stay together: `prepare vectors --groups NAME` and `prepare_vectors(groups=…)` divide patients."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folder_contents import contents

import metagmvae
from metagmvae.infra.cli import main
from metagmvae.pipelines.arrays.vectors import open_vector_files, open_vectors
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.sources.splits import SPLITS, SplitRequest, divide_groups

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype(np.float32)
PATIENTS = [f"p{row}" for row in RNG.integers(0, 12, 60)]
Y = [str(c) for c in RNG.choice(["a", "b", "rare"], 60, p=[0.6, 0.3, 0.1])]
SPLIT = [("train", "val", "test")[int(p[1:]) % 3] for p in PATIENTS]


@pytest.fixture
def forms(tmp_path):
    """Source and options of the same vectors, classes and patients in every form."""
    rows = zip(PATIENTS, Y, SPLIT, strict=True)
    (tmp_path / "with.csv").write_text("\n".join(["Patient ID,label,split", *(",".join(row) for row in rows)]))
    rows = zip(PATIENTS, Y, strict=True)
    (tmp_path / "labels.csv").write_text("\n".join(["Patient ID,label", *(",".join(row) for row in rows)]))
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", np.array(Y))
    np.savez(tmp_path / "all.npz", vectors=X, labels=Y, patient_id=PATIENTS)
    np.savez(tmp_path / "unlabelled.npz", vectors=X, patient_id=PATIENTS)
    columns = {"vectors": pa.array(X.tolist(), pa.list_(pa.float32())), "label": Y, "patient-id": PATIENTS}
    (tmp_path / "parts").mkdir()
    for part, rows in enumerate((slice(0, 25), slice(25, 60))):
        table = pa.table({name: column[rows] for name, column in columns.items()})
        pq.write_table(table, tmp_path / "parts" / f"{part}.parquet")
    return {
        "csv": (tmp_path / "x.npy", {"labels": str(tmp_path / "labels.csv")}),
        "npz": (tmp_path / "all.npz", {}),
        "npy labels": (tmp_path / "unlabelled.npz", {"labels": str(tmp_path / "y.npy")}),
        "parquet": (tmp_path / "parts", {}),
    }


@pytest.mark.parametrize("fractions", [None, (0.5, 0.25, 0.25)])
def test_every_form_divides_as_for_images_and_gives_the_same_bytes(forms, tmp_path, fractions):
    expected, said = divide_groups("", PATIENTS, Y, SplitRequest(fractions), 3)
    options = {"seed": 3} | ({"fractions": fractions} if fractions else {})
    data = metagmvae.prepare_vectors(X, Y, groups=PATIENTS, out=tmp_path / "out", **options)
    dataset = data.open()
    for split in SPLITS:
        found = sorted(int(row["key"]) for row in dataset.index(split).to_pylist())
        assert found == [row for row in range(60) if expected[row] == split]
    assert set(data.classes) == set(SPLITS)
    for name, (source, given) in forms.items():
        opened = open_vector_files(str(source), groups="patient id", **given, **options)
        assert opened.files["division"].startswith(f"{said}; the splits share classes"), name
        assert opened.fingerprint == open_vectors(X, Y, groups=PATIENTS, **options).fingerprint, name


def test_the_command_writes_no_patient_into_two_splits(forms, tmp_path, capsys):
    words = ["prepare", "vectors", "--source", str(tmp_path / "all.npz"), "--groups", "patient_id", "--json", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "unused" not in answer
    split_of = Counter()
    for split in SPLITS:
        rows = [int(row["key"]) for row in Dataset.open(tmp_path / "out").index(split).to_pylist()]
        assert len(rows) == answer["samples"][split] > 0
        split_of.update({PATIENTS[row] for row in rows})
    assert set(split_of.values()) == {1}
    metagmvae.prepare_vectors(X, Y, groups=np.array(PATIENTS), out=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_splits_that_are_given_are_kept(tmp_path, forms):
    source = open_vector_files(str(tmp_path / "x.npy"), labels=str(tmp_path / "with.csv"), groups="patient id")
    assert source.files["division"] == (
        "as the vectors say; the splits share classes; episodes leave out classes of one group: rare (test)"
    )
    again = open_vectors(X, Y, splits=SPLIT, groups=PATIENTS)
    assert again.fingerprint == source.fingerprint
    assert {split: len(records) for split, records in source.splits.items()} == {
        split: SPLIT.count(name) for split, name in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    with pytest.raises(DataError, match="group p7 is in train and test; give it one split"):
        open_vectors(X[:3], ["a"] * 3, splits=["train", "train", "test"], groups=["p6", "p7", "p7"])


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("x.npy", {}, "x.npy: holds no groups; give them as the column case of a CSV file with --labels"),
        ("all.npz", {}, "all.npz: no array case for the groups; it has vectors, labels, patient_id"),
        ("parts", {}, "0.parquet: no column case for the groups; it has vectors, label, patient-id"),
        ("x.npy", {"labels": "labels.csv"}, "labels.csv: no column is named case among Patient ID, label"),
        ("all.npz", {"groups": "patient_id", "classes": False}, "--groups patient_id divides classes and --unlabelled"),
        ("all.npz", {"groups": "patient_id", "test_classes": 2}, "groups divide the images, not the classes"),
        ("all.npz", {"groups": "patient_id", "join_splits": True}, "groups need classes, and no joined splits"),
        ("unlabelled.npz", {"groups": "patient_id"}, "unlabelled.npz: groups need classes"),
        ("x.npy", {"labels": "with.csv", "groups": "patient_id", "fractions": (0.5, 0.2, 0.3)}, "already has splits"),
    ],
)
def test_wrong_requests_are_one_line(tmp_path, forms, source, options, reason):
    if "labels" in options:
        options = options | {"labels": str(tmp_path / options["labels"])}
    with pytest.raises(DataError, match=reason) as caught:
        open_vector_files(str(tmp_path / source), **{"groups": "case"} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        (PATIENTS[1:], "59 groups for 60 vectors; give one for each"),
        ([None, *PATIENTS[1:]], "groups are object; give whole numbers or words"),
        (["", *PATIENTS[1:]], "group 0 is empty; give every vector one, or no groups"),
        (["p", "q"] * 30, "has 2 groups, which leave none for"),
    ],
)
def test_wrong_groups_from_python_are_one_line(groups, reason):
    with pytest.raises(DataError, match=reason):
        open_vectors(X, Y, groups=groups)


def test_a_row_without_a_group_is_named(tmp_path):
    np.save(tmp_path / "x.npy", X[:3])
    (tmp_path / "t.csv").write_text("label,patient\na,p\nb,\na,q\n")
    with pytest.raises(DataError, match=r"t.csv: row 3 has no patient; complete or remove it"):
        open_vector_files(str(tmp_path / "x.npy"), labels=str(tmp_path / "t.csv"), groups="patient")
