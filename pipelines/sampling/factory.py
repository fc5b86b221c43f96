"""Training streams for rows that are read by index and for rows that are streamed."""

from __future__ import annotations

from typing import Any

from metagmvae.pipelines.records import Rows
from metagmvae.pipelines.sampling.indexed import ImageBatchStream, SetStream
from metagmvae.pipelines.sampling.sequential import StreamedImageBatches, StreamedImages, StreamedSets
from metagmvae.pipelines.sampling.stream import Stream


def unlabelled_sets(images: Rows | StreamedImages, **options: Any) -> Stream:
    """Stream of unlabelled sets: `SetStream`, or `StreamedSets` for streamed images."""
    return StreamedSets(images, **options) if isinstance(images, StreamedImages) else SetStream(images, **options)


def image_batches(images: Rows | StreamedImages, **options: Any) -> Stream:
    """Stream of batches of single images: `ImageBatchStream`, or `StreamedImageBatches` for streamed images."""
    if isinstance(images, StreamedImages):
        return StreamedImageBatches(images, **options)
    return ImageBatchStream(images, **options)
