"""What lies at the path of an output: a file to replace, or a pipe, device or standard stream to write to."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from metagmvae.pipelines.records import DataError, NoSpaceError

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def output_mode(path: str | Path) -> int | None:
    """Return the mode (type and permissions) of what an output file would replace or be written to; None if nothing is
    there.

    Raises:
        DataError: nothing can be written there.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be written ({reason}); choose another file") from error
    for is_type, name in ((stat.S_ISDIR, "a folder"), (stat.S_ISSOCK, "a socket"), (stat.S_ISBLK, "a disk")):
        if is_type(mode):
            raise DataError(f"{path}: is {name}; give the name of a file")
    return mode


def check_output(path: str | Path) -> None:
    """Refuse an output file that cannot be written, before the work whose result it gets.

    Raises:
        DataError: naming the path and the reason.
    """
    mode = output_mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        return
    check_output_folder(Path(os.path.realpath(path)).parent, path)


def check_output_folder(folder: Path, path: str | Path) -> None:
    """Refuse a folder that neither exists nor can be created, or that cannot be written.

    Args:
        folder: absolute path; missing folders above it are created too.
        path: of the output, as the message names it.

    Raises:
        DataError: naming the path and the reason.
    """
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{path}: cannot be written, because {folder} is no writable folder; choose another one")


def check_outside(out: Path, source: Path) -> None:
    """Refuse an output folder inside the folder of the source, where its files would be read as a part of it next time.

    Raises:
        DataError: naming both.
    """
    if out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"--out {out}: lies in the source {source}; choose a folder outside of it")


def cannot_write(path: str | Path, error: OSError, remedy: str) -> DataError:
    """The error to raise where an output cannot be written; `remedy` is for other reasons than a full disk."""
    if error.errno in OUT_OF_SPACE:
        return NoSpaceError(f"{path}: cannot be written ({error.strerror}); free some space, and run the command again")
    reason = "no program reads from this pipe" if error.errno == errno.ENXIO else error.strerror
    return DataError(f"{path}: cannot be written ({reason}); {remedy}")


def standard_stream(path: Path) -> int | None:
    """Descriptor of the standard output or error of this process if `path` is the same file: it is written to, because
    replacing the file would lose what the process prints."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def stream_into(path: Path, content: IO[bytes]) -> None:
    """Copy an open file into a pipe, a device or a standard stream. A pipe that nothing reads is an error, not a wait.

    Raises:
        DataError: it cannot be written; `NoSpaceError` if it is full.
    """
    descriptor = standard_stream(path)
    try:
        if descriptor is None:
            out = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            os.set_blocking(out, True)
        else:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            out = os.dup(descriptor)
        with os.fdopen(out, "wb") as target:
            shutil.copyfileobj(content, target)
    except OSError as error:
        raise cannot_write(path, error, "choose another file") from error
