"""`metagmvae bench loader`: samples per second from shards, compared with a DataLoader on a folder of the same images.

It also measures the fraction of time that training waits for data, which should be close to zero.

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
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.methods.meta_step import MetaStep
from metagmvae.training.trainer.builders import build_model, build_optimizer

BATCH, SET_SIZE = 4, 200
STEPS = 50
TRAINED_STEPS = 20
LOADER_WORKERS = 2


def bench_loader(dataset: Dataset, split: str, image_count: int, repeats: int) -> dict[str, Any]:
    """Measure samples per second of each reader, and the fraction of time that training waits for data.

    The readers take turns, so that a change of the machine's load affects all of them. The median is reported.

    Args:
        dataset: local data set of images.
        split: of the data set.
        image_count: number of images that are written as PNG files for the image folder.
        repeats: timed passes of each reader.

    Raises:
        DataError: the split or the image folder has fewer images than one training step needs.
    """
    count = len(dataset.labels(split))
    if min(image_count, count) < BATCH * SET_SIZE:
        raise DataError(
            f"--pictures is {image_count} and {split} holds {count} images: one step needs {BATCH * SET_SIZE}"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_image_folder(dataset, split, Path(folder), image_count)
        readers: dict[str, Callable[[], float]] = {
            "shards in memory": _stream_rate(dataset, split, "memory"),
            "shards in place": _stream_rate(dataset, split, "mmap"),
            "opening and decoding shards, warm": lambda: _open_rate(dataset, split),
            "opening and decoding shards, cold": lambda: _open_rate(_evict_split(dataset, split), split),
            "image folder, warm": lambda: _folder_rate(Path(folder)),
            "image folder, cold": lambda: _folder_rate(_evict_from_cache(Path(folder))),
        }
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(repeats):
            for name, reader in readers.items():
                rates[name].append(reader())
    rows = [{"reader": name, "samples_per_s": statistics.median(values)} for name, values in rates.items()]
    fractions = {reader: waiting_fraction(dataset, split, reader) for reader in ("memory", "mmap")}
    return {
        "split": split,
        "pictures": image_count,
        "image_shape": list(dataset.image_shape),
        "repeats": repeats,
        "loader_workers": LOADER_WORKERS,
        "rows": rows,
        "waiting_share_in_training": fractions,
    }


def write_image_folder(dataset: Dataset, split: str, folder: Path, count: int) -> None:
    """Write the first images of a split as PNG files in class folders, as torchvision's ImageFolder reads them."""
    from PIL import Image

    images, labels = dataset.images(split), dataset.labels(split)
    for row in range(min(count, len(labels))):
        parent = folder / str(labels[row])
        parent.mkdir(exist_ok=True)
        image = images[row].transpose(1, 2, 0)
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(parent / f"{row}.png")


def _stream_rate(dataset: Dataset, split: str, reader: Any) -> Callable[[], float]:
    """A function that measures samples per second of unlabelled sets from shards."""

    def rate() -> float:
        images = dataset.images(split, reader)  # opened per pass: files that stay mapped cannot leave the page cache
        stream = SetStream(images, batch=BATCH, set_size=SET_SIZE, seed=0, split=split, steps=STEPS)
        start = time.perf_counter()
        for batch in stream:
            torch.as_tensor(batch.images).float().sum()
        return STEPS * BATCH * SET_SIZE / (time.perf_counter() - start)

    return rate


def _open_rate(dataset: Dataset, split: str) -> float:
    """Images per second from tar files to one array in memory, including the checksums."""
    start = time.perf_counter()
    images = dataset.images(split, "memory")
    return len(images) / (time.perf_counter() - start)


def _evict_split(dataset: Dataset, split: str) -> Dataset:
    _evict_from_cache(dataset.root / split)
    return dataset


def _evict_from_cache(folder: Path) -> Path:
    """Ask the kernel to drop the files of a folder from its page cache; return the folder."""
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
    """Images per second of one conventional epoch: ImageFolder, PIL, ToTensor, shuffled batches, worker processes."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Grayscale, ToTensor

    images_in_folder = ImageFolder(str(folder), transform=Compose([Grayscale(), ToTensor()]))
    loader = DataLoader(images_in_folder, batch_size=BATCH * SET_SIZE, shuffle=True, num_workers=LOADER_WORKERS)
    start = time.perf_counter()
    for images, _ in loader:
        images.sum()
    return len(images_in_folder) / (time.perf_counter() - start)


def waiting_fraction(dataset: Dataset, split: str, reader: Any) -> float:
    """Fraction of the wall time of training that it waits for the next batch, without the first batch."""
    settings = TrainSettings(batch=BATCH, set_size=SET_SIZE, precision="auto")
    model = build_model(ModelSettings(), dataset.image_shape, 0).to(memory_format=torch.channels_last)
    assert isinstance(model, MetaGMVAE)
    module, optimizer = MetaStep(model, settings), build_optimizer(model, settings)
    images = dataset.images(split, reader)
    stream = SetStream(images, batch=BATCH, set_size=SET_SIZE, seed=0, split=split, steps=TRAINED_STEPS + 1)
    batches = iter(stream)
    next(batches)
    start, waited_before = time.perf_counter(), stream.waiting_s
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        module(batch)[0].backward()
        optimizer.step()
    return (stream.waiting_s - waited_before) / (time.perf_counter() - start)
