"""`metagmvae bench loader`: samples per second from shards, compared with a DataLoader on a folder of the same images.

Photographs are also read from encoded shards: by this package, by plain `webdataset.WebLoader` and by Ray Data. It also
measures the fraction of time that training waits for data, which should be close to zero.

Notation: B episodes, M points per episode.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metagmvae.configs.schema import ModelSettings, TrainSettings
from metagmvae.evaluation.bench.picture_copies import PictureCopies, bytes_per_image, copy_pictures
from metagmvae.evaluation.bench.processor_time import times
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.indexed import SetStream
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.methods.meta_step import MetaStep
from metagmvae.training.trainer.builders import build_model, build_optimizer

BATCH, SET_SIZE = 4, 200
STEPS = 50
ENCODED_STEPS = 10
"""Steps from shards whose images are decoded in each of them."""
TRAINED_STEPS = 20
PHOTOGRAPH_STEPS = 3
"""Trained steps on photographs, on which one step takes some seconds."""
LOADER_WORKERS = 2


RayReader = Callable[[Sequence[Path]], int]
"""Reads encoded shards with Ray Data; returns the number of images."""


def bench_loader(
    dataset: Dataset, split: str, image_count: int, repeats: int, ray_reader: RayReader | None = None
) -> dict[str, Any]:
    """Measure samples per second of each reader, and the fraction of time that training waits for data.

    The readers take turns, so that a change of the machine's load affects all of them. The median is reported. Samples
    per second of processor time, of this process and its workers, hardly depend on other load: the speed of one core.

    Args:
        dataset: local data set of images.
        split: of the data set.
        image_count: number of images of the image folder, and of photographs in shards.
        repeats: timed passes of each reader.
        ray_reader: reads encoded shards; None leaves Ray Data out.

    Raises:
        DataError: the split or the image folder has fewer images than one training step needs.
    """
    count = len(dataset.labels(split))
    if min(image_count, count) < BATCH * SET_SIZE:
        raise DataError(
            f"--pictures is {image_count} and {split} holds {count} images: one step needs {BATCH * SET_SIZE}"
        )
    with tempfile.TemporaryDirectory() as folder:
        copies = copy_pictures(dataset, split, Path(folder), min(image_count, count))
        readers = _readers(dataset if copies.decoded is None else copies.decoded, split, copies.files)
        readers |= _encoded_readers(copies, split, ray_reader)
        rates: dict[str, list[np.ndarray]] = {name: [] for name in readers}
        for _ in range(repeats):
            for name, (reader, _) in readers.items():
                rates[name].append(reader())
        rows: list[dict[str, Any]] = []
        for name, values in rates.items():
            per_s, per_cpu_s = np.median(values, axis=0).tolist()
            rows.append({"reader": name, "samples_per_s": per_s})
            if np.isfinite(per_cpu_s):
                rows[-1]["samples_per_cpu_s"] = per_cpu_s
            if copies.encoded is not None:
                rows[-1]["bytes_per_image"] = bytes_per_image(readers[name][1], min(image_count, count))
        fractions = _waiting_fractions(dataset, copies, split)
    return {
        "split": split,
        "pictures": min(image_count, count),
        "image_shape": list(dataset.image_shape),
        "repeats": repeats,
        "loader_workers": LOADER_WORKERS,
        "rows": rows,
        "waiting_share_in_training": fractions,
    }


Readers = dict[str, tuple[Callable[[], np.ndarray], Path]]
"""By name: what measures images per second, in all and of processor time, and the folder that it reads."""


def _readers(dataset: Dataset, split: str, files: Path) -> Readers:
    """Readers of decoded shards and of image files."""
    shards = dataset.root / split
    return {
        "shards in memory": (_stream_rate(dataset, split, "memory", STEPS), shards),
        "shards in place": (_stream_rate(dataset, split, "mmap", STEPS), shards),
        "opening and decoding shards, warm": (lambda: _open_rate(dataset, split), shards),
        "opening and decoding shards, cold": (lambda: _open_rate(_evict_split(dataset, split), split), shards),
        "image folder, warm": (lambda: _folder_rate(files, dataset.image_shape[0]), files),
        "image folder, cold": (lambda: _folder_rate(_evict_from_cache(files), dataset.image_shape[0]), files),
    }


def _encoded_readers(copies: PictureCopies, split: str, ray_reader: RayReader | None) -> Readers:
    """Readers of encoded shards; none for images that are too small."""
    encoded = copies.encoded
    if encoded is None:
        return {}
    shards = encoded.root / split
    paths = sorted(shards.glob("*.tar"))
    readers: Readers = {
        "encoded shards, decoded in each step": (_stream_rate(encoded, split, "mmap", ENCODED_STEPS), shards),
        "opening and decoding encoded shards, warm": (lambda: _open_rate(encoded, split), shards),
        "opening and decoding encoded shards, cold": (lambda: _open_rate(_evict_split(encoded, split), split), shards),
        "encoded shards by webdataset.WebLoader": (lambda: _webdataset_rate(paths), shards),
    }
    if ray_reader is not None and set(encoded.split(split)["formats"]) == {"jpg"}:  # Ray Data decodes no WebP
        readers["encoded shards by Ray Data, read_webdataset"] = (lambda: _ray_rate(ray_reader, paths), shards)
    return readers


def _waiting_fractions(dataset: Dataset, copies: PictureCopies, split: str) -> dict[str, float]:
    if copies.decoded is None or copies.encoded is None:
        return {reader: waiting_fraction(dataset, split, reader, TRAINED_STEPS) for reader in ("memory", "mmap")}
    return {
        "memory": waiting_fraction(copies.decoded, split, "memory", PHOTOGRAPH_STEPS),
        "mmap": waiting_fraction(copies.decoded, split, "mmap", PHOTOGRAPH_STEPS),
        "encoded": waiting_fraction(copies.encoded, split, "mmap", PHOTOGRAPH_STEPS),
    }


def _stream_rate(dataset: Dataset, split: str, reader: Any, steps: int) -> Callable[[], np.ndarray]:
    """A function that measures samples per second of unlabelled sets from shards."""

    def rate() -> np.ndarray:
        images = dataset.images(split, reader)  # opened per pass: files that stay mapped cannot leave the page cache
        stream = SetStream(images, batch=BATCH, set_size=SET_SIZE, seed=0, split=split, steps=steps)
        start = times()
        for batch in stream:
            torch.as_tensor(batch.images).float().sum()
        return steps * BATCH * SET_SIZE / (times() - start)

    return rate


def _open_rate(dataset: Dataset, split: str) -> np.ndarray:
    """Images per second from tar files to one array in memory, including the checksums."""
    start = times()
    images = dataset.images(split, "memory")
    return len(images) / (times() - start)


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


def _webdataset_rate(shards: Sequence[Path]) -> np.ndarray:
    """Images per second of one epoch with webdataset alone: shuffle buffer, decoding, batches, worker processes."""
    import webdataset as wds

    samples = wds.WebDataset([str(path) for path in shards], shardshuffle=len(shards), seed=0, empty_check=False)
    read = samples.shuffle(BATCH * SET_SIZE).decode("torchrgb").to_tuple("jpg;webp").batched(BATCH * SET_SIZE)
    images, start = 0, times()
    for (batch,) in wds.WebLoader(read, batch_size=None, num_workers=LOADER_WORKERS):
        batch.sum()
        images += len(batch)
    return images / (times() - start)


def _ray_rate(read: RayReader, shards: Sequence[Path]) -> np.ndarray:
    """Without processor time: the workers of Ray are no children of this process."""
    start = time.perf_counter()
    return np.array([read(shards) / (time.perf_counter() - start), np.nan])


def _folder_rate(folder: Path, channels: int) -> np.ndarray:
    """Images per second of one conventional epoch: ImageFolder, PIL, ToTensor, shuffled batches, worker processes."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Grayscale, ToTensor

    images_in_folder = ImageFolder(
        str(folder), transform=Compose([Grayscale(), ToTensor()] if channels == 1 else [ToTensor()])
    )
    loader = DataLoader(images_in_folder, batch_size=BATCH * SET_SIZE, shuffle=True, num_workers=LOADER_WORKERS)
    start = times()
    for images, _ in loader:
        images.sum()
    return len(images_in_folder) / (times() - start)


def waiting_fraction(dataset: Dataset, split: str, reader: Any, steps: int) -> float:
    """Fraction of the wall time of training that it waits for the next batch, without the first batch."""
    settings = TrainSettings(batch=BATCH, set_size=SET_SIZE, precision="auto")
    model = build_model(ModelSettings(), dataset.image_shape, 0).to(memory_format=torch.channels_last)
    assert isinstance(model, MetaGMVAE)
    module, optimizer = MetaStep(model, settings), build_optimizer(model, settings)
    images = dataset.images(split, reader)
    stream = SetStream(images, batch=BATCH, set_size=SET_SIZE, seed=0, split=split, steps=steps + 1)
    batches = iter(stream)
    next(batches)
    start, waited_before = time.perf_counter(), stream.waiting_s
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        module(batch)[0].backward()
        optimizer.step()
    return (stream.waiting_s - waited_before) / (time.perf_counter() - start)
