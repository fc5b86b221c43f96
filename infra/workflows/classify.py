"""Classification of image files from a few labelled image files in class folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.pipelines.archives.reader import is_hidden
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.image_decoding import decode_image
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.trainer.package import LoadedModel, require_meta_gmvae

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def classify_folders(loaded: LoadedModel, support: Path, query: Path, figure: Path | None = None) -> dict[str, Any]:
    """Classify query images transductively, on a GPU if there is one; return the answer of `metagmvae classify`.

    Args:
        loaded: the model.
        support: holds `<class>/*.png` for two or more classes; shots may differ between classes.
        query: holds `*.png`.
        figure: PNG file to draw the predictions into.

    Returns:
        `classes`: names; `shots`: labelled images of each class; `queries`: one row per query image with its file
        name, its predicted class and the probability of each class; `figure`: the path of the figure, if drawn.

    Raises:
        DataError: a folder is missing or holds no images, an image cannot be read, or the model is encoder-only.
    """
    folders = [path for path in _visible_entries(support) if path.is_dir()]
    if len(folders) < 2:
        raise DataError(f"{support}: holds {len(folders)} class folders; give two or more, SUPPORT/<class>/*.png")
    files_by_class = [_image_files(folder) for folder in folders]
    query_files = _image_files(query)
    files = [file for class_files in files_by_class for file in class_files] + query_files
    images = np.stack([_read_image(file, loaded.image_shape) for file in files])
    label_T = np.repeat(np.arange(len(folders)), [len(class_files) for class_files in files_by_class])
    device = default_device()
    model = require_meta_gmvae(loaded, loaded.settings.name).to(device)
    h_nF = encode_images(model, images, device)
    h_TF, h_PF = h_nF[: len(label_T)], h_nF[len(label_T) :]
    probabilities_PK = predict_queries(model, loaded.settings.adapt, h_TF, label_T, h_PF).cpu().numpy()
    names = [folder.name for folder in folders]
    rows = [
        {"query": file.name, "class": names[int(row.argmax())], **dict(zip(names, row.tolist(), strict=True))}
        for file, row in zip(query_files, probabilities_PK, strict=True)
    ]
    answer: dict[str, Any] = {"classes": names, "shots": np.bincount(label_T).tolist(), "queries": rows}
    if figure is not None:
        from metagmvae.evaluation.figures import plots

        support_images, query_images = images[: len(label_T)], images[len(label_T) :]
        images_by_class = [support_images[label_T == k] for k in range(len(names))]
        plots.save(plots.predictions(images_by_class, names, query_images, probabilities_PK), figure)
        answer["figure"] = str(figure)
    return answer


def _visible_entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def _image_files(folder: Path) -> list[Path]:
    files = [file for file in _visible_entries(folder) if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    if not files:
        raise DataError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _read_image(file: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    channels, size, _ = image_shape
    return decode_image(file.read_bytes(), str(file), size=size, channels=channels)
