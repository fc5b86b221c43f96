"""Recognises archives by their first bytes, and decompresses them with bounded memory."""

from __future__ import annotations

import bz2
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal, Protocol

from metagmvae.pipelines.records import DataError

Format = Literal["zip", "tar", "gz", "bz2", "xz"]
"""`gz`, `bz2` and `xz` are compressed tar files."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SIGNATURES: dict[bytes, Format] = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"\x1f\x8b": "gz",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
}
FOREIGN = {
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard",
}
CHUNK_BYTES = 2**20
INPUT_BYTES = 2**16
"""The input is read in small pieces, because each of many short streams copies the rest of its piece."""
XZ_MEMORY_BYTES = 128 * 2**20
"""Enough for `xz -9`; a file may demand a dictionary of 4 GB."""


class Decompressor(Protocol):
    """The decompressors of `zlib`, `bz2` and `lzma`, which allow to limit the output of a call."""

    @property
    def eof(self) -> bool:
        """Whether the end of the stream has been reached."""

    @property
    def unused_data(self) -> bytes:
        """Input after the end of the stream."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Decompress at most `max_length` bytes."""


def archive_format(path: Path) -> Format:
    """Format of an archive by its content; its name decides nothing.

    Raises:
        DataError: it is not an archive that can be read; the message says what it is.
    """
    status = path.stat()
    return _format_once(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _format_once(path: str, size: int, modified_ns: int) -> Format:
    try:
        with open(path, "rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    for signature, archive in SIGNATURES.items():
        if head.startswith(signature):
            return archive
    if _is_tar_header(head, path):
        return "tar"
    if is_web_page(head):
        raise DataError(f"{path}: is a web page, not an archive; download the file itself (a login may be needed)")
    for signature, meaning in FOREIGN.items():
        if head.startswith(signature):
            raise DataError(f"{path}: is {meaning}, which cannot be read; unpack it and give the folder")
    if path.lower().endswith(TAR_SUFFIXES):
        raise DataError(f"{path}: not a complete tar file (unknown content); download it again")
    if zipfile.is_zipfile(path):
        return "zip"  # with bytes in front, as self-extracting archives have
    if path.lower().endswith(".zip"):
        raise DataError(f"{path}: not a complete zip file (unknown content); download it again")
    raise DataError(f"{path}: not a folder, zip file or tar file; check the path")


def _is_tar_header(head: bytes, path: str) -> bool:
    """Whether the checksum of the first block is right, or the block is the end mark of an empty tar file."""
    if len(head) < tarfile.BLOCKSIZE:
        return False
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return path.lower().endswith(".tar")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def is_web_page(head: bytes) -> bool:
    """Whether a file begins like HTML: pages that ask for a login or a confirmation are saved in place of a file."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--"))


def decompressed(path: str, archive: Format) -> Iterator[bytes]:
    """Chunks of the content of a compressed file, which may consist of several streams one after another.

    Raises:
        DataError: the file needs too much memory.
        zlib.error, lzma.LZMAError, OSError, EOFError: the file is damaged or truncated.
    """
    with open(path, "rb") as file:
        data = _next_stream(file, b"")
        while data:
            stream = _decompressor(archive)
            while not stream.eof:
                chunk = _decompress(stream, data, path)
                data = getattr(stream, "unconsumed_tail", b"")  # bz2 and lzma keep the remaining input themselves
                if chunk:
                    yield chunk
                elif not stream.eof and not data and not (data := file.read(INPUT_BYTES)):
                    raise EOFError("the compressed data end early")
            data = _next_stream(file, stream.unused_data)


def _next_stream(file: IO[bytes], data: bytes) -> bytes:
    """The next bytes after the zero bytes that may stand between two streams; empty at the end of the file."""
    while not (data := data.lstrip(b"\0")):
        if not (data := file.read(INPUT_BYTES)):
            return b""
    return data


def _decompress(stream: Decompressor, data: bytes, path: str) -> bytes:
    try:
        return stream.decompress(data, CHUNK_BYTES)
    except lzma.LZMAError as error:
        if "memory usage limit" not in str(error).lower():
            raise
        limit = f"{XZ_MEMORY_BYTES // 2**20} MiB of memory to unpack"
        raise DataError(f"{path}: needs more than {limit}; pack it again with `xz -9`") from error


def _decompressor(archive: Format) -> Decompressor:
    if archive == "gz":
        return zlib.decompressobj(wbits=31)
    return bz2.BZ2Decompressor() if archive == "bz2" else lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)
