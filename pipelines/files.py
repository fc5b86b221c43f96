"""Atomic writing of files, bounded reading of JSON, locks, and sha256 digests."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.request import url2pathname

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from metagmvae.configs.load import mistake_text
from metagmvae.pipelines.output_target import cannot_write, output_mode, standard_stream, stream_into
from metagmvae.pipelines.records import DataError

Document = TypeVar("Document", bound=BaseModel)
FILE_SCHEME = "file://"
MAX_TEXT_BYTES = 2**26
"""Largest JSON file that is read."""
RECENT_NS = 10**9
"""A file that changed this recently may change again without a new time stamp, so its digest is not remembered."""


def local_folder(uri: str | Path) -> Path:
    """Path of a folder that is given as a path or as `file:///…`.

    Raises:
        DataError: the URI names a folder of another machine.
    """
    if not str(uri).startswith(FILE_SCHEME):
        return Path(uri)
    host, slash, path = str(uri).removeprefix(FILE_SCHEME).partition("/")
    if host not in ("", "localhost") or not slash:
        raise DataError(f"{uri}: not a folder of this machine; write an absolute path, {FILE_SCHEME}/…")
    return Path(url2pathname(slash + path))


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing; put it at `path` when the block ends without an error.

    It replaces nothing or a regular file, whose permissions stay; behind a symbolic link, the file that the link names.
    A pipe, a terminal, a character device (`/dev/null`) or an open file (`/dev/stdout`) gets the complete content
    instead.

    Raises:
        DataError: `path` is a folder, a socket, a disk or a pipe that nothing reads; or it cannot be written. The
            temporary file is deleted.
        NoSpaceError: the disk is full. The temporary file is deleted.
    """
    path = Path(path)
    mode = output_mode(path)
    if mode is not None and (not stat.S_ISREG(mode) or standard_stream(path) is not None):
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            stream_into(path, file)
        return
    remedy = "choose another folder"
    try:
        with replaced_file(Path(os.path.realpath(path)), mode) as file:
            remedy = "the partial file was deleted"
            yield file
    except OSError as error:
        raise cannot_write(path, error, remedy) from error


@contextmanager
def replaced_file(path: Path, mode: int | None) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; put it there, readable for all, when the block ends without an error.

    The path holds the complete old or the complete new file at any time. `mode` is that of the old file; None: there is
    none.

    Raises:
        OSError: it cannot be written. The old file stays, and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644 if mode is None else stat.S_IMODE(mode))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_file(path) as file:
        file.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Indented JSON, as `write_json` writes it."""
    # A name that is not UTF-8 contains lone surrogates; the replacement is their JSON escape.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def remove_temporary_files(folder: Path, name: str) -> None:
    """Remove the temporary files that a killed process left when it wrote the file `name` with `atomic_file`."""
    for path in folder.glob(f".{glob.escape(name)}.*"):
        path.unlink(missing_ok=True)


@contextmanager
def held_lock(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file, which stays there. A process that dies releases its lock.

    Raises:
        filelock.Timeout: another process or thread holds the lock for longer than `patience_s`; below 0: never.
        DataError: the file cannot be created, or the file system has no locks (NFS without its lock service).
    """
    lock = FileLock(path, timeout=patience_s, poll_interval=0.2)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        remedy = "choose a folder that can be written, on a file system with locks"
        raise DataError(f"{path.parent}: cannot be locked ({error.strerror}); {remedy}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def exclusive_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file, without waiting; delete it at the end. A process that dies releases its lock.

    Raises:
        DataError: another process holds the lock (the message is `busy`), or the file cannot be created.
    """
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise DataError(busy) from error
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: who opens it now finds a file without a name
        lock.release()


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Convert the errors of the operating system while a file is read.

    Raises:
        DataError: the file does not exist or cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"{path}: cannot be read ({reason}); check that it is a file and its permissions") from error


@contextmanager
def open_file(path: str | Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; errors as in `reading`. (A pipe or a device could block or never end.)"""
    with reading(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            yield file


def first_line(error: BaseException) -> str:
    """The first line of the message of an error, at most 200 characters; its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def read_text(path: str | Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Read UTF-8 text of at most `limit` bytes.

    Raises:
        DataError: the file is missing, cannot be read, is too large, or is not UTF-8.
    """
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"{path}: larger than {limit:,} bytes, so it was not written by metagmvae")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def parse_json(text: str, path: str | Path) -> Any:
    """Parse JSON; `path` is for the message.

    Raises:
        DataError: it is not valid JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{path}: not valid JSON (nested too deeply)") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    except ValueError as error:  # more digits than Python converts
        raise DataError(f"{path}: not valid JSON (an integer of thousands of digits)") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, cannot be read, or is not valid JSON.
    """
    return parse_json(read_text(path), path)


def check_document(schema: type[Document], content: Any, path: str | Path, remedy: str) -> Document:
    """Check a parsed document against its schema.

    Raises:
        DataError: naming the file, the first wrong key and its value.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path}: {mistake_text(error.errors()[0])}; {remedy}") from error


def sha256_file(path: str | Path) -> str:
    """sha256 of the content of a file, in hexadecimal."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: str | Path) -> str:
    """sha256 of a file, which is read only once per process unless it changes (by inode, size and time stamps)."""
    with reading(path):
        status = os.stat(path)
    changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
    if time.time_ns() - changed_ns < RECENT_NS:
        return sha256_file(path)
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _remembered_sha256(str(path), identity)


@lru_cache(maxsize=2**16)
def _remembered_sha256(path: str, identity: tuple[int, ...]) -> str:
    return sha256_file(path)


def sha256_json(value: Any) -> str:
    """sha256 of the canonical JSON form of a value, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
