"""`metagmvae fit --labels FILE [--groups COLUMN]`: classes from a table; patients instead of classes are held out."""

import shlex
import shutil

import pyarrow.parquet as pq
import pytest
from called_commands import answer_of, refusal_of
from small_fit import commands, few_steps, fit, write_glyphs

import metagmvae
from metagmvae.infra.classification.example_files import write_example
from metagmvae.infra.fitting.make_plan import check_held_out, make_plan
from metagmvae.pipelines.archives.entries import Entry
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.sources.folder_layout import FolderImage

pytestmark = pytest.mark.timeout(900)
CLASSES, DRAWINGS, PATIENTS = 9, 12, 10


@pytest.fixture(scope="module", autouse=True)
def _short():
    """As few steps as possible."""
    with few_steps():
        yield


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """108 drawings of 9 classes and 10 patients in one folder, the last 12 of them without a row in the tables."""
    root = tmp_path_factory.mktemp("labels")
    write_glyphs(root / "images", CLASSES, DRAWINGS, flat=True)
    split_of = ("train", "val", "test")
    rows = [f"{n:03d}.png,k{n // DRAWINGS},p{n % PATIENTS},{split_of[n % PATIENTS % 3]}" for n in range(96)]
    (root / "labels.csv").write_text("\n".join(["image,label,patient", *(row.rpartition(",")[0] for row in rows)]))
    (root / "split.csv").write_text("\n".join(["image,label,patient,split", *rows]))
    return root


def keys(dataset, split):
    return [(row["key"], row["class_name"]) for row in pq.read_table(f"{dataset}/{split}/index.parquet").to_pylist()]


def patient(key):
    return int(key[:3]) % PATIENTS


def test_the_classes_of_a_table_are_held_out(flat, tmp_path):
    out = tmp_path / "model"
    code, answer, lines = fit(flat / "images", "--labels", flat / "labels.csv", "--out", out)
    assert code == 0, lines
    assert lines[0].startswith("96 images, grey, 8 classes in labels.csv")
    assert "2 classes are held out for validation and 2 for test: their images are not trained on" in lines
    assert "12 of 108 files were left out" in "\n".join(lines)
    assert answer["classes"] == {"train": 4, "validation": 2, "test": 2}
    assert {row["on"] for row in answer["accuracy"]} == {"test classes"}
    assert answer["example"].endswith("of 8 files right")
    held = {split: keys(out / "data", split) for split in ("train", "validation", "test")}
    assert all(name == f"k{int(key[:3]) // DRAWINGS}" for part in held.values() for key, name in part)
    names = [{name for _, name in part} for part in held.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == 8
    # The example is of test classes, under their names in the table.
    assert {path.name for path in (out / "example" / "labelled").iterdir()} == {name for _, name in held["test"]}
    # The printed command does the same.
    words = shlex.split(next(line for line in lines if line.startswith("$ metagmvae prepare")))[2:]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    answer_of(*words)
    for name in ("dataset.json", "test/index.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (out / "data" / name).read_bytes()
    with pytest.raises(DataError, match="labels, labels_sha256, groups"):
        metagmvae.fit(flat / "images", labels=flat / "split.csv", groups="patient", out=out, budget="2s")


def test_patients_are_held_out_and_the_report_says_what_that_means(flat, tmp_path):
    out = tmp_path / "model"
    code, answer, lines = fit(flat / "images", "--labels", flat / "labels.csv", "--groups", "Patient", "--out", out)
    assert code == 0, lines
    assert commands(lines)[0] == "prepare"
    assert "--groups Patient" in next(line for line in lines if line.startswith("$ metagmvae prepare"))
    found = [{patient(key) for key, _ in keys(out / "data", split)} for split in ("train", "validation", "test")]
    assert sorted(p for part in found for p in part) == list(range(PATIENTS))  # no patient in two splits
    assert answer["classes"] == {"train": 8, "validation": 8, "test": 8}
    assert answer["accuracy"][0]["on"] == "test images of another Patient"
    assert answer["accuracy"][0]["way"] == 5
    assert {row["groups"] for row in answer["accuracy"]} == {"apart"}
    meaning = (
        f"images of one Patient stay in one split ({len(found[0])} train, {len(found[1])} validation, {len(found[2])} "
        "test of 10 groups, drawn with seed 0; the splits share classes): the accuracy is that on images of another "
        "Patient than those of the training, and of the same classes; no Patient has a labelled image and a query of "
        "one episode"
    )
    assert answer["groups"].startswith(meaning)
    report = (out / "report.html").read_text()
    assert meaning in report
    assert "episodes of test images of another Patient" in report
    assert "held out for validation" not in report
    dataset = Dataset.open(out / "data")
    assert dataset.manifest["options"]["groups"] == "Patient"


def test_queries_of_the_example_are_of_other_patients_than_the_labelled_file(flat, tmp_path):
    """Class `one` has images of a single patient, whose other images are its queries."""
    entries = [Entry(f"{number:03d}.png", 0, 0) for number in range(60)]
    group_of = [f"p{number % 3}" if number >= 20 else "p0" for number in range(60)]
    name_of = ["one" if number < 20 else "ab"[number % 2] for number in range(60)]
    images = [
        FolderImage(file, file.name, "test", "", name, group)
        for file, name, group in zip(entries, name_of, group_of, strict=True)
    ]
    number_of = {(flat / "images" / entry.name).read_bytes(): number for number, entry in enumerate(entries)}
    for seed in range(5):
        class_of_file = write_example(str(flat / "images"), tmp_path / str(seed), images, seed)
        assert len(class_of_file) == 12
        for name in ("one", "a", "b"):
            (labelled,) = (tmp_path / str(seed) / "labelled" / name).iterdir()
            first = group_of[number_of[labelled.read_bytes()]]
            queries = [file for file, found in class_of_file.items() if found == name]
            numbers = [number_of[(tmp_path / str(seed) / "queries" / file).read_bytes()] for file in queries]
            assert {name_of[number] for number in numbers} == {name}
            assert all((group_of[number] == first) == (name == "one") for number in numbers)


def test_queries_of_the_example_are_of_patients_without_a_labelled_file(flat, tmp_path):
    """All patients have both classes."""
    entries = [Entry(f"{number:03d}.png", 0, 0) for number in range(48)]
    images = [FolderImage(e, e.name, "test", "", "ab"[n % 2], f"p{n // 2 % 4}") for n, e in enumerate(entries)]
    patient_of = {(flat / "images" / image.key).read_bytes(): image.group for image in images}
    for seed in range(5):
        write_example(str(flat / "images"), tmp_path / str(seed), images, seed)
        labelled, queries = (
            {patient_of[path.read_bytes()] for path in (tmp_path / str(seed) / part).rglob("*.png")}
            for part in ("labelled", "queries")
        )
        assert not labelled & queries


def plan(flat, **options):
    return make_plan(flat / "images", None, 60.0, 0, **{"unlabelled": False} | options)


def test_a_plan_with_splits_of_the_table(flat):
    found = plan(flat, labels=flat / "split.csv", groups="patient")
    assert found.group_division == "as the table says; the splits share classes"
    assert (found.classes, found.validation_classes, found.test_classes) == (8, 8, 8)
    assert found.label_words == ["--labels", str(flat / "split.csv"), "--groups", "patient"]


def test_a_table_that_is_not_given_is_named(flat, tmp_path):
    pictures = tmp_path / "images"
    shutil.copytree(flat / "images", pictures)
    shutil.copy(flat / "labels.csv", pictures / "metadata.csv")
    said = "metadata.csv may hold the classes: --labels PATH reads it"
    assert make_plan(pictures, None, 60.0, 0, unlabelled=False).found[2:] == [said]
    table = pictures / "metadata.csv"
    assert len(make_plan(pictures, None, 60.0, 0, unlabelled=False, labels=table).found) == 2


def test_one_class_is_evaluated_on_views(flat, tmp_path):
    table = tmp_path / "one.csv"
    table.write_text("file,label,patient\n" + "\n".join(f"{n:03d},k,p{n % 5}" for n in range(63)))
    said = plan(flat, labels=table, groups="patient").held_out
    assert "those for the test have one class, so the model is evaluated on episodes of augmented views" in said


def test_held_out_classes_of_one_image_are_refused_before_the_training():
    check_held_out("t.csv", {("train", "a"): 1, ("test", "a"): 2, ("test", "b"): 2, ("validation", "a"): 1}, "")
    with pytest.raises(DataError, match=r"t.csv: class b has 1 image in test, but an episode needs 2 of each class"):
        check_held_out("t.csv", {("train", "a"): 9, ("test", "a"): 2, ("test", "b"): 1}, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--groups", "patient"], "--groups patient: is a column of --labels"),
        (["--labels", "labels.csv", "--unlabelled"], "--labels gives classes and --unlabelled takes none"),
        (["--labels", "none.csv"], "none.csv: cannot be read (No such file or directory); check the path"),
        (["--labels", "labels.csv", "--groups", "case"], "labels.csv: no column is named case among image, label, pat"),
        (["--labels", "split.csv"], "split.csv: test/k0 and train/k0 are classes with the same name"),
        (["--labels", "few.csv"], "has 2 images with a class, but at least 32"),
        (["--labels", "two.csv", "--groups", "patient"], "two.csv: has 2 groups, which leave none for"),
        (["--labels", "rare.csv", "--groups", "patient"], "or leave this class out, or try another --seed"),
        (
            ["--labels", "six.csv", "--groups", "patient"],
            "six.csv: 0 of 2 classes in validation have images of two values of patient, but an episode",
        ),
    ],
)
def test_wrong_tables_are_one_line_and_leave_nothing(flat, tmp_path, monkeypatch, words, message):
    for name in ("labels.csv", "split.csv"):
        (tmp_path / name).write_bytes((flat / name).read_bytes())
    (tmp_path / "few.csv").write_text("file,label\n000,a\n001,b\n")
    two = "file,label,patient\n" + "\n".join(f"{n:03d},k{n % 3},p{n % 2}" for n in range(63))
    (tmp_path / "two.csv").write_text(two)
    (tmp_path / "six.csv").write_text(
        "file,label,patient\n" + "\n".join(f"{n:03d},{n // 6 % 2},p{n % 6}" for n in range(63))
    )
    # A class with one image in each of three patients.
    rare = [f"{n:03d},{'rare' if n < 3 else 'ab'[n % 2]},p{n % 9}" for n in range(63)]
    (tmp_path / "rare.csv").write_text("\n".join(["file,label,patient", *rare]))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert message in refusal_of("fit", flat / "images", "--budget", "2s", "--out", "model", *words)
    assert sorted(tmp_path.rglob("*")) == before
