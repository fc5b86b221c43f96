"""`metagmvae bench loader`: samples per second from shards, beside an image-folder DataLoader on the same pictures.

The trainer must never wait for data: the share of time that a training waits is measured as well.

Notation: B episodes, M points per episode.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metagmvae.configs.schema import ModelSettings, TrainSettings
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.indexed import SetStream
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.builders import build_model, build_optimizer
from metagmvae.training.trainer.steps import MetaStep

BATCH, SET_SIZE = 4, 200
STEPS = 50
TRAINED_STEPS = 20
LOADER_WORKERS = 2


def bench_loader(dataset: Dataset, split: str, pictures: int, repeats: int) -> dict[str, Any]:
    """Rates in samples/s (median of `repeats`, readers in turns), and the waiting share of a training.

    Args:
        dataset: local data set of images.
        split: of it.
        pictures: how many of them the image folder holds; they are written as PNG files in class folders.
        repeats: timed passes of each reader.

    Raises:
        DataError: the split holds fewer pictures than one step takes.
    """
    count = len(dataset.labels(split))
    if min(pictures, count) < BATCH * SET_SIZE:
        raise DataError(f"--pictures is {pictures} and {split} holds {count}: a step takes {BATCH * SET_SIZE}")
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(dataset, split, Path(folder), pictures)
        readers: dict[str, Callable[[], float]] = {
            "shards in memory": _stream_rate(dataset, split, "memory"),
            "shards in place": _stream_rate(dataset, split, "mmap"),
            "opening and decoding shards, warm": lambda: _open_rate(dataset, split),
            "opening and decoding shards, cold": lambda: _open_rate(_cold(dataset, split), split),
            "image folder, warm": lambda: _folder_rate(Path(folder)),
            "image folder, cold": lambda: _folder_rate(_forget(Path(folder))),
        }
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(repeats):
            for name, reader in readers.items():
                rates[name].append(reader())
    rows = [{"reader": name, "samples_per_s": statistics.median(values)} for name, values in rates.items()]
    shares = {reader: waiting_share(dataset, split, reader) for reader in ("memory", "mmap")}
    return {
        "split": split,
        "pictures": pictures,
        "image_shape": list(dataset.image_shape),
        "repeats": repeats,
        "loader_workers": LOADER_WORKERS,
        "rows": rows,
        "waiting_share_in_training": shares,
    }


def write_pictures(dataset: Dataset, split: str, folder: Path, count: int) -> None:
    """The first rows of a split as PNG files in class folders, as torchvision's ImageFolder wants them."""
    from PIL import Image

    images, labels = dataset.images(split), dataset.labels(split)
    for row in range(min(count, len(labels))):
        parent = folder / str(labels[row])
        parent.mkdir(exist_ok=True)
        picture = images[row].transpose(1, 2, 0)
        Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(parent / f"{row}.png")


def _stream_rate(dataset: Dataset, split: str, reader: Any) -> Callable[[], float]:
    def rate() -> float:
        images = dataset.images(split, reader)  # opened here: mapped files would stay in the page cache
        stream = SetStream(images, batch=BATCH, set_size=SET_SIZE, seed=0, split=split, steps=STEPS)
        since = time.perf_counter()
        for batch in stream:
            torch.as_tensor(batch.images).float().sum()
        return STEPS * BATCH * SET_SIZE / (time.perf_counter() - since)

    return rate


def _open_rate(dataset: Dataset, split: str) -> float:
    """From the tars to one array in memory, every checksum compared."""
    since = time.perf_counter()
    images = dataset.images(split, "memory")
    return len(images) / (time.perf_counter() - since)


def _cold(dataset: Dataset, split: str) -> Dataset:
    _forget(dataset.root / split)
    return dataset


def _forget(folder: Path) -> Path:
    """Ask the kernel to drop the files of a folder from its page cache, as after a restart of the machine."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    return folder


def _folder_rate(folder: Path) -> float:
    """One epoch of the usual way: ImageFolder, PIL, ToTensor, shuffled batches, worker processes."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Grayscale, ToTensor

    pictures = ImageFolder(str(folder), transform=Compose([Grayscale(), ToTensor()]))
    loader = DataLoader(pictures, batch_size=BATCH * SET_SIZE, shuffle=True, num_workers=LOADER_WORKERS)
    since = time.perf_counter()
    for images, _ in loader:
        images.sum()
    return len(pictures) / (time.perf_counter() - since)


def waiting_share(dataset: Dataset, split: str, reader: Any) -> float:
    """Share of the wall time of a training that its loop waited for the next batch, after the first one."""
    settings = TrainSettings(batch=BATCH, set_size=SET_SIZE, precision="auto")
    model = build_model(ModelSettings(), dataset.image_shape, 0).to(memory_format=torch.channels_last)
    module, optimizer = MetaStep(model, settings), build_optimizer(model, settings)
    images = dataset.images(split, reader)
    stream = SetStream(images, batch=BATCH, set_size=SET_SIZE, seed=0, split=split, steps=TRAINED_STEPS + 1)
    batches = iter(stream)
    next(batches)
    since, waited = time.perf_counter(), stream.waiting_s
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        module(batch)[0].backward()
        optimizer.step()
    return (stream.waiting_s - waited) / (time.perf_counter() - since)
