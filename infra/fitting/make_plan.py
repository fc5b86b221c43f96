"""Looks at a folder of pictures for `metagmvae fit`, and decides what is done with them; nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from metagmvae.infra.fitting.fit_plan import FitPlan, FrozenEncoder
from metagmvae.pipelines.files import sha256_file
from metagmvae.pipelines.records import DataError, printable
from metagmvae.pipelines.sources.folder_layout import FolderImage, LabelRequest, divide_images, read_layout
from metagmvae.pipelines.sources.image_files import list_images, require_images, table_note
from metagmvae.pipelines.sources.image_survey import ImageSurvey, survey_images
from metagmvae.pipelines.sources.source import source_fingerprint
from metagmvae.pipelines.sources.splits import SplitRequest, default_held_out
from metagmvae.training.device.default import default_device

LEAST_IMAGES = 32
"""With fewer training images nothing is trained."""
LEAST_CLASSES = 6
"""With fewer classes all of them are needed for training, and none is held out."""


def make_plan(
    pictures: Path,
    labelled: Path | None,
    budget_s: float,
    seed: int,
    *,
    unlabelled: bool,
    encoder: FrozenEncoder | None = None,
    crop: bool = True,
    labels: Path | None = None,
    groups: str | None = None,
) -> FitPlan:
    """Look at the pictures and decide; nothing is written.

    Args:
        pictures: folder or archive.
        labelled: folder or archive with class folders, or None.
        budget_s: time for everything, in seconds.
        seed: of the division of the classes and of the training.
        unlabelled: ignore the folders of the pictures.
        encoder: to compare with.
        crop: cut out the middle square of each image.
        labels: table with the classes of the pictures (`label_file.read_labels`); None: the folders are the classes.
        groups: column of the table with what keeps images together in one split.

    Raises:
        DataError: there are too few images, a folder or a table cannot be read as a data set, or there are no classes
            to compare the encoder on.
    """
    request = LabelRequest(not unlabelled, str(labels.absolute()) if labels else None, groups)
    request.check()
    root = _existing(pictures, "PICTURES")
    listing = list_images(root)
    require_images(root, listing)
    images = read_layout(root, listing.entries, request)
    if len(images) < LEAST_IMAGES:
        raise DataError(
            f"{pictures}: has {len(images)} images{' with a class' if labels else ''}, but at least {LEAST_IMAGES} are "
            "needed to train a model; add images"
        )
    in_splits, division = {image.split for image in images} != {"train"}, ""
    if groups is not None:
        images, division = divide_images(root, images, request, SplitRequest(), seed)
    sizes = class_sizes(images)
    if in_splits or groups is not None:
        check_held_out(request.labels or root, sizes, "" if in_splits else ", or try another --seed")
    if groups is not None:
        check_held_out_groups(request.labels or root, images, groups)
    survey = survey_images(root, [image.file.name for image in images])
    if groups is not None:
        held_out = (sum(split == "validation" for split, _ in sizes), sum(split == "test" for split, _ in sizes))
    else:
        held_out = (0, 0) if in_splits else held_out_classes(list(sizes.values()))
    test_classes = held_out[1] or sum(split == "test" for split, _ in sizes)
    if encoder is not None and labelled is None and test_classes < 2:
        raise DataError(
            f"--encoder {encoder.name}: is compared on classes that are not trained on, and none can be held out here; "
            "give more class folders, or labelled pictures with --labelled DIR"
        )
    return FitPlan(
        pictures=root,
        content=_content(images),
        labelled=str(labelled.absolute()) if labelled else None,
        labelled_content=check_labelled(labelled) if labelled else None,
        images=len(images),
        classes=len({name for _, name in sizes}),
        split_folders=in_splits,
        channels=survey.channels,
        sides=list(survey.sides),
        drawn=survey.drawn,
        dark_on_bright=survey.dark_on_bright,
        strokes=survey.strokes,
        size=survey.size,
        invert=survey.inverted,
        preset=_preset(survey),
        unlabelled=unlabelled,
        validation_classes=held_out[0],
        test_classes=held_out[1],
        budget_s=budget_s,
        seed=seed,
        encoder=encoder,
        crop=crop,
        labels=request.labels,
        labels_sha256=sha256_file(labels) if labels else None,
        groups=groups,
        group_division=division,
        table_note="" if labels else table_note(listing),
    )


def _existing(path: Path, what: str) -> str:
    if not path.exists():
        raise DataError(f"{what} {path}: no such folder or archive; check the path")
    return str(path.absolute())


def _preset(survey: ImageSurvey) -> str:
    if survey.strokes:
        return "strokes-cpu"  # 28 x 28 pixels: as good on a GPU
    return "photos-gpu" if default_device().type == "cuda" else "photos-cpu"


def class_sizes(images: Sequence[FolderImage]) -> Counter[tuple[str, str]]:
    """Return the number of images of each split and class; images without a class are not counted."""
    return Counter((image.split, image.class_name) for image in images if image.class_name)


def check_held_out(source: str, sizes: Mapping[tuple[str, str], int], further: str) -> None:
    """Refuse a division whose held-out classes are too small for an episode.

    Args:
        source: name for error messages.
        sizes: number of images of each split and class.
        further: another remedy.

    Raises:
        DataError: a class of validation or test has one image.
    """
    classes_of = Counter(split for split, _ in sizes)
    for (split, name), count in sorted(sizes.items()):
        if split != "train" and classes_of[split] > 1 and count < 2:
            raise DataError(
                f"{source}: class {printable(name)} has 1 image in {split}, but an episode needs 2 of each class, one "
                f"with a label and a query; add images of it, or leave this class out{further}"
            )


def check_held_out_groups(source: str, images: Sequence[FolderImage], column: str) -> None:
    """Refuse a division in which no episode has labelled images and queries of different groups.

    Args:
        source: name for error messages.
        images: with their splits.
        column: name of the groups.

    Raises:
        DataError: validation or test has several classes, but fewer than two with images of two groups.
    """
    for split in ("validation", "test"):
        groups_of: dict[str, set[str]] = {}
        for image in images:
            if image.split == split:
                groups_of.setdefault(image.class_name, set()).add(image.group)
        enough = sum(len(groups) > 1 for groups in groups_of.values())
        if len(groups_of) > 1 and enough < 2:
            group = printable(column)
            raise DataError(
                f"{source}: {enough} of {len(groups_of)} classes in {split} have images of two values of {group}, but "
                f"an episode needs two classes with labelled images and queries of different {group}; give images of "
                f"more, for a fifth of all must be enough for {split}, or divide them yourself in a column split"
            )


def held_out_classes(sizes: Sequence[int]) -> tuple[int, int]:
    """Return the numbers of validation and test classes, from the numbers of images of all classes.

    Those of `prepare folder`; if it would hold out none, up to a quarter of the classes each, 2 to 5, as long as the
    training keeps half of the images at least. (0, 0): too few classes, or too few images of a class.
    """
    number = default_held_out(sizes)
    if number:
        return number, number
    if len(sizes) < LEAST_CLASSES:
        return 0, 0
    number = max(2, min(5, len(sizes) // 4))
    # `prepare` draws from the classes with enough images for episodes, or takes the largest ones.
    largest = sorted(sizes, reverse=True)[: 2 * number]
    trained = sum(sizes) - sum(largest)
    if largest[-1] < 2 or trained < LEAST_IMAGES:
        return 0, 0
    return number, number


def check_labelled(labelled: Path) -> str:
    """Check that a folder holds class folders with enough images for an episode; return its fingerprint.

    Raises:
        DataError: it does not.
    """
    root = _existing(labelled, "--labelled")
    listing = list_images(root)
    require_images(root, listing)
    images = read_layout(root, listing.entries, LabelRequest())
    classes = class_sizes(images)
    if {image.split for image in images} != {"train"} or len(classes) < 2:
        raise DataError(f"--labelled {labelled}: needs two or more class folders, LABELLED/CLASS/*.png")
    smallest = min(classes, key=lambda split_class: classes[split_class])
    if classes[smallest] < 2:
        raise DataError(f"--labelled {labelled}: class {printable(smallest[1])} has 1 image; give 2 or more")
    return _content(images)


def _content(images: Sequence[FolderImage]) -> str:
    return source_fingerprint("folder", (("", image.file) for image in images), {})
