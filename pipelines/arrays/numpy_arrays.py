"""Arrays of `.npy` and `.npz` files, mapped into memory; nothing is unpickled.

Compressed arrays are unpacked into a temporary file first, block by block.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from metagmvae.pipelines.arrays.file_rows import FileRows, Order, unpack_rows
from metagmvae.pipelines.files import open_file
from metagmvae.pipelines.records import DataError

NO_OBJECTS = "Python objects, such as pickle files, are never read"
ERRORS = (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What the libraries raise for damaged files."""
BLOCK_BYTES = 2**26


def array_names(path: Path) -> list[str]:
    """Names of the arrays of a `.npz` file; `images` for a `.npy` file.

    Raises:
        DataError: it is neither.
    """
    with _numpy_file(path) as archive:
        return ["images"] if archive is None else [info.filename.removesuffix(".npy") for info in archive.infolist()]


def open_array(path: Path, name: str) -> FileRows:
    """An array of `array_names` with rows of any shape, mapped into memory.

    Raises:
        DataError: it cannot be read, is a single value, or holds Python objects.
    """
    with _numpy_file(path) as archive:
        if archive is None:
            rows = npy_rows(path)
        else:
            with open_file(path) as file:
                rows = member_rows(path, file, archive, archive.getinfo(f"{name}.npy"))
    return rows


@contextmanager
def _numpy_file(path: Path) -> Iterator[zipfile.ZipFile | None]:
    """A `.npz` file, by its content; None: a `.npy` file."""
    try:
        with open_file(path) as file:
            zipped = zipfile.is_zipfile(file)
            file.seek(0)
            if not zipped:
                np.lib.format.read_magic(file)
                yield None
            else:
                with zipfile.ZipFile(file) as archive:
                    yield archive
    except DataError:
        raise
    except ERRORS as error:
        remedy = f"write arrays with numpy.savez ({NO_OBJECTS})"
        raise DataError(f"{path}: no NumPy file of numbers; {remedy}") from error


def npy_rows(path: Path) -> FileRows:
    """Rows of a `.npy` file; errors are those of `_header`."""
    with open_file(path) as file:
        shape, order, dtype = _header(file, path)
        return FileRows.open(path, shape, dtype, file.tell(), order)


def member_rows(path: Path, file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> FileRows:
    """Rows of an array in an open `.npz` file, after its checksum was compared."""
    with archive.open(info) as member:
        shape, order, dtype = _header(member, f"{path}: {info.filename}")
        header = member.tell()
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            if order == "F":  # one column after the other
                whole = np.frombuffer(member.read(), dtype).reshape(shape[::-1]).T
                return unpack_rows(path, iter([whole]))
            return unpack_rows(path, _blocks(member, shape, dtype))
        while member.read(BLOCK_BYTES):
            pass
    file.seek(info.header_offset + 26)
    lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
    return FileRows.open(path, shape, dtype, info.header_offset + 30 + lengths + header, order)


def small_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> np.ndarray:
    """An array of a `.npz` file in memory; `where` names it in messages."""
    with archive.open(info) as member:
        _header(member, where)
    with archive.open(info) as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
    return array.astype(str) if array.dtype.kind == "S" else array


def _header(file: IO[bytes], where: object) -> tuple[tuple[int, ...], Order, np.dtype[Any]]:
    """Shape, order and number format of an array of NumPy; the file then stands at its first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(file)
    if dtype.hasobject:
        raise DataError(f"{where}: holds Python objects; save arrays of numbers and words ({NO_OBJECTS})")
    if not shape:
        raise DataError(f"{where}: is a single value; give an array")
    if min(shape) < 0:
        raise ValueError(f"the shape is {shape}")
    return shape, "F" if by_column else "C", dtype


def _blocks(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    row_bytes = int(np.prod(shape[1:], dtype=object)) * dtype.itemsize
    if not row_bytes:
        yield np.empty(shape, dtype)
        return
    left = shape[0]
    while True:
        count = min(left, max(1, BLOCK_BYTES // row_bytes))
        content = member.read(count * row_bytes)
        if len(content) != count * row_bytes:
            raise ValueError("it ends too early")
        yield np.frombuffer(content, dtype).reshape(count, *shape[1:])
        left -= count
        if not left:
            member.read(1)  # compares the checksum
            return
