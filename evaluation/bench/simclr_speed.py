"""`metagmvae bench simclr`: SimCLR augmentation on batches, compared with a DataLoader that augments image by image.

For each method two rates are measured: the two views of each image alone, and a whole training step with them. Both
methods apply SimCLR's crops, flips and colour changes at the same size, and train the same encoder with the same code.
Views of batches are computed on the GPU if there is one.
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
from metagmvae.evaluation.bench.loader_speed import LOADER_WORKERS
from metagmvae.evaluation.bench.picture_copies import write_image_folder
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.indexed import ImageBatchStream
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.augment.photos import photo_view
from metagmvae.training.device.default import default_device
from metagmvae.training.device.precision import autocast
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.objectives.nt_xent import nt_xent
from metagmvae.training.trainer.builders import build_encoder_model, build_pretrain_optimizer
from metagmvae.training.trainer.update import Update, build_update

BATCH = 256
UNTIMED = 5 if torch.cuda.is_available() else 1
"""Batches before the measurement: a CUDA graph is captured in the fourth step."""
STEPS = 6
SIZE = 42


def bench_simclr(dataset: Dataset, split: str, repeats: int) -> dict[str, Any]:
    """Measure images per second of each method: the median of `repeats` passes, in which the methods take turns.

    Raises:
        DataError: the split has too few images, or they are not RGB.
    """
    count = BATCH * (STEPS + UNTIMED)
    if len(dataset.labels(split)) < count or dataset.image_shape[0] != 3:
        raise DataError(
            f"{dataset.uri}: {split} must have at least {count} RGB images; choose another --data or --split"
        )
    model = build_encoder_model(ModelSettings(image_size=SIZE), dataset.image_shape, 0)
    model = model.to(default_device()).to(memory_format=torch.channels_last)
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
    """Images per second over STEPS batches after the untimed ones; with a model, each batch is a training step."""
    step = _training_step(model) if model is not None else None
    start = time.perf_counter()
    for number, (first, second) in enumerate(views):
        if step is not None:
            step((first, second), number + 1)
        if number in (UNTIMED - 1, UNTIMED + STEPS - 1):
            first[0, 0, 0, 0].item()  # waits for the device
        if number == UNTIMED - 1:
            start = time.perf_counter()
        if number == UNTIMED + STEPS - 1:
            break
    return STEPS * BATCH / (time.perf_counter() - start)


def _training_step(model: EncoderModel) -> Update:
    """The training step of `training.trainer.update` on two views, in bfloat16 where the hardware supports it."""
    settings = PretrainSettings()
    module = _ViewsStep(model.train().encoder, settings.temperature)
    return build_update("simclr", module, build_pretrain_optimizer([module], settings), 0.0, default_device())


class _ViewsStep(nn.Module):
    """A step module whose batch is two views."""

    def __init__(self, encoder: nn.Module, temperature: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.temperature = temperature

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent of two views, (n, C, H, W) each."""
        return self.compute(*self.prepare(first, second))

    def prepare(self, first: Tensor, second: Tensor) -> tuple[Tensor]:
        """Both views on the device, (2n, C, H, W)."""
        device = next(self.parameters()).device
        return (torch.cat([first, second]).to(device).contiguous(memory_format=torch.channels_last),)

    def compute(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss from the result of `prepare`."""
        with autocast(views.device, "auto"):
            h = self.encoder(views)
        first_h, second_h = h.chunk(2)
        return nt_xent(first_h, second_h, self.temperature), {}


def _batch_views(dataset: Dataset, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    stream = ImageBatchStream(dataset.images(split), batch=BATCH, seed=0, split=split, steps=UNTIMED + STEPS)
    seed = TrainSettings().seed
    for images, step in stream:
        x = EncoderModel.scale_images(torch.as_tensor(images).to(default_device()))
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
