"""Images that stay together: `prepare folder --labels FILE --groups COLUMN` divides patients, not classes."""

import io
import json
import zlib
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.sources.source import open_source
from metagmvae.pipelines.sources.splits import SPLITS, SplitRequest, divide_groups


def study(count, patients, seed):
    """Patients and classes of some images; class c is rare."""
    rng = np.random.default_rng(seed)
    rows = [f"p{row}" for row in rng.integers(0, patients, count)]
    return rows, [str(c) for c in rng.choice(["a", "b", "c"], count, p=[0.9, 0.07, 0.03])]


def literal(group_of, class_of, fractions, seed):
    """Iterative stratification with plain loops: rarest class first, to the split that lacks most of it."""
    size = {c: class_of.count(c) for c in set(class_of)}
    names = sorted(set(group_of))
    order = [names[row] for row in keyed_rng("groups", seed).permutation(len(names))]
    rows_of = {g: [row for row, group in enumerate(group_of) if group == g] for g in names}
    lacking = {(s, c): f * size[c] for s, f in zip(SPLITS, fractions, strict=True) for c in size}
    split_of = {}
    for label in sorted(size, key=lambda c: (size[c], c)):
        for group in order:
            if group in split_of or all(class_of[row] != label for row in rows_of[group]):
                continue
            best = None
            for split, fraction in zip(SPLITS, fractions, strict=True):
                need = (lacking[split, label], sum(lacking[split, c] for c in size))
                if fraction and (best is None or need > best[0]):
                    best = (need, split)
            split_of[group] = best[1]
            for row in rows_of[group]:
                lacking[best[1], class_of[row]] -= 1
    return [split_of[group] for group in group_of]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fractions", [(0.6, 0.2, 0.2), (0.5, 0.0, 0.5), (0.8, 0.1, 0.1)])
def test_groups_are_divided_as_the_literal_transcription_does(seed, fractions):
    patients, classes = study(300, 60, seed)
    found, _ = divide_groups("t", patients, classes, SplitRequest(fractions), seed)
    assert found == literal(patients, classes, fractions, seed)
    for patient in set(patients):
        assert len({split for split, p in zip(found, patients, strict=True) if p == patient}) == 1
    largest = max(Counter(patients).values())
    for split, fraction in zip(SPLITS, fractions, strict=True):
        assert abs(found.count(split) - 300 * fraction) <= largest


def test_every_split_has_the_rarest_class():
    """Nine images of nine patients among 2,000: drawn at random, a split misses them often."""
    patients = [f"p{row % 400}" for row in range(2000)] + [f"p{row}" for row in range(0, 360, 40)]
    classes = ["normal"] * 2000 + ["tumour"] * 9
    for seed in range(5):
        found, sentence = divide_groups("t", patients, classes, SplitRequest(), seed)
        assert sorted(Counter(found[2000:]).values()) == [2, 2, 5]
        assert sentence.endswith(f" of 400 groups, drawn with seed {seed}")


def test_too_few_groups_and_numbers_of_classes_are_refused():
    with pytest.raises(DataError, match="t: has 2 groups, which leave none for"):
        divide_groups("t", ["p", "q"], ["a", "a"], SplitRequest(), 0)
    with pytest.raises(DataError, match="groups divide the images, not the classes; give fractions"):
        divide_groups("t", ["p", "q"], ["a", "a"], SplitRequest(test_classes=2), 0)


@pytest.fixture
def folder(tmp_path):
    """60 images of 20 patients and two classes, and their table."""
    root = tmp_path / "images"
    root.mkdir()
    lines = ["file;patient;label;split"]
    for number in range(60):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(root / f"{number:02d}.png")
        split = ("train", "val", "test")[number % 20 % 3]
        lines.append(f"{number:02d};{number % 20};{'ab'[number % 2]};{split}")
    (tmp_path / "with.csv").write_text("\n".join(lines))
    (tmp_path / "labels.csv").write_text("\n".join(line.rpartition(";")[0] for line in lines))
    return root


def patients_of(dataset, split):
    index = pq.read_table(f"{dataset.uri}/{split}/index.parquet").to_pylist()
    return {int(row["key"][:2]) % 20 for row in index}


@pytest.mark.parametrize("table", ["labels.csv", "with.csv"])
def test_a_dataset_whose_splits_share_classes_and_no_patient(folder, capsys, table):
    out, labels = folder.parent / "data", folder.parent / table
    words = ["prepare", "folder", "--source", str(folder), "--labels", str(labels), "--groups", "Patient", "--out"]
    assert main([*words, str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["classes"] == {"train": 2, "validation": 2, "test": 2}
    given = table == "with.csv"
    said = "as the table says" if given else "12 train, 4 validation, 4 test of 20 groups, drawn with seed 0"
    assert answer["division"] == f"{said}; the splits share classes"
    dataset = Dataset.open(out)
    found = [patients_of(dataset, split) for split in SPLITS]
    assert sorted(patient for part in found for patient in part) == list(range(20))
    if given:
        assert found == [{p for p in range(20) if p % 3 == rest} for rest in range(3)]
    assert json.loads((out / "dataset.json").read_text())["options"]["groups"] == "Patient"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": "patient"}, "--groups patient: is a column of --labels; give --labels FILE too"),
        ({"groups": "patient", "labels": "with.csv", "join_splits": True}, "--join-splits keeps the splits of folders"),
        (
            {"groups": "patient", "labels": "with.csv", "fractions": (0.5, 0.2, 0.3)},
            "already has splits, as the table says",
        ),
        (
            {"groups": "label", "labels": "with.csv"},
            "with.csv: group a is in train and ",
        ),
        ({"groups": "patient", "labels": "with.csv", "test_classes": 2}, "already has splits, as the table says"),
        ({"groups": "patient", "labels": "labels.csv", "test_classes": 2}, "groups divide the images"),
    ],
)
def test_wrong_options_are_one_line(folder, options, reason):
    if "labels" in options:
        options = options | {"labels": str(folder.parent / options["labels"])}
    with pytest.raises(DataError, match=reason):
        open_source("folder", str(folder), size=8, **options)


def test_equal_files_are_counted_with_those_of_other_classes_and_splits(folder):
    """The pictures of patients 0, 1 and 2 again, as others; the first keeps its class."""
    table = folder.parent / "with.csv"
    lines = table.read_text()
    for number, row in enumerate(("0;100;a;train", "1;101;a;val", "2;102;b;train")):
        (folder / f"copy {number}.png").write_bytes((folder / f"{number:02d}.png").read_bytes())
        lines += f"\ncopy {number}{row[1:]}"
    table.write_text(lines)
    said = open_source("folder", str(folder), size=8, labels=str(table), groups="patient").files["duplicates"]
    first = "files that equal an earlier one: 3 (copy 0.png equals 00.png)"
    assert said == f"{first}; of another class than it: 2; of another split than it: 1"
    assert (
        "duplicates" not in open_source("folder", str(folder), size=8, labels=str(folder.parent / "labels.csv")).files
    )


def test_different_files_of_equal_size_and_crc_are_not_equal(tmp_path):
    """The chunks of a PNG file end with their CRC-32, so that of the file has few values: two are soon found."""
    rng, seen = np.random.default_rng(0), {}
    for _ in range(10_000):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(file, "PNG")
        content = file.getvalue()
        other = seen.setdefault((zlib.crc32(content), len(content)), content)
        if other != content:
            break
    for name, data in (("a", content), ("b", other), ("c", content)):
        (tmp_path / f"{name}.png").write_bytes(data)
    said = open_source("folder", str(tmp_path), size=8, classes=False).files["duplicates"]
    assert said == "files that equal an earlier one: 1 (c.png equals a.png)"


def test_classes_whose_names_differ_by_case_are_refused(folder):
    table = folder.parent / "labels.csv"
    table.write_text("file,patient,label\n00,p,Tumour\n01,q,tumour\n02,r,b\n")
    with pytest.raises(DataError, match="are classes with the same name"):
        open_source("folder", str(folder), labels=str(table), groups="patient")
