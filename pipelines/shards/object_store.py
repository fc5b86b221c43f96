"""Data sets in object stores: `s3://bucket/prefix`, by Arrow's file systems.

Reading keeps a copy per node: `dataset.json` at once, a split when it is asked for, every file compared with the
manifest while it is written. Credentials, region and endpoint come from the usual places (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, instance roles) or stand in the URI's query
(`?endpoint_override=http://host:port`).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyarrow import fs

from metagmvae.pipelines.files import atomic_file, read_json, sha256_file
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.manifest import MANIFEST, dataset_files, parse_manifest

CHUNK = 2**22
CACHE = "METAGMVAE_CACHE"
REMEDY = "look at credentials, region and endpoint"


def is_remote(uri: str | Path) -> bool:
    """Whether it names an object store rather than a folder."""
    return "://" in str(uri) and not str(uri).startswith("file://")


def cache_root() -> Path:
    """Folder of copies: METAGMVAE_CACHE, else `metagmvae` in the user's cache folder."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metagmvae"


class RemotePrefix:
    """The files of a data set under a prefix of an object store.

    Raises:
        DataError: the URI is of no known kind; on use: what the store refuses, in one line.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            self.files, self.prefix = fs.FileSystem.from_uri(uri)
        except OSError as error:
            raise DataError(f"{uri}: {_first(error)}; {REMEDY}") from error
        except (pa.ArrowInvalid, ValueError) as error:
            raise DataError(f"{uri}: not an address of an object store ({_first(error)}); give s3://…") from error

    def fetch(self, name: str, target: Path, digest: str | None = None) -> None:
        """Copy one file; whole and with this sha256, or not at all."""
        seen = hashlib.sha256()
        with self._errors(name), self.open(name) as source, atomic_file(target) as file:
            while chunk := source.read(CHUNK):
                seen.update(chunk)
                file.write(chunk)
            if digest is not None and seen.hexdigest() != digest:
                raise DataError(
                    f"{self.uri}: {name} was altered after it was written (sha256 differs); publish it again"
                )

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """One file as a stream of bytes."""
        with self._errors(name):
            source = self.files.open_input_stream(f"{self.prefix}/{name}")
        with source:
            yield source

    def _chunks(self, source: IO[bytes], name: str) -> Iterator[bytes]:
        """Bytes of a file; what goes wrong is the store's doing, not that of the file they go to."""
        while True:
            with self._errors(name):
                chunk = source.read(CHUNK)
            if not chunk:
                return
            yield chunk

    def put(self, source: Path, name: str) -> None:
        """Copy a local file there; objects appear whole."""
        with (
            self._errors(name),
            open(source, "rb") as file,
            self.files.open_output_stream(f"{self.prefix}/{name}") as target,
        ):
            while chunk := file.read(CHUNK):
                target.write(chunk)

    def sizes(self) -> dict[str, int]:
        """Size by name of everything under the prefix."""
        with self._errors(""):
            found = self.files.get_file_info(fs.FileSelector(self.prefix, recursive=True, allow_not_found=True))
        return {item.path[len(self.prefix) :].lstrip("/"): item.size for item in found if item.is_file}

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise DataError(f"{self.uri}: no {name or 'such bucket or prefix'} there") from error
        except (OSError, pa.ArrowException) as error:
            what = f"{self.uri}{f' ({name})' if name else ''}"
            raise DataError(f"{what}: {_first(error)}; {REMEDY}") from error


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def open_copy(uri: str) -> tuple[Path, RemotePrefix]:
    """The node's copy of a remote data set, with its manifest only: (folder, where the rest is).

    The folder's name is the manifest's sha256: another data set under the same prefix is another copy.
    """
    remote = RemotePrefix(uri)
    arrivals = cache_root() / "arriving" / f"{hashlib.sha256(uri.encode()).hexdigest()[:16]}-{os.getpid()}.json"
    try:
        remote.fetch(MANIFEST, arrivals)
        parse_manifest(arrivals)
        folder = cache_root() / "datasets" / sha256_file(arrivals)
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(arrivals, folder / MANIFEST)
    finally:
        arrivals.unlink(missing_ok=True)
    return folder, remote


@contextmanager
def temporary_copy(uri: str) -> Iterator[Path]:
    """Everything under a prefix in a folder for the time being, unknown files too, nothing compared."""
    remote = RemotePrefix(uri)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for name in remote.sizes():
            target = (root / name).resolve()
            if not target.is_relative_to(root):
                raise DataError(f"{uri}: the name {name!r} leads out of the prefix; delete that object")
            remote.fetch(name, target)
        yield root


def publish(folder: Path, uri: str) -> dict[str, Any]:
    """Copy a finished data set to an object store, `dataset.json` last; return its manifest.

    Files that are there with their size are not sent again: a copy that was stopped is finished.

    Raises:
        DataError: the prefix holds another data set, or the store refuses.
    """
    manifest = read_json(folder / MANIFEST)
    parse_manifest(folder / MANIFEST)
    remote = RemotePrefix(uri)
    there = remote.sizes()
    if MANIFEST in there:
        with remote.open(MANIFEST) as file:
            if file.read() == (folder / MANIFEST).read_bytes():
                return manifest
        raise DataError(f"{uri}: holds another data set; choose another prefix")
    for name, _, _ in dataset_files(manifest):
        if there.get(name) != (folder / name).stat().st_size:
            remote.put(folder / name, name)
    remote.put(folder / MANIFEST, MANIFEST)
    return manifest
