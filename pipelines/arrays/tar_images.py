"""Images in tar files of WebDataset: the files of a sample have one name, and suffixes that say what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.pipelines.archives.entries import LeftOut
from metagmvae.pipelines.archives.formats import archive_format
from metagmvae.pipelines.archives.tar import Member, open_tar
from metagmvae.pipelines.arrays.image_arrays import Columns, ImageTable, images_opener
from metagmvae.pipelines.files import reading
from metagmvae.pipelines.records import DataError, first_few, printable
from metagmvae.pipelines.sources.image_decoding import SUFFIXES
from metagmvae.pipelines.sources.image_files import files_report

TAR, CLASS = ".tar", "cls"
LONGEST_NAME = 200
"""Characters of the name of a class."""


@dataclass(frozen=True, eq=False)
class TarImages:
    """The contents of the image files, by row of all tar files; picklable."""

    files: tuple[str, ...]
    file_n: np.ndarray
    """Number of the tar file of each row, int32 (n,)."""
    offset_n: np.ndarray
    """First byte in it, int64 (n,)."""
    size_n: np.ndarray
    """Bytes, int64 (n,)."""

    def __len__(self) -> int:
        return len(self.file_n)

    def __getitem__(self, row: int) -> bytes:
        return _read(self.files[self.file_n[row]], int(self.offset_n[row]), int(self.size_n[row]))


def read_tars(source: str, columns: Columns) -> ImageTable:
    """Images of a tar file of WebDataset, or of all tar files of a folder, which are joined.

    A sample `000123` has one image file, such as `000123.jpg`, and may have its class in `000123.cls`, a word or a
    number. `Columns` name other suffixes; what else a sample has, such as `.json`, is not read.

    Raises:
        DataError: a tar file cannot be read or is compressed, or a sample has no image, several, or no class.
    """
    files, left_out = _tars(Path(source))
    rows: list[tuple[int, int, int]] = []
    label = (columns.label or CLASS) if columns.classes else None
    texts: dict[str, list[str | None]] = {suffix: [] for suffix in (label, columns.groups) if suffix is not None}
    unread: Counter[str] = Counter()
    for number, path in enumerate(files):
        for name, by_suffix in _samples(path, open_tar(Path(path)).members):
            suffix = _image_suffix(f"{path}: {printable(name)}", by_suffix, columns.image)
            rows.append((number, by_suffix[suffix].offset, by_suffix[suffix].entry.size))
            for key, values in texts.items():
                values.append(_text(path, by_suffix[key], name) if key in by_suffix else None)
            unread.update(by_suffix.keys() - texts.keys() - {suffix})
    if not rows:
        raise DataError(f"{source}: holds no samples; give tar files of WebDataset")
    file_n, offset_n, size_n = np.array(rows, np.int64).T
    left_out += [LeftOut(f"{count:,} files .{suffix}", "not read") for suffix, count in sorted(unread.items())]
    groups = columns.groups
    images: Any = TarImages(tuple(files), file_n.astype(np.int32), offset_n, size_n)
    return ImageTable(
        images,
        None if label is None else _complete(source, label, texts[label], needed=columns.label is not None),
        None if groups is None else _complete(source, groups, texts[groups], needed=True),
        files_report(files, left_out),
    )


def _tars(source: Path) -> tuple[list[str], list[LeftOut]]:
    """The tar files to read, and the files of a folder that are left out."""
    found, left_out = [source], []
    if source.is_dir():
        inside = sorted(path for path in source.rglob("*") if path.is_file())
        found = [path for path in inside if path.suffix.lower() == TAR and not path.name.startswith(".")]
        left_out = [LeftOut(str(path.relative_to(source)), "is no tar file") for path in inside if path not in {*found}]
    if not found:
        raise DataError(f"{source}: holds no {TAR} files; give the folder that does")
    for path in found:
        with reading(path):
            kind = archive_format(path)
        if kind != "tar":
            raise DataError(f"{path}: is {kind}, not an uncompressed tar file; unpack it once")
    return [str(path.absolute()) for path in found], left_out


def _samples(path: str, members: Mapping[str, Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Names of samples and their files by suffix, which begins at the first dot of the file name, in lower case."""
    samples: dict[str, dict[str, Member]] = {}
    for name, member in members.items():
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        if not stem or not suffix or folder.startswith("__MACOSX"):
            continue
        files = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if suffix.lower() in files:
            raise DataError(f"{path}: {printable(name)}: a second file .{suffix.lower()} of this sample; rename it")
        files[suffix.lower()] = member
    yield from samples.items()


def _image_suffix(sample: str, files: Mapping[str, Member], given: str | None) -> str:
    possible = [suffix for suffix in files if (f".{suffix}" in SUFFIXES if given is None else suffix == given)]
    if len(possible) == 1:
        return possible[0]
    what = f"several images ({', '.join(possible)})" if possible else f"no image{f' .{given}' if given else ''}"
    held = first_few([printable(suffix) for suffix in files])
    raise DataError(f"{sample}: has {what} among {held}; name the suffix with --option image=SUFFIX")


def _read(path: str, offset: int, size: int) -> bytes:
    with reading(path), open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise DataError(f"{path}: has become shorter since it was listed; start again")
    return content


def _text(path: str, member: Member, sample: str) -> str:
    try:
        text = _read(path, member.offset, member.entry.size).decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(text) > LONGEST_NAME or len(text.splitlines()) > 1:
        raise DataError(f"{path}: {printable(sample)}: its class or group is no line of text; name another suffix")
    return text


def _complete(source: str, suffix: str, texts: list[str | None], *, needed: bool) -> list[str] | None:
    """The text of every sample; None if there is none and none is needed."""
    given = [text for text in texts if text is not None]
    if not given and not needed:
        return None
    if len(given) < len(texts):
        missing = f"{len(texts) - len(given):,} of {len(texts):,} samples have no .{suffix}"
        raise DataError(f"{source}: {missing}; add it, name another suffix, or use --unlabelled")
    return given


open_webdataset = images_opener("webdataset", "WebDataset tar file or folder of them", read_tars)
