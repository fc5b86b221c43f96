"""Finds the drawings of Omniglot: two archives or folders, one archive with both, or one folder with all alphabets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from metagmvae.pipelines.archives.entries import Entry, LeftOut
from metagmvae.pipelines.archives.folder import is_hidden
from metagmvae.pipelines.archives.reader import ARCHIVES, list_files
from metagmvae.pipelines.records import DataError, first_few

BACKGROUND, EVALUATION = "images_background", "images_evaluation"
EVALUATION_ALPHABETS = (
    *("Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh", "Avesta", "Ge_ez", "Glagolitic", "Gurmukhi"),
    *("Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya", "Sylheti"),
    *("Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG"),
)
BACKGROUND_ALPHABETS = (
    *("Alphabet_of_the_Magi", "Anglo-Saxon_Futhorc", "Arcadian", "Armenian", "Asomtavruli_(Georgian)", "Balinese"),
    *("Bengali", "Blackfoot_(Canadian_Aboriginal_Syllabics)", "Braille", "Burmese_(Myanmar)", "Cyrillic"),
    *(
        "Early_Aramaic",
        "Futurama",
        "Grantha",
        "Greek",
        "Gujarati",
        "Hebrew",
        "Inuktitut_(Canadian_Aboriginal_Syllabics)",
    ),
    *("Japanese_(hiragana)", "Japanese_(katakana)", "Korean", "Malay_(Jawi_-_Arabic)", "Mkhedruli_(Georgian)"),
    *("Ojibwe_(Canadian_Aboriginal_Syllabics)", "Sanskrit", "Syriac_(Estrangelo)", "Tagalog", "Tifinagh"),
)
ARCHIVE_OF_ALPHABET = dict.fromkeys(BACKGROUND_ALPHABETS, BACKGROUND) | dict.fromkeys(EVALUATION_ALPHABETS, EVALUATION)
CHARACTER_NAME = re.compile(r"character\d\d")

Character = tuple[str, str, str]
"""(archive, alphabet, character)."""


@dataclass
class Drawings:
    """The drawings of each character, and the files that are none."""

    root: Path
    of_character: dict[Character, list[tuple[str, Entry]]] = field(default_factory=dict)
    """(folder or archive, file) of each drawing."""
    left_out: list[LeftOut] = field(default_factory=list)


def find_drawings(source: Path) -> Drawings:
    """List the drawings of a folder or an archive.

    Raises:
        DataError: there are none, one of the two archives is missing, or a file is in no folder of a character.
    """
    root = _data_folder(source)
    drawings = Drawings(root)
    parts: dict[str, str | None] = {}
    if root.is_dir():
        parts = {part: archive for archive in (BACKGROUND, EVALUATION) if (part := _find_part(root, archive))}
    if len(parts) == 1:
        present = next(iter(parts.values()))
        raise _missing_part(root, EVALUATION if present == BACKGROUND else BACKGROUND)
    for part, archive in (parts or {str(root): None}).items():
        listing = list_files(part, (".png",))
        drawings.left_out += listing.left_out
        for character, entry in _characters(part, archive, listing.entries):
            drawings.of_character.setdefault(character, []).append((part, entry))
    if not drawings.of_character:
        raise _missing_part(root, BACKGROUND, drawings.left_out)
    return drawings


def _missing_part(root: Path, archive: str, left_out: list[LeftOut] | None = None) -> DataError:
    inside = [file.name for file in left_out or () if Path(file.name).stem in (BACKGROUND, EVALUATION)]
    if inside and root.is_file():
        return DataError(f"{root}: contains {first_few(inside)}; unpack it and give the folder with --source")
    return DataError(f"{root}: neither {archive}.zip nor a folder {archive} there; give their folder with --source")


def _data_folder(root: Path) -> Path:
    """The folder or archive itself, or what is in it if that is the only thing and neither of the two archives."""
    if root.is_file():
        return root
    try:
        contents = sorted(path for path in root.iterdir() if not is_hidden(path.name))
    except OSError as error:
        raise DataError(f"{root}: not a readable folder; give the folder with the archives with --source") from error
    if any(_stem(path) in (BACKGROUND, EVALUATION) for path in contents):
        return root
    folders = [path for path in contents if path.is_dir()]
    archives = [path for path in contents if path.name.lower().endswith(ARCHIVES)]
    inner = folders or archives
    return _data_folder(inner[0]) if len(inner) == 1 and not CHARACTER_NAME.fullmatch(inner[0].name) else root


def _stem(path: Path) -> str:
    return next((path.name[: -len(end)] for end in ARCHIVES if path.name.lower().endswith(end)), path.name)


def _find_part(root: Path, archive: str) -> str | None:
    """The archive file of this name, or the folder."""
    names = [archive + suffix for suffix in ARCHIVES] + [archive]
    return next((str(root / name) for name in names if (root / name).exists()), None)


def _characters(part: str, archive: str | None, entries: list[Entry]) -> Iterator[tuple[Character, Entry]]:
    for entry in entries:
        folders = entry.name.split("/")
        if len(folders) < 3 or not CHARACTER_NAME.fullmatch(folders[-2]):
            raise DataError(f"{part}: {entry.name} is not <alphabet>/character<NN>/<drawing>.png; remove it")
        alphabet = folders[-3]
        named = next((folder for folder in folders[:-3] if folder in (BACKGROUND, EVALUATION)), None)
        belongs_to = archive or named or ARCHIVE_OF_ALPHABET.get(alphabet)
        if belongs_to is None:
            raise DataError(
                f"{part}: {alphabet} is not an alphabet of Omniglot; give a folder with {BACKGROUND} and {EVALUATION}"
            )
        yield (belongs_to, alphabet, folders[-2]), entry
