"""A user's own images: a few labelled ones in class folders, and others to be named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.package import LoadedModel
from evaluation.predict import encode_images, predict_episodes
from pipelines.images import decode_image
from pipelines.records import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def classify_folders(loaded: LoadedModel, support: Path, query: Path, picture: Path | None = None) -> dict[str, Any]:
    """Probabilities of every class for every query image, all queries judged together.

    Args:
        loaded: the model.
        support: `support/<class>/*.png`, equally many images in each of two or more classes.
        query: `query/*.png`.
        picture: PNG file to draw the answer in.

    Raises:
        DataError: a folder or an image is not as it should be.
    """
    folders = [folder for folder in _listed(support) if folder.is_dir()]
    if len(folders) < 2:
        raise DataError(f"{support}: holds {len(folders)} class folders; two or more are needed, SUPPORT/<class>/*.png")
    labelled = [_images(folder) for folder in folders]
    counts = {folder.name: len(files) for folder, files in zip(folders, labelled, strict=True)}
    if len(set(counts.values())) > 1:
        raise DataError(f"{support}: classes differ in number of images ({counts}); give every class as many")
    queries = _images(query)
    files = [file for files in labelled for file in files] + queries
    images = np.stack([_read(file, loaded.image_shape) for file in files])
    ways, shots = len(folders), len(labelled[0])
    h_nF = encode_images(loaded.model, images, torch.device("cpu"))
    h_EKSF = h_nF[: ways * shots].reshape(1, ways, shots, -1)
    h_EPF = h_nF[None, ways * shots :]
    probabilities = predict_episodes(loaded.model, loaded.settings.adapt, h_EKSF, h_EPF, seed_by_episode=[0])[0]
    names = [folder.name for folder in folders]
    rows = [
        {"query": file.name, "class": names[int(row.argmax())], **dict(zip(names, row.tolist(), strict=True))}
        for file, row in zip(queries, probabilities, strict=True)
    ]
    answer: dict[str, Any] = {"classes": names, "shot": shots, "queries": rows}
    if picture is not None:
        from evaluation.figures import predictions, save

        labelled_images = list(images[: ways * shots].reshape(ways, shots, *loaded.image_shape))
        save(predictions(labelled_images, names, images[ways * shots :], probabilities.numpy()), picture)
        answer["figure"] = str(picture)
    return answer


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return sorted(folder.iterdir())


def _images(folder: Path) -> list[Path]:
    files = [file for file in _listed(folder) if file.suffix.lower() in SUFFIXES]
    if not files:
        raise DataError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    return files


def _read(file: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    channels, size, _ = image_shape
    return decode_image(file.read_bytes(), str(file), size=size, channels=channels)
