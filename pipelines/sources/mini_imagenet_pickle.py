"""Reads `mini-imagenet-cache-*.pkl` with an unpickler that can only build arrays, strings, numbers, lists and dicts.

Names in the file are looked up in the table `GLOBALS` alone, whose entries only store values, so no code of the file
can run. NumPy's own unpickling is not used, because it allocates whatever shape the file states. The unpickler is the
Python one: the C one hashes keys before they can be checked, and hashing deeply nested tuples crashes the process or
never ends.
"""

from __future__ import annotations

import math
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

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
            content = _Unpickler(file, encoding="latin1").load()
    except READ_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: refused or not readable as a Mini-ImageNet cache ({reason}); {REMEDY}") from error
    content = content if isinstance(content, dict) else {}
    images, classes = _to_array(path, "image_data", content.get("image_data")), content.get("class_dict")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"{path}: image_data is not a uint8 array (n, H, W, 3); {REMEDY}")
    if not isinstance(classes, dict):
        raise DataError(f"{path}: class_dict is not a dict; {REMEDY}")
    return Cache(images, {name: _class_rows(path, name, rows, len(images)) for name, rows in classes.items()})


def _to_array(path: str, name: str, value: Any) -> Any:
    """The NumPy array of an `_Array`; other values are returned as they are."""
    try:
        return value.to_numpy() if isinstance(value, _Array) else value
    except READ_ERRORS as error:
        raise DataError(f"{path}: {name} is {error}; {REMEDY}") from error


def _class_rows(path: str, name: Any, rows: Any, count: int) -> list[int]:
    if not isinstance(name, str) or not name.isidentifier():
        raise DataError(f"{path}: {name!r} is not a class name; {REMEDY}")
    rows = _to_array(path, f"class_dict of {name}", rows)
    rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
    if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < count for row in rows):
        raise DataError(f"{path}: rows of class {name} are not integers below {count}; {REMEDY}")
    return rows


class _DType:
    """Replacement of `numpy.dtype`; the byte order is in the state."""

    def __init__(self, name: str, *_: Any) -> None:
        if not isinstance(name, str) or name not in DTYPES:
            # Nothing but a string may be formatted: the representation of nested tuples has no bound.
            shown = repr(name) if isinstance(name, str) else "no name"
            raise pickle.UnpicklingError(f"arrays of type {shown} are refused")
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
        if fortran or min(shape, default=0) < 0 or len(content) != math.prod(shape) * dtype.dtype.itemsize:
            raise ValueError(f"an array of shape {shape} with {len(content)} bytes")
        return np.frombuffer(content, dtype.dtype).reshape(shape)


def _bytes(text: str, encoding: str) -> bytes:
    """Replacement of `_codecs.encode`, which old protocols use for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r} is refused")
    return text.encode("latin1")


class _ArrayType:
    """Replacement of `numpy.ndarray` as an argument."""


GLOBALS = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _bytes,
}
"""Replacements by module and name; all other names are refused."""
OPCODES = (
    "PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING BINSTRING "
    "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL "
    "REDUCE BUILD PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET"
)
"""Opcodes that arrays, strings, numbers, lists and dicts need; all others are refused."""
Operation = Callable[[Any], None]
STANDARD: dict[int, Operation] = dict(pickle._Unpickler.dispatch)


class _Unpickler(pickle._Unpickler):
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, which is not allowed")
        return GLOBALS[module, name]

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it contains an opcode that is not allowed")

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

    dispatch: ClassVar[dict[int, Operation]] = (
        dict.fromkeys(range(256), _refuse)
        | {code: STANDARD[code] for code in (getattr(pickle, name)[0] for name in OPCODES.split())}
        | {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items, pickle.BUILD[0]: _build}
    )


def _check_keys(keys: list[Any]) -> None:
    """Refuse keys that are not strings, before they are hashed."""
    for key in keys:
        if not isinstance(key, str):
            raise pickle.UnpicklingError(f"a key has type {type(key).__name__}, not str")
