"""Datasets in object stores (`s3://bucket/prefix`), through the file systems of Apache Arrow.

Reading makes a copy on this machine: `dataset.json` at once, the files of a split when the split is requested. The
sha256 of every file is compared with the manifest during the download. Credentials, region and endpoint come from the
usual environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL), from the role of
the instance, or from the URI (`s3://KEY:SECRET@bucket/prefix?endpoint_override=http://host:port`); KEY and SECRET are
used and not stored, so a later command needs them again (`configs.credentials`).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from metagmvae.configs.credentials import redact, take_credentials, with_credentials
from metagmvae.pipelines.files import FILE_SCHEME, MAX_TEXT_BYTES, atomic_file, first_line, sha256_file
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.manifest import MANIFEST, dataset_files, dataset_fingerprint, read_manifest

CHUNK = 2**22
"""Bytes per read of a download or upload."""
CACHE = "METAGMVAE_CACHE"
"""Environment variable with the folder of the copies."""
URI_CHARACTERS = ":/?@[]!$&'()*+,;=~%"
"""Characters that mean something in the URI of a prefix. All others, such as spaces, `#` and `é`, are part of names."""
REMEDY = (
    "check region, endpoint and credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; those of a URI are not "
    "stored: give them again)"
)


def is_remote(uri: str | Path) -> bool:
    """Whether a URI names an object store and not a local folder."""
    return "://" in str(uri) and not str(uri).startswith(FILE_SCHEME)


def cache_root() -> Path:
    """Folder of the copies: METAGMVAE_CACHE, or `metagmvae` in the user's cache folder."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metagmvae"


class RemotePrefix:
    """The files of a dataset under a prefix of an object store.

    All methods raise DataError with one line if the store refuses a request or cannot be reached.
    """

    def __init__(self, uri: str) -> None:
        """Connect to the store.

        Raises:
            DataError: the URI is not the address of a supported store.
        """
        self.uri = take_credentials(uri)
        try:
            self.files, self.prefix = fs.FileSystem.from_uri(quote(with_credentials(self.uri), safe=URI_CHARACTERS))
        except OSError as error:
            raise DataError(f"{self.uri}: {redact(first_line(error))}; {REMEDY}") from error
        except (pa.ArrowInvalid, ValueError) as error:
            reason = redact(first_line(error))
            raise DataError(f"{self.uri}: not an address of an object store ({reason}); use s3://…") from error

    def fetch(self, name: str, target: Path, digest: str | None = None, size: int | None = None) -> None:
        """Download one file and check its size and sha256; on an error nothing is left at `target`."""
        with atomic_file(target) as file:
            self.copy(name, file, digest, size)

    def copy(self, name: str, target: IO[bytes], digest: str | None = None, size: int | None = None) -> None:
        """Write the content of one file into an open file and check its size and sha256, where they are given."""
        sha256, copied = hashlib.sha256(), 0
        with self.open(name) as source:
            for chunk in self._chunks(source, name):
                sha256.update(chunk)
                copied += len(chunk)
                if size is not None and copied > size:
                    raise DataError(f"{self.uri}: {name} has more than {size:,} bytes; publish it again")
                target.write(chunk)
        if digest is not None and sha256.hexdigest() != digest:
            raise DataError(f"{self.uri}: {name} was altered after writing (sha256 differs); publish it again")

    def sha256(self, name: str) -> str:
        """Digest of the content of one file."""
        sha256 = hashlib.sha256()
        with self.open(name) as source:
            for chunk in self._chunks(source, name):
                sha256.update(chunk)
        return sha256.hexdigest()

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open one file as a stream of bytes."""
        with self._store_errors(name), self.files.open_input_stream(f"{self.prefix}/{name}") as source:
            yield source

    def _chunks(self, source: IO[bytes], name: str) -> Iterator[bytes]:
        """Content of a file. Errors of the store become DataError here, or `atomic_file` would report a full disk."""
        while True:
            with self._store_errors(name):
                chunk = source.read(CHUNK)
            if not chunk:
                return
            yield chunk

    def put(self, source: Path, name: str) -> None:
        """Upload one local file; it appears in the store when it is complete."""
        with (
            open(source, "rb") as file,
            self._store_errors(name),
            self.files.open_output_stream(f"{self.prefix}/{name}") as target,
        ):
            while chunk := file.read(CHUNK):
                target.write(chunk)

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of all files under the prefix, by name."""
        with self._store_errors():
            infos = self.files.get_file_info(fs.FileSelector(self.prefix, recursive=True, allow_not_found=True))
        return {info.path[len(self.prefix) :].lstrip("/"): info.size for info in infos if info.is_file}

    @contextmanager
    def _store_errors(self, name: str = "") -> Iterator[None]:
        """Convert errors of the store to DataError."""
        try:
            yield
        except FileNotFoundError as error:
            raise DataError(f"{self.uri}: {name or 'bucket or prefix'} does not exist; check the address") from error
        except (OSError, pa.ArrowException) as error:
            place = f"{self.uri} ({name})" if name else self.uri
            raise DataError(f"{place}: {redact(first_line(error))}; {REMEDY}") from error


def open_copy(uri: str) -> tuple[Path, RemotePrefix]:
    """Download the manifest of a remote dataset; return the folder of the copy and the remote prefix.

    The folder is named by the sha256 of the manifest, so another dataset under the same prefix gets another folder.
    """
    remote = RemotePrefix(uri)
    manifest = cache_root() / "arriving" / f"{hashlib.sha256(remote.uri.encode()).hexdigest()[:16]}-{os.getpid()}.json"
    try:
        remote.fetch(MANIFEST, manifest, None, MAX_TEXT_BYTES)
        read_manifest(manifest)
        folder = cache_root() / "datasets" / sha256_file(manifest)
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(manifest, folder / MANIFEST)
    finally:
        manifest.unlink(missing_ok=True)
    return folder, remote


@contextmanager
def temporary_copy(uri: str) -> Iterator[Path]:
    """Copy of all files under a prefix in a temporary folder, unchecked and including unknown files."""
    remote = RemotePrefix(uri)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for name in remote.sizes():
            target = (root / name).resolve()
            if not target.is_relative_to(root):
                raise DataError(f"{remote.uri}: object name {name!r} points outside the prefix; delete the object")
            remote.fetch(name, target)
        yield root


def publish(folder: Path, uri: str) -> dict[str, Any]:
    """Upload a finished dataset, `dataset.json` last; return its manifest.

    Files that the store already has are skipped, so an interrupted upload can be continued. Their content is compared:
    an upload of another dataset, with shards of the same size, may have been interrupted there before.

    Raises:
        DataError: the prefix contains another dataset, or the store refuses a request.
    """
    manifest = read_manifest(folder / MANIFEST)
    remote = RemotePrefix(uri)
    stored = remote.sizes()
    if MANIFEST in stored:
        with remote.open(MANIFEST) as file:
            existing = file.read()
        if existing == (folder / MANIFEST).read_bytes():
            return manifest
        # An older version wrote the same dataset without its preprocessing; the new manifest replaces that one.
        if hashlib.sha256(existing).hexdigest() != dataset_fingerprint(manifest):
            raise DataError(f"{remote.uri}: contains another dataset; choose another prefix")
    for name, _, digest in dataset_files(manifest):
        if stored.get(name) != (folder / name).stat().st_size or remote.sha256(name) != digest:
            remote.put(folder / name, name)
    remote.put(folder / MANIFEST, MANIFEST)
    return manifest
