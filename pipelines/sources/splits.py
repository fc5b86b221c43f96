"""The splits: names of folders that stand for them, and the division of classes into them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from metagmvae.pipelines.grouped_labels import one_group_classes
from metagmvae.pipelines.records import DataError, printable
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sources.source import check_integer

SPLITS = ("train", "validation", "test")
NAMES = {
    "train": ("train", "training", "trainset", "metatrain"),
    "validation": ("validation", "val", "valid", "dev", "development", "validate", "valset", "metaval"),
    "test": ("test", "testing", "eval", "evaluation", "testset", "metatest"),
}
HINTS = {"pred": "test", "predict": "test", "prediction": "test", "predictions": "test", "holdout": "test"}
"""Further words that mention a split, but do not name one."""
SPLIT_OF_NAME = {name: split for split, names in NAMES.items() for name in names}
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def split_of(name: str) -> str | None:
    """The split that a name stands for; case, spaces, `-` and `_` are ignored: `Train`, `meta-test`, `test_set`."""
    return SPLIT_OF_NAME.get(re.sub(r"[\s_-]", "", name).casefold())


def split_hint(name: str) -> tuple[str, str] | None:
    """A split that a name mentions, and its other words: `seg_train` -> ("train", "seg").

    None if it mentions none or several.
    """
    words = [word.casefold() for word in WORDS.findall(name)]
    meaning = SPLIT_OF_NAME | HINTS
    mentioned = [word for word in words if word in meaning]
    if len(mentioned) != 1:
        return None
    return meaning[mentioned[0]], " ".join(word for word in words if word != mentioned[0])


SplitClass = tuple[str, str]
"""Split and name of a class; without classes the name is empty."""

EPISODE_IMAGES = 20
"""Images of a class in the usual episodes: 5 labelled ones and 15 queries."""
EPISODE_CLASSES = 5
"""Classes of the usual episodes; the default numbers of validation and test classes are at least that."""
LEAST_CLASSES = 20
"""With fewer classes, all are training classes by default."""
SHARE = 0.2
"""Default fraction of the classes, or of the groups, for validation, and for test."""


@dataclass(frozen=True)
class SplitRequest:
    """How the classes are divided: by `fractions`, or by numbers of validation and test classes."""

    fractions: Sequence[float] | None = None
    """Fractions of the classes for train, validation and test."""
    validation_classes: int | None = None
    test_classes: int | None = None
    """Numbers of classes; None: `default_held_out`."""

    def check(self, classes: bool) -> None:
        """Refuse values that fit no folder; `classes` is False if the folders are not classes.

        Raises:
            DataError: naming the option.
        """
        numbers = {"validation_classes": self.validation_classes, "test_classes": self.test_classes}
        for option, number in numbers.items():
            if number is None:
                continue
            check_integer(option, number, 0)
            if number == 1:
                raise DataError(f"{option} is 1, but an episode has at least 2 classes; give 0, 2 or more")
            if number and not classes:
                raise DataError(f"{option} is {number}, but the folders are no classes (--unlabelled); remove one")
            if self.fractions is not None:
                raise DataError(f"{option} and fractions both divide the classes; give one of them")
        fractions = self.fractions
        if fractions is None:
            return
        if len(fractions) != len(SPLITS) or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
            raise DataError(f"fractions is {tuple(fractions)}; give three for train, validation and test that sum to 1")
        if fractions[0] == 0 or not classes:
            raise DataError("fractions need classes on and a positive fraction for train; change them")

    @property
    def given(self) -> bool:
        """Whether the division was asked for."""
        return self.fractions is not None or bool(self.validation_classes) or bool(self.test_classes)


def default_held_out(sizes: Sequence[int]) -> int:
    """The default number of validation classes, and of test classes, from the numbers of images of all classes.

    A fifth of the classes, at least 5, from those that have enough images for 5-way 5-shot episodes with 15 queries; 0
    if there are fewer than 20 classes, or not enough of that size.
    """
    eligible = sum(size >= EPISODE_IMAGES for size in sizes)
    number = min(max(EPISODE_CLASSES, round(SHARE * len(sizes))), eligible // 2)
    return number if len(sizes) >= LEAST_CLASSES and number >= EPISODE_CLASSES else 0


def divide(
    source: str,
    splits: Sequence[str],
    classes: Sequence[str],
    groups: Sequence[str] | None,
    request: SplitRequest,
    seed: int,
    *,
    given: str | None,
) -> tuple[list[str], str]:
    """Split of each image or vector, and a sentence on how they were divided.

    Splits that the source has are kept. Else the classes are divided (`assign_splits`), or the groups
    (`divide_groups`), whose images then share classes in all splits.

    Args:
        source: name for error messages.
        splits: of each image, as the source has it.
        classes: of each image; empty without classes.
        groups: of each image, such as the patient; None: there are none.
        request: how they are divided.
        seed: of the draw.
        given: where the splits stand, for messages: `as the folders are named`; None: the source has no splits.

    Raises:
        DataError: the request does not fit, or a class (with groups: a group) is in two splits.
    """
    if given is not None:
        if groups is None:
            check_class_names(source, zip(splits, classes, strict=True))
        if request.given:
            raise DataError(f"{source}: already has splits, {given}; omit fractions and numbers of classes")
        found, division = list(splits), given
    elif groups is None:
        split_of, division = assign_splits(source, Counter(name for name in classes if name), request, seed)
        found = [split_of.get(name, "train") for name in classes]
    else:
        found, division = divide_groups(source, groups, classes, request, seed)
    if groups is not None:
        check_groups(source, groups, found)
        division += "; the splits share classes"
        if alone := one_group_classes(found, classes, groups):
            division += f"; episodes leave out classes of one group: {alone}"
    return found, division


def check_class_names(source: str, classes: Iterable[SplitClass]) -> None:
    """Refuse classes with the same name, also in different splits.

    Raises:
        DataError: naming both.
    """
    first: dict[str, SplitClass] = {}
    for split, name in sorted(set(classes)):
        # Names that a file system or a person may confuse are equal.
        plain = unicodedata.normalize("NFC", name).casefold()
        before = first.setdefault(plain, (split, name))
        if name and before != (split, name):
            both = f"{printable('/'.join(before))} and {printable(f'{split}/{name}')}"
            raise DataError(
                f"{source}: {both} are classes with the same name; rename or merge them, because the splits of "
                "few-shot learning have different classes (--join-splits joins the splits and divides the classes; "
                "with --groups the splits share classes)"
            )


def assign_splits(
    source: str, images_of: Mapping[str, int], request: SplitRequest, seed: int
) -> tuple[dict[str, str], str]:
    """Divide classes at random; return the split of each class, and a sentence on what was done.

    Numbers of classes are drawn from the classes that have at least 20 images; if these are too few, from the largest
    ones. Classes are left as they are if there are none.

    Args:
        source: name for error messages.
        images_of: number of images of each class.
        request: how they are divided.
        seed: of the draw.

    Raises:
        DataError: the request does not fit the classes.
    """
    classes = sorted(images_of)
    if request.fractions is not None:
        return _by_fractions(source, classes, request.fractions, seed), "by fractions of the classes"
    sizes = [images_of[name] for name in classes]
    default = default_held_out(sizes)
    given = (request.validation_classes, request.test_classes)
    counts = [default if number is None else number for number in given]
    if sum(counts) >= len(classes) and request.given:
        raise DataError(
            f"{source}: has {len(classes)} classes, which cannot give {counts[0]} for validation, {counts[1]} for test "
            "and one for training; lower the numbers"
        )
    if not sum(counts):
        return {}, _why_none(sizes, asked=None not in given)
    large = [name for name in classes if images_of[name] >= EPISODE_IMAGES]
    if len(large) < sum(counts):
        large = sorted(classes, key=lambda name: -images_of[name])[: sum(counts)]
    drawn = [large[row] for row in keyed_rng("classes", seed).permutation(len(large))]
    split_of = dict.fromkeys(classes, "train") | dict.fromkeys(drawn[: counts[0]], "validation")
    split_of |= dict.fromkeys(drawn[counts[0] : sum(counts)], "test")
    return split_of, f"{counts[0]} validation and {counts[1]} test classes of {len(classes)}, drawn with seed {seed}"


def divide_groups(
    source: str, group_of: Sequence[str], class_of: Sequence[str], request: SplitRequest, seed: int
) -> tuple[list[str], str]:
    """Divide images so that those of one group stay together; return the split of each image, and what was done.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011) of groups: each goes to the split that lacks most
    images of its rarest class. The groups with the rarest classes come first, so every split gets some if it can.

    Args:
        source: name for error messages.
        group_of: group of each image, such as the patient.
        class_of: class of each image.
        request: the fractions of the images for the splits; None: 0.6, 0.2 and 0.2.
        seed: of the order of the groups.

    Raises:
        DataError: numbers of classes are asked for, or there are too few groups.
    """
    if request.validation_classes is not None or request.test_classes is not None:
        raise DataError("groups divide the images, not the classes; give fractions, or omit the numbers of classes")
    fractions = request.fractions or (1 - 2 * SHARE, SHARE, SHARE)
    size_of_class = Counter(class_of)
    images: dict[str, Counter[str]] = {}
    for group, label in zip(group_of, class_of, strict=True):
        images.setdefault(group, Counter())[label] += 1
    rarest = {group: min(labels, key=lambda label: (size_of_class[label], label)) for group, labels in images.items()}
    drawn = [sorted(images)[row] for row in keyed_rng("groups", seed).permutation(len(images))]
    lacking = {
        split: Counter({label: fraction * count for label, count in size_of_class.items()})
        for split, fraction in zip(SPLITS, fractions, strict=True)
        if fraction
    }
    split_of_group: dict[str, str] = {}
    for group in sorted(drawn, key=lambda group: (size_of_class[rarest[group]], rarest[group])):
        split = max(lacking, key=lambda split: (lacking[split][rarest[group]], lacking[split].total()))
        split_of_group[group] = split
        lacking[split].subtract(images[group])
    if empty := [split for split in lacking if split not in split_of_group.values()]:
        raise DataError(
            f"{source}: has {len(images)} groups, which leave none for {empty[0]}; give more groups, or other fractions"
        )
    counts = Counter(split_of_group.values())
    numbers = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if counts[split])
    return [split_of_group[group] for group in group_of], f"{numbers} of {len(images):,} groups, drawn with seed {seed}"


def check_groups(source: str, group_of: Sequence[str], split_of_image: Sequence[str]) -> None:
    """Refuse a group in several splits.

    Raises:
        DataError: naming the first such group.
    """
    first: dict[str, str] = {}
    for group, split in zip(group_of, split_of_image, strict=True):
        if first.setdefault(group, split) != split:
            both = f"{first[group]} and {split}"
            raise DataError(f"{source}: group {printable(group)} is in {both}; give it one split")


def _why_none(sizes: Sequence[int], *, asked: bool) -> str:
    if asked:
        return "no validation and test classes, as requested"
    if not sizes:
        return "no validation and test classes, because the images have no classes"
    return (
        f"no validation and test classes: of {len(sizes)} classes, {sum(s >= EPISODE_IMAGES for s in sizes)} have at "
        f"least {EPISODE_IMAGES} images, and {LEAST_CLASSES} classes, {2 * EPISODE_CLASSES} of them of that size, are "
        "needed; --validation-classes and --test-classes give other numbers"
    )


def _by_fractions(source: str, classes: Sequence[str], fractions: Sequence[float], seed: int) -> dict[str, str]:
    held_out = [round(len(classes) * fraction) for fraction in fractions[1:]]
    counts = [len(classes) - sum(held_out), *held_out]
    if any((count > 0) != (fraction > 0) for count, fraction in zip(counts, fractions, strict=True)):
        raise DataError(f"{source}: fractions {tuple(fractions)} cannot divide {len(classes)} classes; change them")
    names = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    order = keyed_rng("folder", seed).permutation(len(classes))
    return {classes[row]: split for row, split in zip(order, names, strict=True)}
