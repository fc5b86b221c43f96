"""A user's own images: a few labelled ones in class folders, and others to be named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from metagmvae.evaluation.fewshot.predict import encode_images, predict_queries
from metagmvae.pipelines.archives.reader import is_hidden
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.image_decoding import decode_image
from metagmvae.training.trainer.package import LoadedModel, meta_gmvae

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def classify_folders(loaded: LoadedModel, support: Path, query: Path, picture: Path | None = None) -> dict[str, Any]:
    """Probabilities of every class for every query image, all queries judged together.

    Args:
        loaded: the model.
        support: `support/<class>/*.png`, two or more classes; shots may differ.
        query: `query/*.png`.
        picture: PNG file to draw the answer in.

    Raises:
        DataError: a folder or an image is not as it should be.
    """
    folders = [path for path in _listed(support) if path.is_dir()]
    if len(folders) < 2:
        raise DataError(f"{support}: holds {len(folders)} class folders; two or more are needed, SUPPORT/<class>/*.png")
    labelled = [_images(folder) for folder in folders]
    queries = _images(query)
    files = [file for files in labelled for file in files] + queries
    images = np.stack([_read(file, loaded.image_shape) for file in files])
    label_T = np.repeat(np.arange(len(folders)), [len(files) for files in labelled])
    model = meta_gmvae(loaded, loaded.settings.name)
    h_nF = encode_images(model, images, torch.device("cpu"))
    h_TF, h_PF = h_nF[: len(label_T)], h_nF[len(label_T) :]
    probabilities = predict_queries(model, loaded.settings.adapt, h_TF, label_T, h_PF)
    names = [folder.name for folder in folders]
    rows = [
        {"query": file.name, "class": names[int(row.argmax())], **dict(zip(names, row.tolist(), strict=True))}
        for file, row in zip(queries, probabilities, strict=True)
    ]
    answer: dict[str, Any] = {"classes": names, "shots": np.bincount(label_T).tolist(), "queries": rows}
    if picture is not None:
        from metagmvae.evaluation.figures.plots import predictions, save

        of_class = [images[: len(label_T)][label_T == k] for k in range(len(names))]
        save(predictions(of_class, names, images[len(label_T) :], probabilities.numpy()), picture)
        answer["figure"] = str(picture)
    return answer


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def _images(folder: Path) -> list[Path]:
    files = [file for file in _listed(folder) if file.suffix.lower() in SUFFIXES and file.is_file()]
    if not files:
        raise DataError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    return files


def _read(file: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    channels, size, _ = image_shape
    return decode_image(file.read_bytes(), str(file), size=size, channels=channels)
