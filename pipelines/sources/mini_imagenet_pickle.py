"""The `mini-imagenet-cache-*.pkl` files, read by an unpickler that can build arrays, strings and numbers only.

Every name that a pickle asks for is looked up in a table of ours and in nothing else, and what stands there makes
plain values: nothing of the file can run, and NumPy's own unpickling, which allocates what it is told to, is not used.
The unpickler is the one in Python: the one in C hashes what a file calls a key before anyone could look at it, and
there a tuple within a tuple, and so on, ends the process or keeps it busy for ever.
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
"""What the unpickler raises on damaged bytes; overflow and memory on lengths that no machine has room for."""
DTYPES = {"u1": np.uint8, "i8": np.int64, "i4": np.int32}


@dataclass(frozen=True)
class Cache:
    """One split: images, and the rows of each class."""

    images: np.ndarray
    """uint8, (n, H, W, 3)."""
    classes: dict[str, list[int]]

    def checksum(self, row: int) -> int:
        """CRC-32 of the pixels of an image."""
        return zlib.crc32(self.images[row].tobytes())


@lru_cache(maxsize=1)
def read_cache(path: str) -> Cache:
    """Read `{"image_data": uint8 (n, H, W, 3), "class_dict": {class: rows}}`.

    Raises:
        DataError: it is missing, truncated, asks for anything but arrays and plain values, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            content = _Reader(file, encoding="latin1").load()
    except READ_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: refused or not readable as a cache of Mini-ImageNet ({reason})") from error
    images = content.get("image_data") if isinstance(content, dict) else None
    classes = content.get("class_dict") if isinstance(content, dict) else None
    images = _value(path, "image_data", images) if isinstance(images, _Array) else None
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"{path}: image_data is no uint8 array (n, H, W, 3); fetch the file again")
    if not isinstance(classes, dict):
        raise DataError(f"{path}: class_dict is no table of classes; fetch the file again")
    return Cache(images, {_name(path, name): _rows(path, name, rows, len(images)) for name, rows in classes.items()})


def _name(path: str, name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise DataError(f"{path}: {name!r} is no name of a class; fetch the file again")
    return name


def _value(path: str, name: str, array: _Array) -> np.ndarray:
    """The array that a pickle spells; its state is whatever the file says."""
    try:
        return array.value()
    except READ_ERRORS as error:
        raise DataError(f"{path}: {name} is {error}; fetch the file again") from error


def _rows(path: str, name: str, rows: Any, count: int) -> list[int]:
    rows = _value(path, f"class_dict of {name}", rows).tolist() if isinstance(rows, _Array) else rows
    if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < count for row in rows):
        raise DataError(f"{path}: rows of class {name} are no numbers below {count}; fetch the file again")
    return rows


class _DType:
    """A dtype as a pickle spells it; its byte order comes as state."""

    def __init__(self, name: str, *_: Any) -> None:
        if not isinstance(name, str):
            raise pickle.UnpicklingError("arrays of no name of a type are refused")
        if name not in DTYPES:
            raise pickle.UnpicklingError(f"arrays of {name!r} are refused")
        self.dtype = np.dtype(DTYPES[name])

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class _Array:
    """An array as a pickle spells it: made empty, then given (version, shape, dtype, Fortran order, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def value(self) -> np.ndarray:
        """The array itself.

        Raises:
            READ_ERRORS: the state is not that of a plain array.
        """
        if len(self.state) != 5:
            raise ValueError("an array without its content")
        _, shape, dtype, fortran, content = self.state
        content = content.encode("latin1") if isinstance(content, str) else content
        if not isinstance(dtype, _DType) or not isinstance(content, bytes):
            raise ValueError("an array whose type or content is something else")
        if fortran or min(shape, default=0) < 0 or len(content) != math.prod(shape) * dtype.dtype.itemsize:
            raise ValueError(f"an array of shape {shape} with {len(content)} bytes")
        return np.frombuffer(content, dtype.dtype).reshape(shape)


def _bytes(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, by which older protocols spell bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r} is refused")
    return text.encode("latin1")


class _ArrayType:
    """`numpy.ndarray` as an argument; nothing can be made of it."""


KNOWN = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _bytes,
}


NEEDED = (
    "PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING BINSTRING "
    "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL "
    "REDUCE BUILD PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET"
)
"""Operations of the pickle language by which arrays, strings, numbers, lists and dicts are spelled."""
Operation = Callable[[Any], None]
STANDARD: dict[int, Operation] = dict(pickle._Unpickler.dispatch)


class _Reader(pickle._Unpickler):
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return KNOWN[module, name]

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it holds an operation that no array needs")

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        STANDARD[pickle.SETITEM[0]](self)

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])
        STANDARD[pickle.SETITEMS[0]](self)

    def _build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _DType):
            raise pickle.UnpicklingError("it changes what is no array")
        STANDARD[pickle.BUILD[0]](self)

    dispatch: ClassVar[dict[int, Operation]] = (
        dict.fromkeys(range(256), _refuse)
        | {code: STANDARD[code] for code in (getattr(pickle, name)[0] for name in NEEDED.split())}
        | {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items, pickle.BUILD[0]: _build}
    )


def _check_keys(keys: list[Any]) -> None:
    """Refuse what is no text as a key, before it is hashed."""
    for key in keys:
        if not isinstance(key, str):
            raise pickle.UnpicklingError(f"a key is of type {type(key).__name__}, and all are text")
