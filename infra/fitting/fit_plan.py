"""What `metagmvae fit` finds in a folder of pictures, and what it decides to do with them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from metagmvae.pipelines.archives.entries import Entry
from metagmvae.pipelines.records import DataError, printable
from metagmvae.pipelines.sources.folder_layout import class_names, parse_paths
from metagmvae.pipelines.sources.image_files import list_images, require_images
from metagmvae.pipelines.sources.image_survey import ImageSurvey, survey_images
from metagmvae.pipelines.sources.source import source_fingerprint
from metagmvae.pipelines.sources.splits import EPISODE_IMAGES, default_held_out
from metagmvae.training.device.default import default_device

LEAST_IMAGES = 32
"""With fewer training images nothing is trained."""
LEAST_CLASSES = 6
"""With fewer classes all of them are needed for training, and none is held out."""
UNITS = {"s": 1, "m": 60, "h": 3600}
MAX_BUDGET_S = 7 * 24 * 3600


class FrozenEncoder(BaseModel):
    """The published encoder that the trained model is compared with."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    name: str
    weights: str | None
    """Absolute path of a file; None: the published ones."""
    weights_sha256: str | None
    image_size: int | None
    """Side to which images are resized; None: its published input size."""


class FitPlan(BaseModel):
    """What was found and decided. Stored in the output folder, so that the same command continues."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    version: Literal[1] = 1
    pictures: str
    """Absolute path."""
    content: str
    """Fingerprint of the picture files."""
    labelled: str | None
    labelled_content: str | None
    images: int
    classes: int
    """Class folders; 0: none, or their meaning is not used."""
    split_folders: bool
    """Whether the pictures are in folders for train, validation and test."""
    channels: int
    sides: list[int]
    """Smallest, median and largest shorter side of a sample, in pixels."""
    drawn: float
    """Fraction of a sample that are drawings of strokes."""
    dark_on_bright: float
    strokes: bool
    size: int
    invert: bool
    preset: str
    unlabelled: bool
    """Whether folders are ignored."""
    validation_classes: int
    test_classes: int
    budget_s: float
    seed: int
    encoder: FrozenEncoder | None = None
    crop: bool = True
    """Whether the middle square of each image is cut out."""

    @property
    def found(self) -> list[str]:
        """Sentences on what was found."""
        low, median, high = self.sides
        sizes = f"{low} pixels" if low == high else f"{low} to {high} pixels, median {median}"
        colour = "with colour" if self.channels == 3 else "grey"
        kind = "drawings of strokes" if self.strokes else "photographs"
        if self.split_folders:
            classes = f"{self.classes:,} classes in folders for the splits"
        else:
            classes = f"{self.classes:,} class folders" if self.classes else "no classes"
        polarity = f", {self.dark_on_bright:.0%} of them dark on a bright background" if self.strokes else ""
        return [
            f"{self.images:,} images, {colour}, {classes}; shorter sides: {sizes}",
            f"{kind}: {self.drawn:.0%} of a sample have thin strokes on an even background{polarity} (drawings: 80%)",
        ]

    @property
    def will_do(self) -> list[str]:
        """Sentences on what is done."""
        kind = "grey" if self.data_channels == 1 else "RGB"
        inverted = ", inverted, so that strokes are bright" if self.invert else ""
        if self.split_folders:
            held_out = "the splits are those of the folders"
        elif self.test_classes:
            held_out = (
                f"{self.validation_classes} classes are held out for validation and {self.test_classes} for test: "
                "their images are not trained on"
            )
        else:
            held_out = (
                "no classes are held out; the model is evaluated on episodes of augmented views instead, in which "
                "every image is a class of its own"
            )
        return [
            f"images of {self.size} x {self.size} pixels, {kind}{inverted}{'' if self.crop else ', not cropped'}",
            held_out,
            f"preset {self.preset}, as many steps as fit into {format_seconds(self.budget_s)}",
            *([f"comparison with the frozen encoder {self.encoder.name}"] if self.encoder else []),
        ]

    @property
    def preprocessing_words(self) -> list[str]:
        """Options of `prepare folder` that say how images are preprocessed."""
        flags = ["--invert"] * self.invert + ["--no-crop"] * (not self.crop)
        return ["--size", str(self.size), "--channels", str(self.data_channels), *flags]

    @property
    def data_channels(self) -> int:
        """Channels of the data set: the views of strokes need grey images."""
        return 1 if self.strokes else self.channels


def parse_budget(text: str) -> float:
    """Return the seconds of `90s`, `20m`, `1h` or `1h30m`.

    Raises:
        DataError: another form, or a time that is not positive or above a week.
    """
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower())
    if not text.strip() or parts is None:
        raise DataError(f"--budget {printable(text)}: write a time as 90s, 20m or 1h30m")
    seconds = sum(float(number) * UNITS[unit] for number, unit in zip(parts.groups("0"), "hms", strict=True))
    if not 1 <= seconds <= MAX_BUDGET_S:
        raise DataError(f"--budget {printable(text)}: give a time from 1 second to 7 days")
    return seconds


def format_seconds(seconds: float) -> str:
    """Format a time: `45 s`, `20 min`, `1 h 30 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def make_plan(
    pictures: Path,
    labelled: Path | None,
    budget_s: float,
    seed: int,
    *,
    unlabelled: bool,
    encoder: FrozenEncoder | None = None,
    crop: bool = True,
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

    Raises:
        DataError: there are too few images, a folder cannot be read as a data set, or there are no classes to compare
            the encoder on.
    """
    root = _existing(pictures, "PICTURES")
    listing = list_images(root)
    require_images(root, listing)
    sizes, in_splits = _class_sizes(root, listing.entries, unlabelled)
    survey = survey_images(root, [entry.name for entry in listing.entries])
    held_out = (0, 0) if in_splits else held_out_classes(list(sizes.values()))
    if len(listing.entries) < LEAST_IMAGES:
        raise DataError(
            f"{pictures}: has {len(listing.entries)} images, but at least {LEAST_IMAGES} are needed to train a model; "
            "add images"
        )
    test_classes = sum(split == "test" for split, _ in sizes) if in_splits else held_out[1]
    if encoder is not None and labelled is None and test_classes < 2:
        raise DataError(
            f"--encoder {encoder.name}: is compared on classes that are not trained on, and none can be held out here; "
            "give more class folders, or labelled pictures with --labelled DIR"
        )
    return FitPlan(
        pictures=root,
        content=_content(listing.entries),
        labelled=str(labelled.absolute()) if labelled else None,
        labelled_content=check_labelled(labelled) if labelled else None,
        images=len(listing.entries),
        classes=len(sizes),
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
    )


def _existing(path: Path, what: str) -> str:
    if not path.exists():
        raise DataError(f"{what} {path}: no such folder or archive; check the path")
    return str(path.absolute())


def _preset(survey: ImageSurvey) -> str:
    if survey.strokes:
        return "strokes-cpu"  # 28 x 28 pixels: as good on a GPU
    return "photos-gpu" if default_device().type == "cuda" else "photos-cpu"


def _class_sizes(root: str, entries: Sequence[Entry], unlabelled: bool) -> tuple[dict[tuple[str, str], int], bool]:
    """Return the number of images of each class, and whether the folders are those of the splits."""
    if unlabelled:
        return {}, False
    images = parse_paths(root, entries, classes=True)
    names = class_names(root, images)
    counts = Counter((image.split, image.folder) for image in images)
    in_splits = {image.split for image in images} != {"train"}
    return {folder: count for folder, count in counts.items() if names[folder]}, in_splits


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
    images = parse_paths(root, listing.entries, classes=True)
    names = class_names(root, images)
    counts = Counter((image.split, image.folder) for image in images)
    classes = {folder: count for folder, count in counts.items() if names[folder]}
    if {image.split for image in images} != {"train"} or len(classes) < 2:
        raise DataError(f"--labelled {labelled}: needs two or more class folders, LABELLED/CLASS/*.png")
    smallest = min(classes, key=lambda folder: classes[folder])
    if classes[smallest] < 2:
        raise DataError(f"--labelled {labelled}: class {printable(names[smallest])} has 1 image; give 2 or more")
    return _content(listing.entries)


def _content(entries: Sequence[Entry]) -> str:
    return source_fingerprint("folder", (("", entry) for entry in entries), {})


def episode_sizes(class_sizes: Sequence[int]) -> tuple[int, list[int], int]:
    """Return way, shots and queries per class for the classes of a split.

    5 ways, 1 and 5 shots and 15 queries if the classes have enough images, and fewer if not.
    """
    smallest = min(class_sizes)
    shots = [1, 5] if smallest >= EPISODE_IMAGES // 2 else [1]
    return min(5, len(class_sizes)), shots, max(1, min(15, smallest - shots[-1]))
