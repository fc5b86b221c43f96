"""Reads a dataset: images or features by row for training, labels and index for evaluation.

There are two exact readers: `memory` reads a split into one array, and `mmap` maps the tar files into memory. A third,
approximate one is `stream` (`pipelines.sampling.sequential`), for data that do not fit on the local disk. No reader
needs the index, which contains the labels, so training without labels cannot see them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa

from metagmvae.pipelines.files import sha256_file
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.index import read_index
from metagmvae.pipelines.shards.manifest import INDEX, MANIFEST, dataset_fingerprint, read_manifest
from metagmvae.pipelines.shards.object_store import RemotePrefix, is_remote, open_copy
from metagmvae.pipelines.shards.writer import PLAN, shard_blocks

MIB = 2**20
Reader = Literal["auto", "memory", "mmap"]


class MappedRows:
    """Rows of a split, mapped from its tar files: `rows[indices] -> (n, C, H, W)` or `(n, F)`."""

    def __init__(self, blocks: list[np.ndarray]) -> None:
        self.blocks = blocks
        self.starts = np.cumsum([0, *(len(block) for block in blocks)])
        self.shape = (int(self.starts[-1]), *blocks[0].shape[1:])
        self.dtype = blocks[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = np.arange(len(self))[rows]
        flat = np.atleast_1d(rows)
        out = np.empty((len(flat), *self.shape[1:]), self.dtype)
        block_of_row = np.searchsorted(self.starts, flat, side="right") - 1
        for block in np.unique(block_of_row):
            in_block = block_of_row == block
            out[in_block] = self.blocks[block][flat[in_block] - self.starts[block]]
        return out if np.ndim(rows) else out[0]


class Dataset:
    """An open dataset; `pipelines/README.md` describes its files.

    >>> import metagmvae
    >>> data = metagmvae.Dataset.open("data/glyphs")         # or s3://bucket/prefix
    >>> data.splits
    ['train', 'validation', 'test']
    >>> data.images("test").shape[1:]                        # uint8 (n, C, H, W), read by row indices
    (1, 28, 28)
    >>> len(data.labels("test")) == len(data.images("test"))
    True
    """

    def __init__(self, root: Path, manifest: dict[str, Any], remote: RemotePrefix | None = None) -> None:
        self.root = root
        self.remote = remote
        self.uri = remote.uri if remote else str(root.absolute())
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.kind: Literal["images", "features"] = manifest["kind"]
        self.image_shape: tuple[int, int, int] = tuple(manifest["image_shape"])
        """(C, H, W) of the images, or of the images that the features were computed from."""
        features = self.kind == "features"
        self.row_shape: tuple[int, ...] = (manifest["feature_size"],) if features else self.image_shape
        self.dtype = np.dtype(manifest["dtype"])
        self.splits: list[str] = list(manifest["splits"])
        recorded = manifest.get("preprocessing")
        self.preprocessing = None if recorded is None else Preprocessing.model_validate(recorded)
        """What `metagmvae prepare` did to each image; None if an older version wrote the dataset (unknown)."""
        # The digest of the file itself for a manifest of an older version, whatever its formatting.
        self.fingerprint = sha256_file(root / MANIFEST) if recorded is None else dataset_fingerprint(manifest)

    @classmethod
    def open(cls, uri: str | Path) -> Dataset:
        """Open the dataset in a folder or under a prefix (`s3://bucket/prefix`).

        A remote dataset is copied to this machine, each split when it is requested (`pipelines.shards.object_store`).

        Raises:
            DataError: no dataset exists there, it is unfinished, or it has another schema version.
        """
        if is_remote(uri):
            folder, remote = open_copy(str(uri))
            return cls(folder, read_manifest(folder / MANIFEST), remote)
        root = Path(str(uri).removeprefix("file://"))
        if not (root / MANIFEST).is_file():
            if (root / PLAN).exists():
                raise DataError(f"{root}: not finished; run the same `metagmvae prepare` again to finish it")
            raise DataError(f"{root}: no {MANIFEST} there; write a dataset with `metagmvae prepare`")
        return cls(root, read_manifest(root / MANIFEST))

    def split(self, name: str) -> dict[str, Any]:
        """Entry of a split in the manifest.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.manifest["splits"]:
            raise DataError(f"{self.root}: no split {name!r}; choose one of {', '.join(self.splits)}")
        return self.manifest["splits"][name]

    def rows(
        self,
        split: str,
        reader: Reader = "auto",
        memory_limit_mb: int = 4096,
        check: bool = True,
    ) -> np.ndarray | MappedRows:
        """Images (n, C, H, W) or features (n, F) of a split in stored order, indexable by arrays of row indices.

        Args:
            split: name of the split.
            reader: `memory`, `mmap`, or `auto`: memory up to the limit, else mmap.
            memory_limit_mb: limit for `auto` in MiB.
            check: compare every shard with its sha256. The size is always compared.

        Raises:
            DataError: a shard is missing, truncated or altered.
        """
        part = self.split(split)
        blocks = [block for shard in part["shards"] for block in self._blocks(split, shard, check)]
        if not blocks:
            return np.empty((0, *self.row_shape), self.dtype)
        size = part["samples"] * int(np.prod(self.row_shape)) * self.dtype.itemsize
        if reader == "mmap" or (reader == "auto" and size > memory_limit_mb * MIB):
            return MappedRows(blocks)
        return np.concatenate(blocks)

    def _blocks(self, split: str, shard: dict[str, Any], check: bool) -> list[np.ndarray]:
        path = self._local_path(f"{split}/{shard['name']}", shard["sha256"])
        remedy = "`metagmvae verify` lists all damaged files; write the dataset again"
        if not path.is_file():
            raise DataError(f"{path}: shard is missing; {remedy}")
        if path.stat().st_size != shard["bytes"]:
            raise DataError(f"{path}: shard has {path.stat().st_size} bytes instead of {shard['bytes']}; {remedy}")
        if check and sha256_file(path) != shard["sha256"]:
            raise DataError(f"{path}: shard was altered after writing (sha256 differs); {remedy}")
        blocks = shard_blocks(path)
        for _, shape, dtype in blocks:
            if shape[1:] != self.row_shape or np.dtype(dtype) != self.dtype:
                raise DataError(
                    f"{path}: rows are {dtype} {shape[1:]}, but {self.dtype.str} {self.row_shape} in the manifest; "
                    f"{remedy}"
                )
        return [
            np.memmap(path, dtype=np.dtype(dtype), mode="r", offset=offset, shape=shape)
            for offset, shape, dtype in blocks
        ]

    def images(self, split: str, reader: Reader = "auto", memory_limit_mb: int = 4096) -> np.ndarray | MappedRows:
        """Images of a split; see `rows`.

        Raises:
            DataError: the dataset contains features, or a shard is damaged.
        """
        if self.kind != "images":
            raise DataError(f"{self.uri}: contains features, but images are needed; use the dataset of the images")
        return self.rows(split, reader, memory_limit_mb)

    def attachment(self, name: str) -> Path:
        """Local path of an additional file of the dataset (the encoder of features).

        Raises:
            DataError: it does not exist or was altered.
        """
        attachments = self.manifest.get("attachments", {})
        if name not in attachments:
            raise DataError(f"{self.uri}: has no {name}; write the dataset again")
        path = self._local_path(name, attachments[name]["sha256"])
        if not path.is_file() or sha256_file(path) != attachments[name]["sha256"]:
            raise DataError(f"{path}: missing or altered (sha256 differs); write the dataset again")
        return path

    def index(self, split: str) -> pa.Table:
        """The index of a split; its rows are the samples in stored order."""
        return read_index(self._local_path(f"{split}/{INDEX}", self.split(split)["index_sha256"]))

    @contextmanager
    def open_file(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file of the dataset as a stream of bytes, without a local copy.

        Raises:
            DataError: the file is missing.
        """
        if self.remote is not None:
            with self.remote.open(name) as file:
                yield file
            return
        if not (self.root / name).is_file():
            raise DataError(f"{self.root / name}: shard is missing; `metagmvae verify` lists all damaged files")
        with open(self.root / name, "rb") as file:
            yield file

    def _local_path(self, name: str, digest: str) -> Path:
        """Path of a file on this machine; a remote file is downloaded first."""
        path = self.root / name
        if self.remote is not None and not path.is_file():
            self.remote.fetch(name, path, digest)
        return path

    def labels(self, split: str) -> np.ndarray:
        """Class ids in stored order, int64 (n,)."""
        return self.index(split)["class_id"].to_numpy().astype(np.int64)

    def class_names(self, split: str) -> list[str]:
        """Class names, indexed by class id."""
        table = self.index(split).select(["class_id", "class_name"])
        names = dict(zip(table["class_id"].to_pylist(), table["class_name"].to_pylist(), strict=True))
        return [names[class_id] for class_id in sorted(names)]
