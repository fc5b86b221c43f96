"""Lists the image files of a folder or an archive, and counts every file: which are read, and which are left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from metagmvae.pipelines.archives.entries import Entry, LeftOut, Listing
from metagmvae.pipelines.archives.reader import HIDDEN, list_files
from metagmvae.pipelines.records import DataError, first_few, printable
from metagmvae.pipelines.sources.image_decoding import SUFFIXES, is_image

KINDS = {".parquet": "prepare parquet", ".arrow": "prepare parquet", ".npz": "prepare npz", ".npy": "prepare npz"}
KINDS |= dict.fromkeys((".tar", ".zip"), "give one of them")
"""What reads files that are no images, by suffix."""
TABLES = ("metadata.csv", "metadata.jsonl")
"""Names that Hugging Face gives to the table of a folder of images."""
EXAMPLES = 5
"""Names that are shown of each kind."""


def list_images(root: str | Path, further_suffixes: tuple[str, ...] = (), *, checksums: bool = True) -> Listing:
    """Files with the suffix of an image, files without a suffix that are images, and the files that are left out.

    Args:
        root: folder or archive.
        further_suffixes: suffixes of other files to list, in lower case.
        checksums: as in `list_files`.

    Raises:
        DataError: see `list_files`.
    """
    return list_files(root, (*SUFFIXES, *further_suffixes), is_image, checksums=checksums)


def require_images(root: str | Path, listing: Listing) -> None:
    """Refuse a folder or an archive without images.

    Raises:
        DataError: with the files that are there instead.
    """
    if listing.entries:
        return
    reasons = Counter(file.reason for file in listing.left_out)
    instead = ", ".join(f"{count} with {reason}" for reason, count in reasons.most_common(EXAMPLES))
    suffixes = {PurePosixPath(file.name).suffix.lower() for file in listing.left_out}
    known = sorted(f"{suffix} files: {KINDS[suffix]}" for suffix in suffixes & KINDS.keys())
    convert = "convert them (DICOM, NIfTI) to PNG or TIFF, of 16 bits if they have more than 8" if instead else ""
    remedy = "".join(f"; {advice}" for advice in known or [convert] if advice)
    raise DataError(f"{root}: contains no images ({' '.join(SUFFIXES)}); it has {instead or 'no files'}{remedy}")


def table_note(listing: Listing) -> str:
    """A sentence on a file that looks like a table of the classes; empty without one."""
    found = [printable(file.name) for file in listing.left_out if PurePosixPath(file.name).name in TABLES]
    return f"{found[0]} may hold the classes: --labels PATH reads it" if found else ""


def files_report(read: Sequence[str], left_out: Iterable[LeftOut], folders: Iterable[str] = ()) -> dict[str, Any]:
    """Account of all files, for the output of `metagmvae prepare`.

    Args:
        read: names of the files that are read.
        left_out: the other files.
        folders: folders, to name those without images; the folders of `left_out` need not be given.

    Returns:
        `files`: numbers of files seen, read and left out; `suffixes`: files read, by suffix; `left_out`: rows with a
        reason, a number of files and some names; `folders_without_images`: their names.
    """
    left_out = list(left_out)
    names_by_reason: dict[str, list[str]] = {}
    for file in left_out:
        names_by_reason.setdefault(file.reason, []).append(printable(file.name))
    visible = [file.name for file in left_out if file.reason != HIDDEN]
    suffixes = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in read)
    return {
        "files": {"seen": len(read) + len(left_out), "read": len(read), "left_out": len(left_out)},
        "suffixes": dict(suffixes.most_common()),
        "left_out": [
            {"reason": printable(reason), "files": len(names), "names": first_few(names, shown=EXAMPLES)}
            for reason, names in sorted(names_by_reason.items())
        ],
        "folders_without_images": _empty_folders(read, {*folders, *(str(PurePosixPath(n).parent) for n in visible)}),
    }


class KeptFile(NamedTuple):
    """A file that is part of the dataset."""

    entry: Entry
    class_name: str
    split: str
    read: Callable[[], bytes]


def duplicates_note(files: Sequence[KeptFile]) -> dict[str, str]:
    """Files whose content another file has, for the output of `metagmvae prepare`; empty if there are none.

    Only files of equal CRC-32 and size are read. These alone do not suffice: a PNG file holds CRC-32 values of its own,
    which leave 16 of the 32 bits of that of the file.
    """
    alike = Counter((file.entry.crc, file.entry.size) for file in files)
    first: dict[bytes, KeptFile] = {}
    pairs = []
    for file in files:
        if alike[file.entry.crc, file.entry.size] > 1:
            earlier = first.setdefault(hashlib.sha256(file.read()).digest(), file)
            if earlier is not file:
                pairs.append((file, earlier))
    if not pairs:
        return {}
    names = " equals ".join(printable(file.entry.name) for file in pairs[0])
    text = f"files that equal an earlier one: {len(pairs):,} ({names})"
    if other := sum(file.class_name != earlier.class_name for file, earlier in pairs):
        text += f"; of another class than it: {other:,}"
    if other := sum(file.split != earlier.split for file, earlier in pairs):
        text += f"; of another split than it: {other:,}"
    return {"duplicates": text}


def _empty_folders(read: Iterable[str], folders: Iterable[str]) -> list[str]:
    """Folders that contain none of the files, neither directly nor in subfolders; only the uppermost ones."""
    filled = {parent for name in {PurePosixPath(name).parent for name in read} for parent in (name, *name.parents)}
    empty = {path for path in map(PurePosixPath, folders) if path not in filled and path.name}
    return sorted(printable(str(path)) for path in empty if not empty.intersection(path.parents))
