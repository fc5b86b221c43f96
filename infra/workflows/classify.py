"""Classification of image files from a few labelled image files in class folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.pipelines.archives.reader import read_entry
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing
from metagmvae.pipelines.sources.image_files import list_images
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.trainer.package import LoadedModel, require_meta_gmvae

FIELDS = ("query", "class", "probabilities")
"""Keys of a row that are no class. The probability of a class with such a name is in `probabilities` only."""


def classify_folders(
    loaded: LoadedModel, support: Path, query: Path, figure: Path | None = None, invert: bool | None = None
) -> dict[str, Any]:
    """Classify query images transductively, on a GPU if there is one; return the answer of `metagmvae classify`.

    The preprocessing that the model records is applied to all images, as `metagmvae prepare` applied it to the
    training images.

    Args:
        loaded: the model.
        support: folder or archive that holds `<class>/*.png` for two or more classes; shots may differ between classes.
        query: folder or archive that holds `*.png`.
        figure: PNG file to draw the predictions into.
        invert: whether to invert the images; None: as recorded, and not for a model without a record.

    Returns:
        `classes`: names; `shots`: labelled images of each class; `preprocessing`: what was done to the images, and
        whether the model records it; `queries`: one row per query image with its file name (`query`), its predicted
        class (`class`), the probability of each class (`probabilities`), and each probability again under the name of
        its class; `left_out`: files that were not read, with reasons; `blank`: images of one single value; `figure`:
        the path of the figure, if drawn.

    Raises:
        DataError: a folder is missing or holds no images, an image cannot be read, or the model is encoder-only.
    """
    model = require_meta_gmvae(loaded, loaded.settings.name)
    names, support_files, label_T, left_out = _support_files(support)
    query_files, queries_left_out = _query_files(query)
    preprocessing = image_preprocessing(loaded, invert)
    files = [(support, file) for file in support_files] + [(query, file) for file in query_files]
    images = np.stack([apply_preprocessing(read_entry(*file), _path(*file), preprocessing) for file in files])
    device = default_device()
    h_nF = encode_images(model.to(device), images, device)
    h_TF, h_PF = h_nF[: len(label_T)], h_nF[len(label_T) :]
    probabilities_PK = predict_queries(model, loaded.settings.adapt, h_TF, label_T, h_PF).cpu().numpy()
    recorded = loaded.preprocessing is not None
    answer: dict[str, Any] = {
        "classes": names,
        "shots": np.bincount(label_T).tolist(),
        "preprocessing": preprocessing.model_dump(mode="json") | {"recorded": recorded},
        "queries": [_row(file, names, row) for file, row in zip(query_files, probabilities_PK, strict=True)],
        "left_out": left_out + queries_left_out,
        "blank": [_path(*file) for file, image in zip(files, images, strict=True) if image.min() == image.max()],
    }
    if figure is not None:
        from metagmvae.evaluation.figures import plots

        support_images, query_images = images[: len(label_T)], images[len(label_T) :]
        images_by_class = [support_images[label_T == k] for k in range(len(names))]
        plots.save(plots.predictions(images_by_class, names, query_images, probabilities_PK), figure)
        answer["figure"] = str(figure)
    return answer


def image_preprocessing(loaded: LoadedModel, invert: bool | None = None) -> Preprocessing:
    """Return the preprocessing of image files for a model: the recorded one, or only crop and resize without a record.

    Args:
        loaded: the model.
        invert: replaces the inversion; None: as recorded.
    """
    recorded = loaded.preprocessing or Preprocessing.of_shape(loaded.image_shape, invert=False)
    return recorded if invert is None else recorded.model_copy(update={"invert": invert})


def _row(file: str, names: list[str], row: np.ndarray) -> dict[str, Any]:
    probabilities = dict(zip(names, row.tolist(), strict=True))
    values = {name: value for name, value in probabilities.items() if name not in FIELDS}
    return {"query": file, "class": names[int(row.argmax())], **values, "probabilities": probabilities}


def _support_files(support: Path) -> tuple[list[str], list[str], np.ndarray, list[dict[str, str]]]:
    """Names of the classes, files `<class>/<file>` in the order of the classes, their class numbers, files left out."""
    files, left_out, folders = _list(support, depth=2, reason="not in a class folder")
    names = sorted({file.split("/")[0] for file in files})
    empty = sorted({folder.split("/")[0] for folder in folders} - set(names))
    if empty:
        raise DataError(f"{support}: class folder {empty[0]} holds no images; add images of this class or remove it")
    if len(names) < 2:
        raise DataError(f"{support}: holds {len(names)} class folders; give two or more, SUPPORT/<class>/*.png")
    return names, files, np.array([names.index(file.split("/")[0]) for file in files]), left_out


def _query_files(query: Path) -> tuple[list[str], list[dict[str, str]]]:
    files, left_out, _ = _list(query, depth=1, reason="in a sub-folder")
    if not files:
        raise DataError(f"{query}: holds no images; give a folder of image files, QUERY/*.png")
    return files, left_out


def _list(root: Path, depth: int, reason: str) -> tuple[list[str], list[dict[str, str]], list[str]]:
    """Image files at a depth, files left out, and folders; `reason` is that of image files at another depth."""
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    listing = list_images(root)
    names = [entry.name for entry in listing.entries]
    others = [(file.name, file.reason) for file in listing.left_out]
    others += [(name, reason) for name in names if name.count("/") + 1 != depth]
    left_out = [{"file": _path(root, name), "reason": reason} for name, reason in sorted(others)]
    return [name for name in names if name.count("/") + 1 == depth], left_out, listing.folders


def _path(root: Path, name: str) -> str:
    return f"{root}/{name}"
