"""Small files of Mini-ImageNet in its common layouts."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources import mini_imagenet
from metagmvae.pipelines.sources.mini_imagenet import open_mini_imagenet

SPLITS = {"train": ("n01", "n02", "n03"), "val": ("n04", "n05"), "test": ("n06", "n07")}
OUR_NAMES = {"train": "train", "val": "validation", "test": "test"}
PER_CLASS = 4
SIDE = 10


def pixels(label: str, number: int) -> np.ndarray:
    return np.random.default_rng([int(label[1:]), number]).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def png(label: str, number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(label, number)).save(buffer, format="PNG")
    return buffer.getvalue()


FILES = {split: [(label, n) for label in labels for n in range(PER_CLASS)] for split, labels in SPLITS.items()}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect the numbers of classes and images of these files."""
    monkeypatch.setattr(mini_imagenet, "CLASSES", {"train": 3, "validation": 2, "test": 2})
    monkeypatch.setattr(mini_imagenet, "IMAGES_PER_CLASS", PER_CLASS)


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def by_lists(root: Path) -> Path:
    for split, files in FILES.items():
        for label, n in files:
            put(root / "images" / f"{label}{n:08d}.png", png(label, n))
        rows = "".join(f"{label}{n:08d}.png,{label}\n" for label, n in files)
        put(root / f"{split}.csv", f"filename,label\n{rows}".encode())
    return root


def by_folders(root: Path) -> Path:
    for split, files in FILES.items():
        for label, n in files:
            put(root / "mini" / split / label / f"{label}{n:08d}.png", png(label, n))
    return root


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def tarred(folder: Path, path: Path) -> Path:
    with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as archive:
        archive.add(folder, ".")
    return path


def by_caches(root: Path) -> Path:
    root.mkdir()
    for split, files in FILES.items():
        order = np.random.default_rng(0).permutation(len(files))
        images = np.stack([pixels(*files[row]) for row in order])
        classes = {label: [i for i, row in enumerate(order) if files[row][0] == label] for label in SPLITS[split]}
        content = pickle.dumps({"image_data": images, "class_dict": classes}, protocol=2)
        put(root / f"mini-imagenet-cache-{split}.pkl", content)
    return root


def assert_refused(text: str, source: Path | None, **options: bool) -> None:
    """Opening the source gives one error line that matches."""
    with pytest.raises(DataError, match=text) as caught:
        open_mini_imagenet(None if source is None else str(source), size=SIDE, **options)
    assert "\n" not in str(caught.value)
