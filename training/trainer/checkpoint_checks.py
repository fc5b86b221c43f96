"""Checks of a checkpoint file, which may be damaged or hostile: sizes before it is loaded, types afterwards."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, InstanceOf

from metagmvae.configs.limits import ExtensionName
from metagmvae.pipelines.files import open_file

MAX_OBJECTS = 2**20
"""Largest number of values in a checkpoint, those of tensors not counted; it has about 20 for each parameter."""

Weights = dict[str, InstanceOf[torch.Tensor]]
Count = Annotated[int, Field(ge=0, le=2**62)]
ImageShape = Annotated[list[Annotated[int, Field(gt=0, le=2**14)]], Field(min_length=3, max_length=3)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Best(BaseModel):
    model_config = ConfigDict(strict=True)

    accuracy: Finite
    step: Count
    model: Weights


class _Window(BaseModel):
    """Sums of the next metric line, in the checkpoint of a stopped training."""

    model_config = ConfigDict(strict=True)

    steps: Count
    seconds: Finite
    sums: Weights


class CheckpointSchema(BaseModel):
    """The keys of a checkpoint of version 2."""

    model_config = ConfigDict(strict=True)

    kind: ExtensionName
    settings: Annotated[str, Field(max_length=2**20)]
    image_shape: ImageShape
    data_fingerprint: str
    stage: Literal["pretrain", "meta"]
    step: Count
    elapsed: Finite
    model: Weights
    projector: Weights
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    best: dict[Annotated[str, Field(pattern=r"^\d{1,9}w\d{1,9}s$")], _Best]
    rng: dict[str, Any]
    window: _Window | None = None
    remembered: Weights = {}


def check_archive(path: Path) -> None:
    """Check the zip file before it is loaded: no compression, no sizes beyond the file, correct CRCs, a sane pickle.

    Raises:
        BadZipFile, ValueError: it is damaged, or states more than it contains.
    """
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise zipfile.BadZipFile("its members are compressed, which torch does not do")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise zipfile.BadZipFile("its members state more bytes than the file has")
        # torch.load does not verify the CRCs in the file: a flipped bit would silently change a weight.
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged!a} is damaged")
        for member in members:
            if member.filename.endswith(".pkl"):
                _check_pickle(archive.read(member))


def _check_pickle(content: bytes) -> None:
    """Refuse a pickle with so many nested references that hashing a value would practically never end.

    The operations are followed without carrying them out; each value is represented by the number of its parts.

    Raises:
        ValueError: it has too many values, or is not a pickle.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for operation, argument, _ in pickletools.genops(content):
        parts = 1
        before = operation.stack_before
        if pickletools.markobject in before:
            mark = marks.pop()
            parts += sum(stack[mark:])
            del stack[mark:]
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            parts += stack.pop()
        if parts > MAX_OBJECTS:
            raise ValueError(f"more than {MAX_OBJECTS:,} values")
        if operation.name == "MARK":
            marks.append(len(stack))
        elif operation.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif operation.name == "MEMOIZE":
            memo[len(memo)] = parts
            stack.append(parts)
        elif operation.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            stack += [parts] * len(operation.stack_after)


def check_values(state: Any) -> None:
    """Check that a loaded object is a tree of bounded size, whose tensors are as large as the bytes they are read from.

    Raises:
        ValueError: it is not.
    """
    waiting, count = [state], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > MAX_OBJECTS:
            raise ValueError(f"more than {MAX_OBJECTS:,} values")
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif (
            isinstance(value, torch.Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ):
            raise ValueError("a tensor repeats its values")
