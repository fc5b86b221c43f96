"""The groups of images and vectors in the dataset: numbers in the index, checked by `verify`, kept by features."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folder_contents import contents
from PIL import Image

import metagmvae
from metagmvae.infra.cli import main
from metagmvae.pipelines.arrays.image_arrays import open_images
from metagmvae.pipelines.arrays.vectors import open_vectors
from metagmvae.pipelines.files import sha256_file
from metagmvae.pipelines.grouped_labels import GroupedLabels
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.feature_source import open_features
from metagmvae.pipelines.shards.index import SCHEMA
from metagmvae.pipelines.shards.manifest import INDEX
from metagmvae.pipelines.shards.verify import verify_dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

NUMBER, SIDE = 60, 48
PATIENTS = [f"Doe{row % 20:02d}" for row in range(NUMBER)]
CLASSES = ["ab"[row % 2] for row in range(NUMBER)]
IMAGES = np.random.default_rng(0).integers(0, 256, (NUMBER, SIDE, SIDE, 3), dtype=np.uint8)
COLOUR = {"channels": 3, "size": SIDE}


def patient_of(key):
    """The patient of an image or vector by its key, which has its number."""
    return PATIENTS[int("".join(filter(str.isdigit, key)))]


def check_groups(dataset):
    """The numbers stand for the patients, from 0 in the order of the rows, and no name is stored."""
    for split in dataset.splits:
        labels = dataset.episode_labels(split)
        assert isinstance(labels, GroupedLabels)
        assert np.array_equal(labels.classes, dataset.labels(split))
        patients = [patient_of(key) for key in dataset.index(split)["key"].to_pylist()]
        assert labels.groups.tolist() == [list(dict.fromkeys(patients)).index(p) for p in patients]
        assert dataset.split(split)["groups"] == len(set(patients))
        assert labels.class_names == dataset.class_names(split)
    assert not any(b"Doe" in path.read_bytes() for path in dataset.root.rglob("*") if path.is_file())
    assert verify_dataset(dataset.root) == []


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Source and options of the same images in every form."""
    root = tmp_path_factory.mktemp("sources")
    (root / "images").mkdir()
    files = []
    for number in range(NUMBER):
        Image.fromarray(IMAGES[number]).save(root / "images" / f"{number:02d}.png")
        files.append((root / "images" / f"{number:02d}.png").read_bytes())
    rows = [f"{n:02d},{PATIENTS[n]},{CLASSES[n]}" for n in range(NUMBER)]
    (root / "labels.csv").write_text("\n".join(["file,patient,label", *rows]))
    np.savez(root / "images.npz", images=IMAGES, labels=CLASSES, patient=PATIENTS)
    pq.write_table(pa.table({"image": files, "label": CLASSES, "patient": PATIENTS}), root / "images.parquet")
    np.savez(root / "vectors.npz", vectors=IMAGES[:, 0, :, 0].astype(np.float32), labels=CLASSES, patient=PATIENTS)
    colour = [word for key, value in COLOUR.items() for word in (f"--{key}", str(value))]
    return {
        "folder": [str(root / "images"), "--labels", str(root / "labels.csv"), *colour],
        "npz": [str(root / "images.npz"), *colour],
        "parquet": [str(root / "images.parquet"), *colour],
        "vectors": [str(root / "vectors.npz")],
    }


@pytest.mark.parametrize(
    ("form", "store"),
    [(form, store) for form in ("folder", "npz", "parquet") for store in ("decoded", "encoded")]
    + [("vectors", "decoded")],
)
def test_every_source_stores_the_groups_as_numbers(sources, tmp_path, capsys, form, store):
    further = [] if store == "decoded" else ["--store", store]
    words = ["prepare", form, "--source", *sources[form], "--groups", "patient", "--json", *further]
    assert main([*words, "--out", str(tmp_path / "data")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["groups"] == {"train": 12, "validation": 4, "test": 4}
    check_groups(Dataset.open(tmp_path / "data"))


def test_a_source_that_is_sent_to_workers_gives_the_same_bytes(sources, tmp_path):
    options = COLOUR | {"labels": sources["folder"][2], "groups": "patient"}
    source = open_source("folder", sources["folder"][0], **options)
    for name, written in (("a", source), ("b", pickle.loads(pickle.dumps(source)))):
        write_dataset(written, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_python_stores_them_and_names_make_no_difference(tmp_path):
    images = metagmvae.prepare_images(list(IMAGES), CLASSES, groups=PATIENTS, out=tmp_path / "images")
    check_groups(images.open())
    vectors = IMAGES[:, 0, :, 0].astype(np.float32)
    check_groups(metagmvae.prepare_vectors(vectors, CLASSES, groups=PATIENTS, out=tmp_path / "vectors").open())
    split = [("train", "validation", "test")[row % 20 % 3] for row in range(NUMBER)]
    renamed = [name.replace("Doe", "x") for name in PATIENTS]
    other = [name if name != "Doe06" else "Doe00" for name in PATIENTS]  # both are in the same split
    prints = [
        open_vectors(vectors, CLASSES, splits=split, groups=groups).fingerprint for groups in (PATIENTS, renamed, other)
    ]
    assert prints[0] == prints[1] != prints[2]
    plain = [open_images(list(IMAGES), CLASSES, groups=groups).fingerprint for groups in (PATIENTS, renamed)]
    assert plain[0] == plain[1]


def test_features_keep_the_groups(tmp_path):
    images = metagmvae.prepare_images(list(IMAGES), CLASSES, groups=PATIENTS, out=tmp_path / "images").open()

    def mean(pixels):
        return pixels.reshape(len(pixels), -1).mean(axis=1, keepdims=True, dtype=np.float32)

    write_dataset(open_features(images, mean, feature_size=1, encoder={"sha256": "0" * 64}), tmp_path / "features")
    check_groups(Dataset.open(tmp_path / "features"))


def test_a_dataset_without_groups_has_no_trace_of_them(tmp_path):
    write_dataset(open_source("glyphs", classes=(6, 6, 3), drawings=8), tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    assert "group" not in (tmp_path / "data" / "dataset.json").read_text()
    assert pq.read_schema(tmp_path / "data" / "train" / INDEX).equals(SCHEMA)
    labels = dataset.episode_labels("train")
    assert isinstance(labels, np.ndarray)
    assert np.array_equal(labels, dataset.labels("train"))


def rewrite(root, change):
    """Change the index of the training split, and its sha256 in the manifest."""
    path = root / "train" / INDEX
    pq.write_table(change(pq.read_table(path)), path)
    manifest = json.loads((root / "dataset.json").read_text())
    manifest["splits"]["train"]["index_sha256"] = sha256_file(path)
    (root / "dataset.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.drop_columns("group_id"), "not an index of this program"),
        (
            lambda t: t.set_column(8, t.schema.field("group_id"), pa.array(np.zeros(len(t), np.int32))),
            "group_id has 1 values, not 0 to 11 as in the manifest",
        ),
    ],
)
def test_verify_and_readers_notice_another_column(tmp_path, change, reason):
    dataset = metagmvae.prepare_images(list(IMAGES), CLASSES, groups=PATIENTS, out=tmp_path / "data").open()
    rewrite(dataset.root, change)
    (problem,) = verify_dataset(dataset.root)
    assert problem.kind == "inconsistent"
    assert reason in problem.detail
    with pytest.raises(DataError, match=reason.split(" (")[0]):
        Dataset.open(dataset.root).episode_labels("train")


def test_groups_of_some_images_only_are_refused(tmp_path):
    source = open_images(list(IMAGES), CLASSES, groups=PATIENTS)
    object.__setattr__(source.splits["test"][0], "group", "")
    with pytest.raises(DataError, match=r"source 'images': \d+ has no group, or others have none"):
        write_dataset(source, tmp_path / "data")


def test_prepare_names_classes_that_episodes_leave_out(tmp_path):
    patients = [f"p{row % 10}" if name == "a" else f"q{row % 6}" for row, name in enumerate(CLASSES)]
    said = open_images(list(IMAGES), CLASSES, groups=patients).files["division"]
    assert said.endswith(
        "; the splits share classes; episodes leave out classes of one group: a (test), a (validation), b (validation)"
    )
