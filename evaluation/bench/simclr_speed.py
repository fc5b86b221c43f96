"""`metagmvae bench simclr`: SimCLR augmentation on batches, compared with a DataLoader that augments image by image.

For each method two rates are measured: the two views of each image alone, and a whole training step with them. Both
methods apply SimCLR's crops, flips and colour changes at the same size, and train the same encoder with the same code.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metagmvae.configs.schema import ModelSettings, PretrainSettings, TrainSettings
from metagmvae.evaluation.bench.loader_speed import LOADER_WORKERS, write_image_folder
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.indexed import ImageBatchStream
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.augment.photos import photo_view
from metagmvae.training.device.precision import autocast
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.objectives.nt_xent import nt_xent
from metagmvae.training.trainer.builders import build_encoder_model, build_pretrain_optimizer

BATCH = 256
STEPS = 6
SIZE = 42


def bench_simclr(dataset: Dataset, split: str, repeats: int) -> dict[str, Any]:
    """Measure images per second of each method: the median of `repeats` passes, in which the methods take turns.

    Args:
        dataset: data set of RGB images.
        split: of the data set.
        repeats: timed passes of each method.

    Raises:
        DataError: the split has too few images, or they are not RGB.
    """
    count = BATCH * (STEPS + 1)
    if len(dataset.labels(split)) < count or dataset.image_shape[0] != 3:
        raise DataError(
            f"{dataset.uri}: {split} must have at least {count} RGB images; choose another --data or --split"
        )
    model = build_encoder_model(ModelSettings(image_size=SIZE), dataset.image_shape, 0)
    model = model.to(memory_format=torch.channels_last)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_image_folder(dataset, split, Path(folder), count)
        methods = {
            "batches": lambda: _batch_views(dataset, split),
            "DataLoader, PIL": lambda: _loader_views(Path(folder)),
        }
        for _ in range(repeats):
            for name, views in methods.items():
                rates.setdefault(f"{name}: views", []).append(_rate(views()))
                rates.setdefault(f"{name}: training", []).append(_rate(views(), model))
    rows = [{"road": name, "images_per_s": statistics.median(values)} for name, values in rates.items()]
    return {
        "batch": BATCH,
        "size": SIZE,
        "image_shape": list(dataset.image_shape),
        "loader_workers": LOADER_WORKERS,
        "repeats": repeats,
        "rows": rows,
    }


def _rate(views: Iterator[tuple[Tensor, Tensor]], model: EncoderModel | None = None) -> float:
    """Images per second over STEPS batches after one untimed batch; with a model, each batch is a training step."""
    step = _TrainStep(model) if model is not None else None
    start = time.perf_counter()
    for number, (first, second) in enumerate(views):
        if step is not None:
            step(first, second)
        if number == 0:
            start = time.perf_counter()
        if number == STEPS:
            break
    return STEPS * BATCH / (time.perf_counter() - start)


class _TrainStep:
    """One optimiser step on two views, in bfloat16 where the hardware supports it."""

    def __init__(self, model: EncoderModel) -> None:
        settings = PretrainSettings()
        self.encoder: nn.Module = model.train().encoder
        self.optimizer = build_pretrain_optimizer([self.encoder], settings)
        self.temperature = settings.temperature

    def __call__(self, first: Tensor, second: Tensor) -> None:
        views = torch.cat([first, second]).contiguous(memory_format=torch.channels_last)
        with autocast(views.device, "auto"):
            h = self.encoder(views)
        self.optimizer.zero_grad(set_to_none=True)
        first_h, second_h = h.chunk(2)
        nt_xent(first_h, second_h, self.temperature).backward()
        self.optimizer.step()


def _batch_views(dataset: Dataset, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    stream = ImageBatchStream(dataset.images(split), batch=BATCH, seed=0, split=split, steps=STEPS + 1)
    seed = TrainSettings().seed
    for images, step in stream:
        x = EncoderModel.scale_images(torch.as_tensor(images))
        generator = keyed_generator(x.device, seed, "views", step, 0)
        yield photo_view(x, generator, SIZE), photo_view(x, generator, SIZE)


def _loader_views(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Conventional views: image files, PIL, torchvision's transforms image by image, worker processes."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import (
        ColorJitter,
        Compose,
        RandomApply,
        RandomGrayscale,
        RandomHorizontalFlip,
        RandomResizedCrop,
        ToTensor,
    )

    view = Compose(
        [
            RandomResizedCrop(SIZE, (0.08, 1.0)),
            RandomHorizontalFlip(),
            RandomApply([ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            RandomGrayscale(0.2),
            ToTensor(),
        ]
    )
    images_in_folder = ImageFolder(str(folder), transform=lambda image: (view(image), view(image)))
    loader = DataLoader(images_in_folder, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=LOADER_WORKERS)
    for views, _ in loader:
        yield views
