"""Episodes without labels: each of some images is a class of its own, and random views of it are its images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.vectors import image_remedy
from metagmvae.training.augment.build_view import build_view
from metagmvae.training.device.memory_format import channels_last
from metagmvae.training.device.seeding import keyed_generator, to_device
from metagmvae.training.models.encode_images import SMALLEST_BATCH
from metagmvae.training.trainer.package import LoadedModel

CLASSES = 200
"""Images that become classes."""


@torch.inference_mode()
def augmented_features(
    loaded: LoadedModel, dataset: Dataset, split: str, *, views: int, seed: int, device: torch.device
) -> tuple[Tensor, np.ndarray]:
    """Return features (n, F) of augmented views of random images, and the image that each is a view of, (n,).

    The views are those of the contrastive pre-training (`pretrain.views`). Such episodes resemble those of labelled
    classes only as far as the views resemble the variation within a class.

    `views` is the number of views of each image; `seed` draws images and views.

    Raises:
        DataError: the dataset contains features, which cannot be augmented, or fewer than two images.
    """
    if dataset.kind != "images":
        raise DataError(
            f"{dataset.uri}: has no labelled validation classes, and {dataset.content} cannot be augmented; give a "
            f"dataset with labelled classes, or {image_remedy(dataset.content)}"
        )
    images = dataset.images(split)
    if len(images) < SMALLEST_BATCH:
        raise DataError(f"{dataset.uri}: {len(images)} images of the split {split!r} are too few for a calibration")
    rows = keyed_rng("augmented classes", seed).permutation(len(images))[:CLASSES]
    view = build_view(loaded.settings.pretrain, loaded.model)
    x = loaded.model.scale_images(to_device(images[rows], device))
    features = []
    for number in range(views):
        generator = keyed_generator(device, "augmented classes", seed, number)
        features.append(loaded.model.encode_images(channels_last(view(x, generator))))
    return torch.cat(features), np.tile(np.arange(len(rows)), views)
