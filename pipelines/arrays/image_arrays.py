"""Images that Python holds: arrays, images of Pillow, contents of files; and what readers of files with many share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from metagmvae.pipelines.files import sha256_json
from metagmvae.pipelines.grouped_labels import number_groups
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ImageRecord, printable
from metagmvae.pipelines.sources.image_decoding import MODES, apply_preprocessing, image_header
from metagmvae.pipelines.sources.image_survey import SIZES
from metagmvae.pipelines.sources.source import MAX_SIDE, ImageSource, check_integer
from metagmvae.pipelines.sources.splits import SPLITS, SplitRequest, divide

Items = Sequence[Any] | np.ndarray
GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")
"""Modes of Pillow without colour."""


def open_images(
    images: Items,
    labels: Items | None = None,
    *,
    groups: Items | None = None,
    name: str = "images",
    size: int | None = None,
    channels: int | None = None,
    invert: bool = False,
    crop: bool = True,
    fractions: Sequence[float] | None = None,
    validation_classes: int | None = None,
    test_classes: int | None = None,
    seed: int = 0,
) -> ImageSource:
    """Images of a sequence: uint8, (channels, size, size). Each is read twice: here, and when it is written.

    Args:
        images: anything with a length and numbered items, such as a column of a data set of Hugging Face: arrays uint8
            (H, W), (H, W, C) or (C, H, W), images of Pillow, or image files (paths, or their content as bytes, also as
            `{"bytes": …}`).
        labels: class of each image, words or numbers; None: no classes, and all images are in `train`.
        groups: what keeps images together in one split, such as the patient: the images are divided, not the classes,
            which the splits share (`splits.divide_groups`); None: the classes are divided.
        name: of the dataset.
        size: side in pixels; None: the shorter side of the first image, from 28 to 84.
        channels: 1 (grey) or 3 (RGB); None: as the first image.
        invert: as all further options, see `image_folder.open_folder`.

    Raises:
        DataError: there are no images, one has another form or cannot be decoded, or an option is invalid.
    """
    request = SplitRequest(fractions, validation_classes, test_classes)
    request.check(labels is not None)
    if not hasattr(images, "__len__"):  # a stream of Hugging Face, for example
        raise DataError(f"images are one {type(images).__name__}, without a length; give a list of images")
    if isinstance(images, Mapping):
        parts = ", ".join(map(str, images))
        raise DataError(f"images are a {type(images).__name__} of {parts}; give the images of one, such as its column")
    if not len(images):
        raise DataError("there are no images; give at least one")
    if hasattr(images, "iloc"):  # a column of pandas, whose numbers may be those of a larger table
        images = list(images)
    classes = [""] * len(images) if labels is None else class_names(labels, len(images))
    side, depth = _look(_as_image(images[0], "image 0"), "image 0")
    size = min(max(side, SIZES[0]), SIZES[1]) if size is None else size
    channels = depth if channels is None else channels
    check_integer("size", size, 1, MAX_SIDE)
    if channels not in MODES:
        raise DataError(f"channels is {channels!r}; choose 1 (grey) or 3 (RGB)")
    preprocessing = Preprocessing.of_shape((channels, size, size), invert=invert)
    if not crop:
        preprocessing = preprocessing.model_copy(update={"crop": "none"})
    if groups is not None and labels is None:
        raise DataError("groups need classes; give labels, or omit groups")
    group_of = None if groups is None else class_names(groups, len(images), what="group")
    split_of, division = divide(name, ["train"] * len(classes), classes, group_of, request, seed, given=None)
    load = partial(load_item, images, preprocessing=preprocessing)
    pixels = hashlib.sha256()
    splits: dict[str, list[ImageRecord]] = {}
    for number, (label, group) in enumerate(zip(classes, group_of or [""] * len(classes), strict=True)):
        pixels.update(load(number).tobytes())
        record = ImageRecord(f"{number:08d}", label, partial(load, number), group=group)
        splits.setdefault(split_of[number], []).append(record)
    splits = {split: splits[split] for split in SPLITS if split in splits}
    report = {
        "images": {split: len(records) for split, records in splits.items()},
        "classes": {split: len({r.class_name for r in records} - {""}) for split, records in splits.items()},
    }
    keys = {split: [record.key for record in records] for split, records in splits.items()}
    content: dict[str, Any] = {"pixels": pixels.hexdigest(), "classes": classes, "splits": keys}
    content["preprocessing"] = preprocessing.model_dump(mode="json")
    if group_of is not None:
        content["groups"] = number_groups(group_of)
    shape = (channels, size, size)
    files = {"division": division}
    return ImageSource(name, shape, splits, sha256_json({"source": "images", **content}), report, preprocessing, files)


@dataclass(frozen=True)
class Columns:
    """Names of the arrays or columns of a file; None: found by their usual names."""

    classes: bool
    """False: the classes are not read."""
    image: str | None
    label: str | None
    groups: str | None


class ImageTable(NamedTuple):
    """What a file holds."""

    images: Items
    labels: Items | None
    groups: Items | None
    files: dict[str, Any]
    """Account of the files that were read."""


def images_opener(name: str, what: str, read: Callable[[str, Columns], ImageTable]) -> Callable[..., ImageSource]:
    """The function that opens images of some kind of file, with the options of `open_images`.

    Args:
        name: of the source.
        what: the kind of file, for the message if none is given.
        read: reads a file.
    """

    def open_file(
        source: str | None = None,
        *,
        image: str | None = None,
        label: str | None = None,
        groups: str | None = None,
        classes: bool = True,
        size: int | None = None,
        channels: int | None = None,
        invert: bool = False,
        crop: bool = True,
        fractions: Sequence[float] | None = None,
        validation_classes: int | None = None,
        test_classes: int | None = None,
        seed: int = 0,
    ) -> ImageSource:
        """Images of a file.

        Args:
            source: the file.
            image: array or column of the images; None: the one that can be it.
            label: that of the classes; None: the one with a usual name, if there is one.
            groups: that of what keeps images together, such as the patient; None: there is none.
            classes: False takes no classes.
            size: as all further options, see `open_images`.

        Raises:
            DataError: the file cannot be read, or lacks an array or a column; or as `open_images`.
        """
        if source is None:
            raise DataError(f"no {what} given; give one with --source")
        if groups is not None and not classes:
            raise DataError(f"--groups {printable(str(groups))} divides classes, and --unlabelled takes none; omit one")
        # Values of --option are those of JSON: a column may be named 1.
        names = (None if given is None else str(given) for given in (image, label, groups))
        table = read(source, Columns(classes, *names))
        try:
            opened = open_images(
                table.images,
                table.labels,
                groups=table.groups,
                name=name,
                size=size,
                channels=channels,
                invert=invert,
                crop=crop,
                fractions=fractions,
                validation_classes=validation_classes,
                test_classes=test_classes,
                seed=seed,
            )
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        return replace(opened, files=table.files | opened.files)

    return open_file


def load_item(images: Items, number: int, *, preprocessing: Preprocessing) -> np.ndarray:
    """Preprocess one image of a sequence: uint8, (channels, size, size)."""
    name = f"image {number}"
    return apply_preprocessing(_as_image(images[number], name), name, preprocessing)


def _as_image(item: Any, name: str) -> np.ndarray | Image.Image | bytes:
    """An array as uint8 (C, H, W); the content of a file; an image of Pillow as it is."""
    if isinstance(item, Mapping):  # of Hugging Face: an image that is not decoded, or a row
        content = item.get("bytes") or item.get("path")
        if content is None:
            columns = ", ".join(map(str, item))
            raise DataError(f"{name} is a row with {columns}; give columns: images=data[NAME], labels=data[NAME]")
        item = content
    if isinstance(item, bytes | Image.Image):
        return item
    if isinstance(item, str | os.PathLike):
        try:
            return Path(item).read_bytes()
        except OSError as error:
            raise DataError(f"{name}: {item} cannot be read ({error.strerror}); check the path") from error
    given = array = np.asarray(item)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[0] not in MODES and array.shape[2] in MODES:
        array = array.transpose(2, 0, 1)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[0] not in MODES or 0 in array.shape:
        layouts = "(H, W), (H, W, 3) or (3, H, W)"
        remedy = f"give uint8 from 0 to 255, {layouts}: scale the values, and choose 1 or 3 of several bands"
        raise DataError(f"{name} is {given.dtype} {given.shape}; {remedy}")
    return array


def _look(image: np.ndarray | Image.Image | bytes, name: str) -> tuple[int, int]:
    """Shorter side and channels of an image."""
    if isinstance(image, np.ndarray):
        return min(image.shape[1:]), len(image)
    if isinstance(image, bytes):
        (width, height), colour = image_header(image, name)
        return min(width, height), 3 if colour else 1
    return min(image.size), 1 if image.mode in GREY_MODES else 3


def class_names(labels: Items, count: int, items: str = "image", what: str = "label") -> list[str]:
    """The class (or group) of each item as text, from whole numbers or words of shape (n,) or (n, 1).

    Args:
        labels: of all items.
        count: number of items n.
        items: what an item is, for messages.
        what: `label` or `group`, for messages.

    Raises:
        DataError: the number, the shape or the type of the labels is another one, or a label is empty.
    """
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or len(array) != count:
        raise DataError(f"{what}s have shape {array.shape} for {count} {items}s; give one for each {items}")
    if array.dtype.kind not in "iuU" and not all(isinstance(label, str) for label in array):
        raise DataError(f"{what}s are {array.dtype}; give whole numbers or words")
    names = [str(label) for label in array.tolist()]
    if "" in names:
        raise DataError(f"{what} {names.index('')} is empty; give every {items} one, or no {what}s")
    return names
