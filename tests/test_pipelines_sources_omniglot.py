"""Omniglot: layouts, splits and rotations, on a small dataset of the same form and on the real archives."""

import csv
import io
import pickle
import shutil
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources import omniglot
from metagmvae.pipelines.sources.source import open_source

ALPHABETS = {"images_background": {"Armenian": 2, "Greek": 3}, "images_evaluation": {"Avesta": 3}}


def drawing(seed):
    """105 x 105, 1 bit, dark strokes on white, as published."""
    page = np.ones((105, 105), bool)
    row, column = np.random.default_rng(seed).integers(5, 60, 2)
    page[row : row + 40, column : column + 6] = False
    buffer = io.BytesIO()
    Image.fromarray(page).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Eight characters of two drawings as folders, and constants to match."""
    monkeypatch.setattr(omniglot, "CHARACTERS", {"images_background": 5, "images_evaluation": 3})
    monkeypatch.setattr(omniglot, "DRAWINGS", 2)
    monkeypatch.setattr(omniglot, "SIZES", {"train": 5, "validation": 1, "test": 2})
    monkeypatch.setattr(omniglot, "VINYALS_DEVELOPMENT", 6)
    seed = 0
    for archive, alphabets in ALPHABETS.items():
        for alphabet, count in alphabets.items():
            for number in range(1, count + 1):
                place = tmp_path / "data" / archive / alphabet / f"character{number:02d}"
                place.mkdir(parents=True)
                for hand in (1, 2):
                    seed += 1
                    (place / f"{seed:04d}_{hand:02d}.png").write_bytes(drawing(seed))
    return tmp_path / "data"


def zipped(folder, to):
    to.mkdir()
    for archive in ALPHABETS:
        with zipfile.ZipFile(to / f"{archive}.zip", "w") as target:
            for path in sorted((folder / archive).rglob("*.png"), reverse=True):
                target.write(path, path.relative_to(folder))
    return to


def everything(source):
    return {
        split: ([(r.key, r.class_name) for r in records], source.load_block(split, range(len(records))).tobytes())
        for split, records in source.splits.items()
    }


def test_zip_files_and_folders_are_the_same_dataset(folder, tmp_path):
    first = open_source("omniglot", str(folder))
    wrapped = tmp_path / "wrapped"
    zipped(folder, tmp_path / "zips")
    shutil.copytree(tmp_path / "zips", wrapped / "omniglot-py")
    twice = tmp_path / "twice"
    for archive in ALPHABETS:
        shutil.copytree(folder / archive, twice / archive / archive)
    for other in (tmp_path / "zips", wrapped, twice):
        source = open_source("omniglot", str(other))
        assert source.fingerprint == first.fingerprint
        assert everything(source) == everything(first)
    shutil.rmtree(folder / "images_background")
    shutil.copy(tmp_path / "zips" / "images_background.zip", folder)
    assert open_source("omniglot", str(folder)).fingerprint == first.fingerprint


def test_the_fingerprint_depends_on_drawings_and_options(folder):
    options = [{}, {"split": "vinyals"}, {"rotations": 1}, {"size": 14}]
    seen = [open_source("omniglot", str(folder), **option).fingerprint for option in options]
    next(iter(sorted(folder.rglob("*.png")))).write_bytes(drawing(99))
    seen.append(open_source("omniglot", str(folder)).fingerprint)
    assert len(set(seen)) == 5


def test_rotations_are_counter_clockwise_classes_of_the_same_split(folder):
    source = open_source("omniglot", str(folder))
    for split, records in source.splits.items():
        images = source.load_block(split, range(len(records)))
        by_key = {record.key: image for record, image in zip(records, images, strict=True)}
        assert len(by_key) == len(records)
        for record in records:
            name, angle = record.class_name.split("@")
            assert record.key.startswith(name + "/")
            assert record.key.endswith(f"@{angle}")
            upright = by_key[record.key.split("@")[0] + "@000"]
            assert np.array_equal(by_key[record.key], np.rot90(upright, int(angle) // 90, axes=(1, 2)))
    assert len({r.class_name for r in source.splits["train"]}) == 5 * 4
    alone = open_source("omniglot", str(folder), rotations=1)
    assert {r.class_name.split("@")[1] for r in alone.splits["train"]} == {"000"}


def test_strokes_are_bright_on_black_in_the_requested_size(folder):
    source = open_source("omniglot", str(folder), size=14, rotations=1)
    block = source.load_block("train", range(4))
    assert source.image_shape == block.shape[1:] == (1, 14, 14)
    # A stroke is about half a pixel wide at this size, so its brightest pixel is no longer white.
    assert (block.max(axis=(1, 2, 3)) > 127).all()
    assert (block[:, :, 0] == 0).all()
    assert 0.005 < block.mean() / 255 < 0.1


def test_each_drawing_is_decoded_once_for_all_rotations(folder, monkeypatch):
    omniglot._decode_once.cache_clear()
    source = open_source("omniglot", str(folder))
    calls = []
    decode = omniglot.apply_preprocessing
    monkeypatch.setattr(
        omniglot, "apply_preprocessing", lambda data, name, p: calls.append(name) or decode(data, name, p)
    )
    everything(source)
    assert len(calls) == len(set(calls)) == 16
    image = source.splits["train"][0].load()
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0] = 1


def test_splits_share_no_character_and_the_vinyals_split_holds_out_alphabets(folder):
    ours = open_source("omniglot", str(folder), rotations=1)
    names = {split: {r.class_name for r in records} for split, records in ours.splits.items()}
    assert {split: len(part) for split, part in names.items()} == {"train": 5, "validation": 1, "test": 2}
    assert len(set.union(*names.values())) == 8
    theirs = open_source("omniglot", str(folder), rotations=1, split="vinyals")
    alphabets = {split: {r.class_name.split("/")[1] for r in records} for split, records in theirs.splits.items()}
    assert alphabets == {"train": {"Greek", "Avesta"}, "validation": {"Armenian"}, "test": {"Avesta"}}


def assert_refused(root, *words, **options):
    with pytest.raises(DataError) as caught:
        open_source("omniglot", str(root), **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_missing_drawings_characters_and_archives_are_reported(folder, tmp_path):
    lost = folder / "images_background" / "Greek" / "character02"
    next(lost.iterdir()).unlink()
    assert_refused(folder, "images_background has 5 of 5", "images_background/Greek/character02 has 1")
    shutil.rmtree(lost)
    assert_refused(folder, "images_background has 4 of 5", "images_background/Greek/character02 is missing", "download")
    shutil.rmtree(folder / "images_evaluation")
    assert_refused(folder, "neither images_evaluation.zip nor a folder images_evaluation", "--source")
    assert_refused(tmp_path / "nowhere", "nowhere", "--source")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "neither images_background.zip")


def test_truncated_archives_unknown_files_and_broken_drawings_are_reported(folder, tmp_path):
    zips = zipped(folder, tmp_path / "zips")
    data = (zips / "images_evaluation.zip").read_bytes()
    (zips / "images_evaluation.zip").write_bytes(data[: len(data) // 2])
    assert_refused(zips, "images_evaluation.zip: not a complete zip file")
    path = next(iter(sorted((folder / "images_background").rglob("*.png"))))
    path.write_bytes(b"broken")
    source = open_source("omniglot", str(folder))
    with pytest.raises(DataError, match=f"{path.name}: broken image"):
        everything(source)
    (folder / "images_background" / "extra.png").write_bytes(drawing(1))
    assert_refused(folder, "extra.png is not <alphabet>/character<NN>/<drawing>.png")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"split": "lake"}, "no split 'lake'"), ({"rotations": 3}, "rotations is 3"), ({"size": 0}, "size is 0")],
)
def test_invalid_options_are_refused_before_reading(options, words):
    assert_refused("/nowhere", words, **options)


def test_a_source_can_be_pickled(folder):
    source = pickle.loads(pickle.dumps(open_source("omniglot", str(folder))))
    assert source.load_block("test", [0]).shape == (1, 1, 28, 28)


def stand_in(monkeypatch, download):
    module = types.ModuleType("torchvision.datasets")
    module.Omniglot = download
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("corrupted"), zipfile.BadZipFile("no zip")])
def test_a_failed_download_gives_one_error_line(tmp_path, monkeypatch, error):
    def download(root, *, background, download):
        raise error

    stand_in(monkeypatch, download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"^Omniglot could not be downloaded .*images_evaluation.zip with --source$"):
        open_source("omniglot")


def test_downloaded_archives_are_opened_and_nothing_is_printed(folder, tmp_path, monkeypatch, capsys):
    class Omniglot:
        folder = "omniglot-py"

        def __init__(self, root, *, background, download):
            print("Files already downloaded and verified")
            name = "images_background" if background else "images_evaluation"
            shutil.copytree(folder / name, Path(root) / self.folder / name)

    stand_in(monkeypatch, Omniglot)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_source("omniglot").fingerprint == open_source("omniglot", str(folder)).fingerprint
    assert capsys.readouterr().out == ""
    assert (tmp_path / "cache" / "metagmvae" / "omniglot-py").is_dir()


@pytest.mark.real_data
def test_the_vinyals_split_is_the_published_list(data_root):
    source = open_source("omniglot", str(data_root / "omniglot"), split="vinyals")
    with open(data_root / "omniglot" / "vinyals-split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert source.report["characters"] == {"train": 1028, "validation": 172, "test": 423}
    for split in ("train", "validation", "test"):
        listed = {f"{r['archive']}/{r['alphabet']}/{r['character']}" for r in rows if r["split"] in (split, split[:3])}
        ours = {record.class_name.split("@")[0] for record in source.splits[split]}
        assert ours == listed


@pytest.mark.real_data
def test_the_real_archives_are_complete(data_root):
    source = open_source("omniglot", str(data_root / "omniglot"))
    classes = {split: {record.class_name for record in records} for split, records in source.splits.items()}
    assert {split: len(names) for split, names in classes.items()} == {"train": 4800, "validation": 400, "test": 1292}
    assert [len(records) for records in source.splits.values()] == [96_000, 8_000, 25_840]
    characters = [{name.split("@")[0] for name in names} for names in classes.values()]
    assert len(set.union(*characters)) == sum(map(len, characters)) == 1623
    assert len({record.key for records in source.splits.values() for record in records}) == 129_840
    images = source.load_block("validation", range(0, 8_000, 4))
    assert images.shape == (2000, 1, 28, 28)
    assert (images.max(axis=(1, 2, 3)) > 127).all()
    assert 0.02 < (images > 127).mean() < 0.3
    assert np.median(images) == 0


def merged(folder, to):
    """All alphabets in one folder."""
    for archive in ALPHABETS:
        shutil.copytree(folder / archive, to, dirs_exist_ok=True)
    return to


def tarred(folder, path, arcname):
    with tarfile.open(path, "w:gz") as target:
        target.add(folder, arcname)
    return path


def test_further_layouts_are_the_same_dataset(folder, tmp_path):
    first = open_source("omniglot", str(folder))
    beside = tmp_path / "beside"
    shutil.copytree(folder, beside / "omniglot")
    (beside / "__MACOSX" / "omniglot").mkdir(parents=True)
    tars = tmp_path / "tars"
    tars.mkdir()
    for archive in ALPHABETS:
        tarred(folder / archive, tars / f"{archive}.tar.gz", archive)
    alone = tmp_path / "alone"
    alone.mkdir()
    layouts = {
        "a folder of macOS beside it": beside,
        "tar.gz files": tars,
        "merged": merged(folder, tmp_path / "merged" / "all"),
        "one tar.gz": tarred(folder, tmp_path / "omniglot.tar.gz", "omniglot-master/python"),
        "a merged tar.gz in a folder": tarred(tmp_path / "merged" / "all", alone / "omniglot.tar.gz", "all").parent,
    }
    for name, place in layouts.items():
        source = open_source("omniglot", str(place))
        assert source.fingerprint == first.fingerprint, name
        assert everything(source) == everything(first), name
        assert source.files["files"] == {"seen": 16, "read": 16, "left_out": 0}


def test_wrong_layouts_are_named(folder, tmp_path):
    (folder / "images_background" / "notes.txt").write_text("x")
    assert open_source("omniglot", str(folder)).files["left_out"][0]["reason"] == "suffix .txt"
    nested = tmp_path / "nested.zip"
    with zipfile.ZipFile(nested, "w") as archive:
        for path in zipped(folder, tmp_path / "zips").iterdir():
            archive.write(path, path.name)
    assert_refused(nested, "nested.zip: contains images_background.zip, images_evaluation.zip; unpack it")
    all_alphabets = merged(folder, tmp_path / "all")
    (all_alphabets / "Greek").rename(all_alphabets / "Grec")
    assert_refused(all_alphabets, "Grec is not an alphabet of Omniglot", "images_background and images_evaluation")
