"""Reads the files of a folder; symbolic links are followed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from metagmvae.pipelines.archives.entries import Entry, Kind
from metagmvae.pipelines.archives.formats import CHUNK_BYTES
from metagmvae.pipelines.records import DataError


class FolderFiles:
    """The files of a folder and its subfolders."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> Iterator[tuple[str, Kind]]:
        """See `FileTree`; hidden folders are listed, but not entered.

        Raises:
            DataError: a folder cannot be read, or is there twice because of a link.
        """
        visited: dict[tuple[int, int], Path] = {}
        for folder, folders, files in os.walk(self.path, onerror=_raise, followlinks=True):
            status = os.stat(folder)
            earlier = visited.setdefault((status.st_dev, status.st_ino), Path(folder))
            if earlier != Path(folder):
                self._refuse_link(earlier, Path(folder))
            for name in folders:
                yield self._relative(folder, name), "folder"
            folders[:] = [name for name in folders if not is_hidden(name)]
            for name in files:
                yield self._relative(folder, name), _kind(Path(folder, name))

    def entry(self, name: str) -> Entry:
        """See `FileTree`."""
        crc, size = 0, 0
        try:
            with self.open(name) as file:
                while chunk := file.read(CHUNK_BYTES):
                    crc, size = zlib.crc32(chunk, crc), size + len(chunk)
        except OSError as error:
            raise DataError(f"{self.path / name}: cannot be read ({error.strerror})") from error
        return Entry(name, crc, size)

    def open(self, name: str) -> IO[bytes]:
        """See `FileTree`."""
        return open(self.path / name, "rb")

    def read(self, name: str) -> bytes:
        """See `FileTree`."""
        return (self.path / name).read_bytes()

    def _relative(self, folder: str, name: str) -> str:
        return (Path(folder) / name).relative_to(self.path).as_posix()

    def _refuse_link(self, first: Path, second: Path) -> None:
        """Name the one of two equal folders that is a link: the walk may meet it first."""
        link, folder = (first, second) if self._has_link(first) and not self._has_link(second) else (second, first)
        raise DataError(f"{link}: links to a folder that has been read already ({folder}); remove the link {link}")

    def _has_link(self, path: Path) -> bool:
        return any(parent.is_symlink() for parent in (path, *path.parents) if parent.is_relative_to(self.path))


def is_hidden(name: str) -> bool:
    """Whether a file or folder name is hidden or made by macOS."""
    return name.startswith(".") or name == "__MACOSX"


def _kind(path: Path) -> Kind:
    """Reading a pipe would block forever, so only regular files are files."""
    if path.is_symlink():
        return "link"
    return "file" if path.is_file() else "special file"


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename}: folder cannot be read ({error.strerror})") from error
