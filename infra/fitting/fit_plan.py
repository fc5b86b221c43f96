"""What `metagmvae fit` has found in a folder of pictures, and what it has decided to do with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from metagmvae.pipelines.records import DataError, printable
from metagmvae.pipelines.sampling.group_draw import most_queries
from metagmvae.pipelines.sources.folder_layout import LabelRequest
from metagmvae.pipelines.sources.splits import EPISODE_IMAGES

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
    """Class folders, or classes of `labels`; 0: none, or their meaning is not used."""
    split_folders: bool
    """Whether the folders or `labels` give the splits."""
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
    """Numbers of classes that are held out; with `groups`, that validation and test have."""
    budget_s: float
    seed: int
    encoder: FrozenEncoder | None = None
    crop: bool = True
    """Whether the middle square of each image is cut out."""
    labels: str | None = None
    """Absolute path of the table of the classes; None: the folders are the classes."""
    labels_sha256: str | None = None
    groups: str | None = None
    """Column of `labels` with what keeps images together in one split, such as the patient."""
    group_division: str = ""
    """How the groups were divided into the splits."""
    table_note: str = ""
    """Sentence on a file among the pictures that may hold the classes."""

    @property
    def label_request(self) -> LabelRequest:
        """Where the classes stand."""
        return LabelRequest(not self.unlabelled, self.labels, self.groups)

    @property
    def label_words(self) -> list[str]:
        """Options of `prepare folder` that say where the classes stand, and how they are divided."""
        if self.unlabelled:
            return ["--unlabelled"]
        words = ["--labels", self.labels] if self.labels else []
        words += ["--groups", self.groups] if self.groups else []
        if self.groups or self.split_folders or not self.classes:
            return words
        numbers = (str(self.validation_classes), str(self.test_classes))
        return [*words, "--validation-classes", numbers[0], "--test-classes", numbers[1]]

    @property
    def found(self) -> list[str]:
        """Sentences on what was found."""
        low, median, high = self.sides
        sizes = f"{low} pixels" if low == high else f"{low} to {high} pixels, median {median}"
        colour = "with colour" if self.channels == 3 else "grey"
        kind = "drawings of strokes" if self.strokes else "photographs"
        if self.labels:
            classes = f"{self.classes:,} classes in {printable(Path(self.labels).name)}"
        elif self.split_folders:
            classes = f"{self.classes:,} classes in folders for the splits"
        else:
            classes = f"{self.classes:,} class folders" if self.classes else "no classes"
        polarity = f", {self.dark_on_bright:.0%} of them dark on a bright background" if self.strokes else ""
        return [
            f"{self.images:,} images, {colour}, {classes}; shorter sides: {sizes}",
            f"{kind}: {self.drawn:.0%} of a sample have thin strokes on an even background{polarity} (drawings: 80%)",
            *([self.table_note] if self.table_note else []),
        ]

    @property
    def will_do(self) -> list[str]:
        """Sentences on what is done."""
        kind = "grey" if self.data_channels == 1 else "RGB"
        inverted = ", inverted, so that strokes are bright" if self.invert else ""
        return [
            f"images of {self.size} x {self.size} pixels, {kind}{inverted}{'' if self.crop else ', not cropped'}",
            self.held_out,
            f"preset {self.preset}, as many steps as fit into {format_seconds(self.budget_s)}",
            *([f"comparison with the frozen encoder {self.encoder.name}"] if self.encoder else []),
        ]

    @property
    def held_out(self) -> str:
        """Sentence on what the model is evaluated on, and what that means."""
        views = "the model is evaluated on episodes of augmented views, in which every image is a class of its own"
        if self.groups:
            group = printable(self.groups)
            meaning = (
                f"the accuracy is that on images of another {group} than those of the training, and of the same "
                f"classes; no {group} has a labelled image and a query of one episode"
            )
            measured = meaning if self.test_classes > 1 else f"those for the test have one class, so {views}"
            return f"images of one {group} stay in one split ({self.group_division}): {measured}"
        if self.split_folders:
            return f"the splits are those of the {'table' if self.labels else 'folders'}"
        if self.test_classes:
            return (
                f"{self.validation_classes} classes are held out for validation and {self.test_classes} for test: "
                "their images are not trained on"
            )
        return f"no classes are held out; {views}"

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


def episode_sizes(classes: Sequence[Sequence[int]]) -> tuple[int, list[int], int]:
    """Return way, shots and queries per class for the classes of a split.

    5 ways, 1 and 5 shots and 15 queries if the classes have enough images, and fewer if not.

    Args:
        classes: images of each group of each class (`group_sizes`).
    """
    room = {shot: min(most_queries(sizes, shot) for sizes in classes) for shot in (1, 5)}
    shots = [1, 5] if room[5] >= EPISODE_IMAGES // 2 - 5 else [1]
    return min(5, len(classes)), shots, max(1, min(15, room[shots[-1]]))
