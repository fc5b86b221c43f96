"""Training streams chosen by the reader of the settings."""

from __future__ import annotations

from typing import Any

from metagmvae.pipelines.records import Rows
from metagmvae.pipelines.sampling.indexed import ImageBatchStream, SetStream
from metagmvae.pipelines.sampling.sequential import StreamedImageBatches, StreamedImages, StreamedSets
from metagmvae.pipelines.sampling.stream import Stream


def unlabelled_sets(images: Rows | StreamedImages, **options: Any) -> Stream:
    """The stream of sets that suits the images: by row (`SetStream`), or as they come."""
    return StreamedSets(images, **options) if isinstance(images, StreamedImages) else SetStream(images, **options)


def image_batches(images: Rows | StreamedImages, **options: Any) -> Stream:
    """The same for single images."""
    if isinstance(images, StreamedImages):
        return StreamedImageBatches(images, **options)
    return ImageBatchStream(images, **options)
