"""Reads `mini-imagenet-cache-*.pkl` with an unpickler that can only build arrays, strings, numbers, lists and dicts.

Names in the file are looked up in the table `GLOBALS` alone, whose entries only store values, so no code of the file
can run. NumPy's own unpickling is not used, because it allocates whatever shape the file states. The unpickler is the
Python one: the C one hashes keys before they can be checked, and hashing deeply nested tuples crashes the process or
never ends.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, ClassVar

import numpy as np

from metagmvae.pipelines.archives.formats import is_web_page
from metagmvae.pipelines.records import DataError

READ_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OSError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)
"""Exceptions of the unpickler on damaged files; OverflowError and MemoryError come from huge stated lengths."""
REMEDY = "download the file again"
MAX_DIMENSIONS = 4
MAX_SHOWN = 100
"""Characters of a value in a message."""
MAX_OPERATIONS = 5_000_000
"""An empty list takes one byte in the file and a hundred in memory. A cache of protocol 0 needs 500,000 operations."""
UNCHECKED_BYTES = 2**16
DTYPES = {"u1": np.uint8, "i8": np.int64, "i4": np.int32}


@dataclass(frozen=True)
class Cache:
    """Content of a cache file: the images of a split, and the rows of each class."""

    images: np.ndarray
    """uint8, (n, H, W, 3)."""
    classes: dict[str, list[int]]

    def checksum(self, row: int) -> int:
        """CRC-32 of the pixels of one image."""
        return zlib.crc32(self.images[row].tobytes())


@lru_cache(maxsize=1)
def read_cache(path: str) -> Cache:
    """Read `{"image_data": uint8 (n, H, W, 3), "class_dict": {class: rows}}`.

    Raises:
        DataError: the file is missing or damaged, or contains anything except arrays and plain values.
    """
    try:
        with open(path, "rb") as file:
            if is_web_page(file.peek(512)):
                raise DataError(
                    f"{path}: is a web page, not the file; download it in a browser and confirm the warning"
                )
            content = _Unpickler(_BoundedFile(file), encoding="latin1").load()
    except DataError:
        raise
    except READ_ERRORS as error:
        reason = _short(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise DataError(f"{path}: refused or not readable as a Mini-ImageNet cache ({reason}); {REMEDY}") from error
    content = content if isinstance(content, dict) else {}
    images, classes = _to_array(path, "image_data", content.get("image_data")), content.get("class_dict")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"{path}: image_data is not a uint8 array (n, H, W, 3); {REMEDY}")
    if images.size == 0:
        raise DataError(f"{path}: image_data has shape {images.shape}, no pixels; {REMEDY}")
    if not isinstance(classes, dict):
        raise DataError(f"{path}: class_dict is not a dict; {REMEDY}")
    # One list of rows may stand for many classes, so its length is checked before its elements.
    remaining = len(images)
    rows_of_class: dict[str, list[int]] = {}
    for name, rows in classes.items():
        rows_of_class[name] = _class_rows(path, name, rows, remaining, len(images))
        remaining -= len(rows_of_class[name])
    return Cache(images, rows_of_class)


def _to_array(path: str, name: str, value: Any) -> Any:
    """The NumPy array of an `_Array`; other values are returned as they are."""
    try:
        return value.to_numpy() if isinstance(value, _Array) else value
    except READ_ERRORS as error:
        raise DataError(f"{path}: {name} is {error}; {REMEDY}") from error


def _class_rows(path: str, name: Any, rows: Any, remaining: int, count: int) -> list[int]:
    """The rows of a class: different integers below `count`, at most `remaining` of them."""
    if not isinstance(name, str) or not name.isidentifier():
        raise DataError(f"{path}: {_shown(name)} is not a class name; {REMEDY}")
    rows = _to_array(path, f"class_dict of {name}", rows)
    rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
    if isinstance(rows, list) and len(rows) > remaining:
        raise DataError(f"{path}: the classes have more than {count} rows, the number of images; {REMEDY}")
    if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < count for row in rows):
        raise DataError(f"{path}: rows of class {name} are not integers below {count}; {REMEDY}")
    if len(set(rows)) < len(rows):
        raise DataError(f"{path}: a row of class {name} is there twice; {REMEDY}")
    return rows


class _DType:
    """Replacement of `numpy.dtype`; the byte order is in the state."""

    def __init__(self, name: str, *_: Any) -> None:
        if not isinstance(name, str) or name not in DTYPES:
            raise pickle.UnpicklingError(f"arrays of type {_shown(name)} are refused")
        self.dtype = np.dtype(DTYPES[name])

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class _Array:
    """Replacement of an array; its state is (version, shape, dtype, Fortran order, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        """Convert to a NumPy array; raises one of READ_ERRORS if the state is not that of a plain array."""
        if len(self.state) != 5:
            raise ValueError("an array without content")
        _, shape, dtype, fortran, content = self.state
        content = content.encode("latin1") if isinstance(content, str) else content
        if not isinstance(dtype, _DType) or not isinstance(content, bytes):
            raise ValueError("an array with a wrong type or content")
        # Comparing and formatting nested tuples take exponential time and memory, so the types are checked first.
        if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS or not all(type(side) is int for side in shape):
            raise ValueError("an array whose shape is not a tuple of integers")
        if fortran or min(shape, default=0) < 0 or len(content) != math.prod(shape) * dtype.dtype.itemsize:
            raise ValueError(f"an array of shape {_short(str(shape))} with {len(content)} bytes")
        return np.frombuffer(content, dtype.dtype).reshape(shape)


def _bytes(text: Any, encoding: Any) -> bytes:
    """Replacement of `_codecs.encode`, which old protocols use for bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"text in {_shown(encoding)} is refused")
    return text.encode("latin1")


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    """Replacement of `numpy._core.numeric._frombuffer`, which protocol 5 uses for arrays."""
    array = _Array()
    array.state = (1, shape, dtype, order != "C", content)
    return array


def _scalar(dtype: Any, content: Any) -> int:
    """Replacement of `numpy._core.multiarray.scalar`: a NumPy integer."""
    array = _Array()
    array.state = (1, (), dtype, False, content)
    return int(array.to_numpy())


def _shown(value: Any) -> str:
    """A value for a message; nothing but text is formatted, because other values may be nested without bound."""
    return repr(_short(value)) if isinstance(value, str) else "no name"


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


class _ArrayType:
    """Replacement of `numpy.ndarray` as an argument."""


GLOBALS = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _bytes,
}
"""Replacements by module and name; all other names are refused."""
OPCODES = (
    "PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING BINSTRING "
    "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL "
    "REDUCE BUILD PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET DICT BYTEARRAY8"
)
"""Opcodes that arrays, strings, numbers, lists and dicts need; all others are refused."""
Operation = Callable[[Any], None]
STANDARD: dict[int, Operation] = dict(pickle._Unpickler.dispatch)


def _counted(operations: dict[int, Operation]) -> dict[int, Operation]:
    """The same operations with an upper bound of their number in a file."""

    def counted(operation: Operation) -> Operation:
        def run(unpickler: Any) -> None:
            unpickler.operations += 1
            if unpickler.operations > MAX_OPERATIONS:
                raise pickle.UnpicklingError(f"it contains more than {MAX_OPERATIONS} operations")
            operation(unpickler)

        return run

    return {code: counted(operation) for code, operation in operations.items()}


class _BoundedFile:
    """A file that is asked for no more bytes than it has: a stated length would be allocated before it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        """Read bytes."""
        if count > UNCHECKED_BYTES and count > self.size - self.file.tell():
            raise EOFError(f"it states a length of {count} bytes, but has {self.size} bytes")
        return self.file.read(count)


class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    operations = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, which is not allowed")
        return GLOBALS[module, name]

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it contains an opcode that is not allowed")

    def _byte_array(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    def _dict(self) -> None:
        _check_keys(self.stack[::2])
        STANDARD[pickle.DICT[0]](self)

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        STANDARD[pickle.SETITEM[0]](self)

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])
        STANDARD[pickle.SETITEMS[0]](self)

    def _build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _DType):
            raise pickle.UnpicklingError("it sets the state of something that is not an array")
        STANDARD[pickle.BUILD[0]](self)

    dispatch: ClassVar[dict[int, Operation]] = _counted(
        dict.fromkeys(range(256), _refuse)
        | {code: STANDARD[code] for code in (getattr(pickle, name)[0] for name in OPCODES.split())}
        | {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items, pickle.BUILD[0]: _build}
        | {pickle.DICT[0]: _dict, pickle.BYTEARRAY8[0]: _byte_array}
    )


def _check_keys(keys: list[Any]) -> None:
    """Refuse keys that are not strings, before they are hashed."""
    for key in keys:
        if not isinstance(key, str):
            raise pickle.UnpicklingError(f"a key has type {type(key).__name__}, which is not allowed")
