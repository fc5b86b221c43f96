"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1,623 characters of 50 alphabets, 20 drawings each.

Two splits. `1200-100-323` has the sizes that the paper states; which characters is not published, so ours is a
seeded draw over the sorted names. `vinyals` is the split of Vinyals et al. 2016, by alphabets. Rotations
by quarter turns count as further classes and stay in the split of their character.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from metagmvae.pipelines.archives.reader import Entry, list_entries, read_entry
from metagmvae.pipelines.records import DataError, ImageRecord
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sources.image_decoding import decode_image
from metagmvae.pipelines.sources.source import Source, check_integer, source_fingerprint

CHARACTERS = {"images_background": 964, "images_evaluation": 659}
DRAWINGS = 20
SIZES = {"train": 1200, "validation": 100, "test": 323}
"""Characters by part of the split `1200-100-323`."""
SPLIT_SEED = 0
VINYALS_DEVELOPMENT = 1200
"""Characters of train and validation together, first in the order of archive, alphabet, character."""
VINYALS_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
SPLITS = ("1200-100-323", "vinyals")
CHARACTER_NAME = re.compile(r"character\d\d")
CACHED_SIDE = 64
"""Largest side of which decoded drawings are kept: 32,460 of them, 25 MB at 28 x 28."""

Character = tuple[str, str, str]
"""(archive, alphabet, character)."""


def open_omniglot(
    source: str | None = None, *, split: str = "1200-100-323", size: int = 28, rotations: int = 4
) -> Source:
    """Omniglot as classes `archive/alphabet/character01@090`, strokes 255 on 0, (1, size, size).

    Args:
        source: folder that holds `images_background` and `images_evaluation`, each a zip or a folder, or that holds
            nothing but such a folder; downloaded into the user's cache folder when None.
        split: `1200-100-323` or `vinyals`.
        size: side in pixels.
        rotations: 4 (quarter turns, counter-clockwise, are classes of their own) or 1.

    Raises:
        DataError: an option is not possible, the data cannot be downloaded, or drawings are missing.
    """
    if split not in SPLITS:
        raise DataError(f"omniglot has no split {split!r}; choose one of {', '.join(SPLITS)}")
    if rotations not in (1, 4):
        raise DataError(f"rotations is {rotations}; choose 4 (quarter turns as classes) or 1")
    check_integer("size", size, 1)
    root = _inner(Path(source)) if source is not None else download_omniglot()
    parts = {archive: _find_part(root, archive) for archive in CHARACTERS}
    drawings: dict[Character, list[tuple[str, Entry]]] = {}
    for archive, part in parts.items():
        for character, entry in _drawings(part, archive):
            drawings.setdefault(character, []).append((part, entry))
    _check_complete(root, drawings)
    chosen = _vinyals(sorted(drawings)) if split == "vinyals" else _paper_sizes(sorted(drawings))
    splits = {
        name: [record for c in characters for record in _records(c, drawings[c], size, rotations)]
        for name, characters in chosen.items()
    }
    options = {"split": split, "size": size, "rotations": rotations}
    content = [
        (character[0], Entry("/".join([*character[1:], entry.name.rsplit("/", 1)[-1]]), entry.crc, entry.size))
        for character in sorted(drawings)
        for _, entry in drawings[character]
    ]
    report: dict[str, Any] = {
        "characters": {name: len(characters) for name, characters in chosen.items()},
        "drawings": len(content),
        "options": options,
    }
    return Source("omniglot", (1, size, size), splits, source_fingerprint("omniglot", content, options), report)


def download_omniglot() -> Path:
    """Fetch both archives with torchvision, once, into the user's cache folder; return where they lie.

    Raises:
        DataError: no network, or no room.
    """
    from torchvision.datasets import Omniglot

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metagmvae"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # torchvision prints, and standard output may be kept for one JSON object.
        with contextlib.redirect_stdout(sys.stderr):
            for background in (True, False):
                Omniglot(str(cache), background=background, download=True)
    except (OSError, RuntimeError, HTTPException, BadZipFile) as error:
        raise DataError(
            f"Omniglot could not be downloaded to {cache} ({error}); name a folder with images_background.zip and "
            "images_evaluation.zip by --source"
        ) from error
    return cache / Omniglot.folder


def _inner(root: Path) -> Path:
    """The folder itself, or the one folder in it where it holds neither archive."""
    try:
        inside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root}: not a folder that can be read; name the one with the archives by --source") from error
    folders = [path for path in inside if path.is_dir()]
    if len(folders) == 1 and not any(path.stem in CHARACTERS for path in inside):
        return _inner(folders[0])
    return root


def _find_part(root: Path, archive: str) -> str:
    """The zip of that name, or else the folder."""
    for part in (root / f"{archive}.zip", root / archive):
        if part.exists():
            return str(part)
    raise DataError(f"{root}: neither {archive}.zip nor a folder {archive} there; name their folder by --source")


def _drawings(part: str, archive: str) -> Iterator[tuple[Character, Entry]]:
    for entry in list_entries(part, (".png",)):
        folders = entry.name.split("/")
        if len(folders) < 3 or not CHARACTER_NAME.fullmatch(folders[-2]):
            raise DataError(f"{part}: {entry.name} is not <alphabet>/character<NN>/<drawing>.png; remove it")
        yield (archive, folders[-3], folders[-2]), entry


def _check_complete(root: Path, drawings: dict[Character, list[tuple[str, Entry]]]) -> None:
    """Positions in the sorted list decide the splits, so a missing character would move all others."""
    for archive, expected in CHARACTERS.items():
        found = sorted(character for character in drawings if character[0] == archive)
        wrong = [f"{'/'.join(c)} has {len(drawings[c])}" for c in found if len(drawings[c]) != DRAWINGS]
        wrong += [f"{'/'.join(c)} is missing" for c in _gaps(found)]
        if wrong or len(found) != expected:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            detail = f": {', '.join(wrong[:3])}{more}" if wrong else ""
            raise DataError(
                f"{root}: {archive} holds {len(found)} of {expected} characters, each of {DRAWINGS} drawings"
                f"{detail}; fetch the archive again"
            )


def _gaps(found: list[Character]) -> list[Character]:
    """Characters are numbered from 01 within an alphabet; those left out below the highest number."""
    numbers: dict[tuple[str, str], set[str]] = {}
    for archive, alphabet, character in found:
        numbers.setdefault((archive, alphabet), set()).add(character)
    return [
        (*alphabet, name)
        for alphabet, names in numbers.items()
        for name in (f"character{number:02d}" for number in range(1, int(max(names)[-2:]) + 1))
        if name not in names
    ]


def _paper_sizes(characters: list[Character]) -> dict[str, list[Character]]:
    """Our seeded draw over the list sorted by alphabet and character."""
    ordered = sorted(characters, key=lambda character: character[1:])
    order = keyed_rng("omniglot", SPLIT_SEED).permutation(len(ordered))
    chosen, first = {}, 0
    for split, count in SIZES.items():
        chosen[split] = sorted(ordered[row] for row in order[first : first + count])
        first += count
    return chosen


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


def load_drawing(part: str, name: str, size: int, turns: int) -> np.ndarray:
    """One drawing, turned counter-clockwise by quarter turns: uint8, (1, size, size)."""
    decode = _decoded_once if size <= CACHED_SIDE else _decoded
    return np.rot90(decode(part, name, size), turns, axes=(1, 2))


def _decoded(part: str, name: str, size: int) -> np.ndarray:
    pixels = decode_image(read_entry(part, name), f"{part}: {name}", size=size, channels=1, invert=True)
    pixels.flags.writeable = False  # shared between the rotations
    return pixels


_decoded_once = lru_cache(maxsize=sum(CHARACTERS.values()) * DRAWINGS)(_decoded)
"""Rows are stored in a permuted order, so the rotations of a drawing lie far apart."""
