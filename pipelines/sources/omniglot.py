"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1,623 characters of 50 alphabets with 20 drawings each.

There are two splits. `1200-100-323` has the numbers of characters of the paper, whose selection is not published; here
it is a seeded random selection. `vinyals` is the split of Vinyals et al. 2016 by alphabets. Characters rotated by
multiples of 90 degrees are separate classes, in the same split as the original.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from metagmvae.pipelines.archives.reader import Entry, read_entry
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ImageRecord, first_few
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing
from metagmvae.pipelines.sources.image_files import files_report
from metagmvae.pipelines.sources.omniglot_layout import Character, find_drawings
from metagmvae.pipelines.sources.source import MAX_SIDE, ImageSource, check_integer, source_fingerprint

CHARACTERS = {"images_background": 964, "images_evaluation": 659}
DRAWINGS = 20
SIZES = {"train": 1200, "validation": 100, "test": 323}
"""Numbers of characters of the split `1200-100-323`."""
SPLIT_SEED = 0
VINYALS_DEVELOPMENT = 1200
"""Number of characters of train and validation together: the first ones, sorted by archive, alphabet, character."""
VINYALS_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
SPLITS = ("1200-100-323", "vinyals")
CACHED_SIDE = 64
"""Largest side for which decoded drawings are cached in memory: 32,460 drawings, 25 MB at 28 x 28."""


def open_omniglot(
    source: str | None = None, *, split: str = "1200-100-323", size: int = 28, rotations: int = 4
) -> ImageSource:
    """Read Omniglot: uint8, (1, size, size), strokes 255 on background 0; classes `archive/alphabet/character01@090`.

    Args:
        source: folder with `images_background` and `images_evaluation`, each an archive or a folder; or a folder or an
            archive with the alphabets of both. None downloads them into the user's cache folder.
        split: `1200-100-323` or `vinyals`.
        size: side in pixels.
        rotations: 4 (counter-clockwise rotations by 90 degrees are separate classes) or 1.

    Raises:
        DataError: an option is invalid, the download fails, or drawings are missing.
    """
    if split not in SPLITS:
        raise DataError(f"omniglot has no split {split!r}; choose one of {', '.join(SPLITS)}")
    if rotations not in (1, 4):
        raise DataError(f"rotations is {rotations}; choose 4 (rotations as classes) or 1")
    check_integer("size", size, 1, MAX_SIDE)
    found = find_drawings(Path(source) if source is not None else download_omniglot())
    drawings = found.of_character
    _check_complete(found.root, drawings)
    characters_of = _vinyals(sorted(drawings)) if split == "vinyals" else _random_split(sorted(drawings))
    splits = {
        name: [record for c in characters for record in _records(c, drawings[c], size, rotations)]
        for name, characters in characters_of.items()
    }
    options = {"split": split, "size": size, "rotations": rotations}
    content = [
        (character[0], Entry("/".join([*character[1:], entry.name.rsplit("/", 1)[-1]]), entry.crc, entry.size))
        for character in sorted(drawings)
        for _, entry in drawings[character]
    ]
    report: dict[str, Any] = {
        "characters": {name: len(characters) for name, characters in characters_of.items()},
        "drawings": len(content),
        "options": options,
    }
    fingerprint = source_fingerprint("omniglot", content, options)
    files = files_report([entry.name for part in drawings.values() for _, entry in part], found.left_out)
    return ImageSource("omniglot", (1, size, size), splits, fingerprint, report, _preprocessing(size), files)


def download_omniglot() -> Path:
    """Download both archives with torchvision into the user's cache folder, if they are not there; return the folder.

    Raises:
        DataError: the download fails, or the disk is full.
    """
    from torchvision.datasets import Omniglot

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metagmvae"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # torchvision prints to standard output, which is reserved for JSON.
        with contextlib.redirect_stdout(sys.stderr):
            for background in (True, False):
                Omniglot(str(cache), background=background, download=True)
    except (OSError, RuntimeError, HTTPException, BadZipFile) as error:
        raise DataError(
            f"Omniglot could not be downloaded to {cache} ({error}); give a folder with images_background.zip and "
            "images_evaluation.zip with --source"
        ) from error
    return cache / Omniglot.folder


def _check_complete(root: Path, drawings: dict[Character, list[tuple[str, Entry]]]) -> None:
    """Refuse missing drawings: the splits depend on positions in the sorted list, so one would change all of them."""
    for archive, expected in CHARACTERS.items():
        characters = sorted(character for character in drawings if character[0] == archive)
        wrong = [f"{'/'.join(c)} has {len(drawings[c])}" for c in characters if len(drawings[c]) != DRAWINGS]
        wrong += [f"{'/'.join(c)} is missing" for c in _missing(characters)]
        if wrong or len(characters) != expected:
            detail = f": {first_few(wrong)}" if wrong else ""
            raise DataError(
                f"{root}: {archive} has {len(characters)} of {expected} characters with {DRAWINGS} drawings each"
                f"{detail}; download the archive again"
            )


def _missing(characters: list[Character]) -> list[Character]:
    """Missing numbers below the highest number of an alphabet; characters are numbered from 01."""
    numbers: dict[tuple[str, str], set[str]] = {}
    for archive, alphabet, character in characters:
        numbers.setdefault((archive, alphabet), set()).add(character)
    return [
        (*alphabet, name)
        for alphabet, names in numbers.items()
        for name in (f"character{number:02d}" for number in range(1, int(max(names)[-2:]) + 1))
        if name not in names
    ]


def _random_split(characters: list[Character]) -> dict[str, list[Character]]:
    """Seeded random selection from the list sorted by alphabet and character."""
    ordered = sorted(characters, key=lambda character: character[1:])
    order = keyed_rng("omniglot", SPLIT_SEED).permutation(len(ordered))
    splits, first = {}, 0
    for split, count in SIZES.items():
        splits[split] = sorted(ordered[row] for row in order[first : first + count])
        first += count
    return splits


def _vinyals(characters: list[Character]) -> dict[str, list[Character]]:
    development, test = characters[:VINYALS_DEVELOPMENT], characters[VINYALS_DEVELOPMENT:]
    held_out = {("images_background", alphabet) for alphabet in VINYALS_VALIDATION}
    return {
        "train": [character for character in development if character[:2] not in held_out],
        "validation": [character for character in development if character[:2] in held_out],
        "test": test,
    }


def _records(
    character: Character, drawings: list[tuple[str, Entry]], size: int, rotations: int
) -> Iterator[ImageRecord]:
    name = "/".join(character)
    for turns in range(rotations):
        variant = f"@{90 * turns:03d}"
        for part, entry in drawings:
            key = f"{name}/{entry.name.rsplit('/', 1)[-1]}{variant}"
            yield ImageRecord(key, name + variant, partial(load_drawing, part, entry.name, size, turns))


def _preprocessing(size: int) -> Preprocessing:
    """The drawings are black on white; the dataset has bright strokes on a dark background."""
    return Preprocessing.of_shape((1, size, size), invert=True)


def load_drawing(part: str, name: str, size: int, turns: int) -> np.ndarray:
    """One drawing, rotated counter-clockwise by `turns` times 90 degrees: uint8, (1, size, size)."""
    decode = _decode_once if size <= CACHED_SIDE else _decode
    return np.rot90(decode(part, name, size), turns, axes=(1, 2))


def _decode(part: str, name: str, size: int) -> np.ndarray:
    pixels = apply_preprocessing(read_entry(part, name), f"{part}: {name}", _preprocessing(size))
    pixels.flags.writeable = False  # shared between the rotations
    return pixels


_decode_once = lru_cache(maxsize=sum(CHARACTERS.values()) * DRAWINGS)(_decode)
"""Cached, because the rows are stored in random order and the rotations of a drawing are far apart."""
