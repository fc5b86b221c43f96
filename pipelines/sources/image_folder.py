"""A folder or an archive of images, with or without class folders.

The meaning of the folders follows from the tree (`folder_layout`); a tree that can be read in two ways is refused:

- all images in one folder: no classes, and all images are in `train`;
- images in several folders: each folder is a class, named by its path; some classes are drawn at random for validation
  and test (`splits`);
- folders `train`, `validation` and `test`, or other usual names of the splits (`splits`) and nothing beside them:
  the splits, each interpreted as above;
- with a table of labels (`label_file`): its classes and splits, whatever the folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np

from metagmvae.pipelines.archives.entries import Entry, LeftOut
from metagmvae.pipelines.archives.reader import read_entry
from metagmvae.pipelines.files import sha256_json
from metagmvae.pipelines.grouped_labels import number_groups
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ImageRecord, MapTasks
from metagmvae.pipelines.sources.folder_layout import LabelRequest, divide_images, read_layout
from metagmvae.pipelines.sources.image_decoding import MODES, apply_preprocessing
from metagmvae.pipelines.sources.image_files import (
    KeptFile,
    duplicates_note,
    files_report,
    list_images,
    require_images,
    table_note,
)
from metagmvae.pipelines.sources.image_scan import scan_images
from metagmvae.pipelines.sources.image_survey import survey_images
from metagmvae.pipelines.sources.source import MAX_SIDE, ImageSource, check_integer, source_fingerprint
from metagmvae.pipelines.sources.splits import SPLITS, SplitRequest

NOT_INVERTED = (
    "these are drawings with dark strokes on a bright background; --invert makes the strokes bright, which the random "
    "views of strokes need"
)


def open_folder(
    source: str | None = None,
    *,
    size: int | None = None,
    channels: int | None = None,
    invert: bool = False,
    crop: bool = True,
    classes: bool = True,
    labels: str | None = None,
    groups: str | None = None,
    join_splits: bool = False,
    fractions: Sequence[float] | None = None,
    validation_classes: int | None = None,
    test_classes: int | None = None,
    seed: int = 0,
    max_broken: float = 0.01,
    map_tasks: MapTasks | None = None,
) -> ImageSource:
    """Read the images of a folder or archive: uint8, (channels, size, size), cropped to centred squares by default.

    Every image is decoded once to find broken ones. They are skipped and listed in `report["skipped"]`. `files`
    counts the files that are left out and the images of a single value.

    Args:
        source: folder or archive.
        size: side in pixels; None: 28 for drawings, else the median shorter side of the images, from 28 to 84.
        channels: 1 (grey) or 3 (RGB); None: 3 if an image has colour, else 1.
        invert: replace each value by 255 - value, for dark strokes on a bright background.
        crop: cut out the largest centred square; False: resize the whole image to the square.
        classes: False uses all images as unlabelled training images and ignores their folders.
        labels: CSV file with the class of each image, as `label_file.read_labels` reads it; the folders are then no
            classes, and images without a row are left out. None: the folders are the classes.
        groups: column of `labels` whose value, such as the patient, keeps images together. The images are then divided
            into the splits, not the classes (`splits.divide_groups`); a column `split` is kept.
        join_splits: join folders of the splits that hold the same classes, as for supervised learning; the classes are
            then divided as without such folders.
        fractions: fractions of the classes (with `groups`, of the images) for train, validation and test.
        validation_classes: number of classes for validation; None: `splits.default_held_out`.
        test_classes: number of classes for test; None: `splits.default_held_out`.
        seed: seed of the assignment of classes or groups to splits.
        max_broken: largest fraction of images that may be skipped.
        map_tasks: decodes images in parallel, for example as Ray tasks; None decodes them in this process.

    Raises:
        DataError: an option is invalid, there are no images, too many are broken, two classes have the same name, a
            class is in two splits, or the tree is ambiguous.
    """
    if source is None:
        raise DataError("no folder of images given; give a folder or an archive with --source")
    label_request = LabelRequest(classes, labels, groups, join_splits)
    label_request.check()
    request = SplitRequest(fractions, validation_classes, test_classes)
    request.check(classes)
    _check_options(size, channels, seed, max_broken)
    listing = list_images(source)
    require_images(source, listing)
    images = read_layout(source, listing.entries, label_request)
    images, division = divide_images(source, images, label_request, request, seed)
    unlisted: list[LeftOut] = []
    if labels is not None:
        listed = {image.key for image in images}
        reason = f"not in {PurePath(labels).name}"
        unlisted = [LeftOut(entry.name, reason) for entry in listing.entries if entry.name not in listed]
    names = [image.file.name for image in images]
    notes = {}
    if labels is None and (note := table_note(listing)):
        notes["labels"] = note
    if size is None or channels is None:
        survey = survey_images(str(source), names)
        size, channels = size or survey.size, channels or survey.channels
        if survey.inverted and not invert:
            notes["note"] = NOT_INVERTED
    preprocessing = Preprocessing.of_shape((channels, size, size), invert=invert)
    if not crop:
        preprocessing = preprocessing.model_copy(update={"crop": "none"})
    scan = scan_images(source, names, preprocessing, max_broken, map_tasks)
    load = partial(load_image, str(source), preprocessing=scan.preprocessing)
    intact = [image for image in images if image.file.name not in scan.broken]
    splits: dict[str, list[ImageRecord]] = {}
    kept: list[KeptFile] = []
    for image in intact:
        read = partial(read_entry, str(source), image.file.name)
        record = ImageRecord(image.key, image.class_name, partial(load, image.file.name), read, image.group)
        splits.setdefault(image.split, []).append(record)
        kept.append(KeptFile(Entry(image.key, image.file.crc, image.file.size), image.class_name, image.split, read))
    splits = {split: splits[split] for split in SPLITS if split in splits}
    options: dict[str, Any] = {"size": size, "channels": channels, "invert": invert, "classes": classes}
    # Only where they are used: the fingerprints of other datasets stay.
    if not crop:
        options["crop"] = "none"
    if labels is not None:
        options["labels"] = sha256_json({image.key: image.class_name for image in images})
    if groups is not None:
        numbers = number_groups([image.group for image in images])
        options["group_of"] = sha256_json(dict(zip((image.key for image in images), numbers, strict=True)))
    report: dict[str, Any] = {
        "images": {split: len(records) for split, records in splits.items()},
        "classes": {split: len({r.class_name for r in records} - {""}) for split, records in splits.items()},
        "skipped": [{"name": name, "reason": reason} for name, reason in scan.broken.items()],
        "options": options
        | ({} if groups is None else {"groups": groups})
        | {"fractions": fractions and list(fractions), "seed": seed, "max_broken": max_broken},
    }
    if scan.preprocessing != preprocessing:
        options["sixteen_bit_white"] = scan.preprocessing.sixteen_bit_white
    fingerprint = source_fingerprint("folder", [(file.split, file.entry) for file in kept], options)
    left_out = [*listing.left_out, *unlisted, *(LeftOut(name, "broken") for name in scan.broken)]
    files = files_report([image.file.name for image in intact], left_out, listing.folders) | scan.report
    files |= duplicates_note(kept) | {"division": division, **notes}
    return ImageSource("folder", (channels, size, size), splits, fingerprint, report, scan.preprocessing, files)


def load_image(root: str, name: str, *, preprocessing: Preprocessing) -> np.ndarray:
    """Decode one file of a folder or archive: uint8, (channels, size, size)."""
    return apply_preprocessing(read_entry(root, name), f"{root}: {name}", preprocessing)


def _check_options(size: int | None, channels: int | None, seed: int, max_broken: float) -> None:
    if size is not None:
        check_integer("size", size, 1, MAX_SIDE)
    check_integer("seed", seed, 0)
    if channels is not None and channels not in MODES:
        raise DataError(f"channels is {channels!r}; choose 1 (grey) or 3 (RGB)")
    if not 0 <= max_broken <= 1:
        raise DataError(f"max_broken is {max_broken}; give a fraction between 0 and 1")
