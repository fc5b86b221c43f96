"""A data set on disk: images by row for training, labels and index for judging.

Two exact readers: `memory` decodes a split once into one array, `mmap` reads rows from the tars in place; and one
for what fits nowhere, `stream` (`pipelines.sampling.sequential`). None
needs the index, where the labels stand: what trains without labels cannot see them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa

from metagmvae.pipelines.files import read_json, sha256_file
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.index import read_index
from metagmvae.pipelines.shards.manifest import INDEX, MANIFEST, parse_manifest
from metagmvae.pipelines.shards.object_store import RemotePrefix, is_remote, open_copy
from metagmvae.pipelines.shards.writer import PLAN, shard_blocks

MIB = 2**20
Reader = Literal["auto", "memory", "mmap"]


class MappedRows:
    """Rows of a split read in place from its tars: `rows[numbers] -> (n, C, H, W) or (n, F)`."""

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
        owner = np.searchsorted(self.starts, flat, side="right") - 1
        for number in np.unique(owner):
            here = owner == number
            out[here] = self.blocks[number][flat[here] - self.starts[number]]
        return out if np.ndim(rows) else out[0]


class Dataset:
    """An opened data set; see the contract in `pipelines.shards.writer`."""

    def __init__(self, root: Path, manifest: dict[str, Any], remote: RemotePrefix | None = None) -> None:
        self.root = root
        self.remote = remote
        self.uri = remote.uri if remote else str(root.absolute())
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.kind: Literal["images", "features"] = manifest["kind"]
        self.image_shape: tuple[int, int, int] = tuple(manifest["image_shape"])
        """Of the images, or of those that the features were made of."""
        features = self.kind == "features"
        self.row_shape: tuple[int, ...] = (manifest["feature_size"],) if features else self.image_shape
        self.dtype = np.dtype(manifest["dtype"])
        self.splits: list[str] = list(manifest["splits"])
        self.fingerprint = sha256_file(root / MANIFEST)

    @classmethod
    def open(cls, uri: str | Path) -> Dataset:
        """Open a data set by the folder or the prefix (`s3://bucket/prefix`) that holds `dataset.json`.

        Of a prefix this node keeps a copy, each split from when it is asked for; see `pipelines.shards.object_store`.

        Raises:
            DataError: there is none, it was not finished, or it is of another schema version.
        """
        if is_remote(uri):
            folder, remote = open_copy(str(uri))
            return cls(folder, read_json(folder / MANIFEST), remote)
        root = Path(str(uri).removeprefix("file://"))
        if not (root / MANIFEST).is_file():
            if (root / PLAN).exists():
                raise DataError(f"{root}: was not finished; run the same `metagmvae prepare` again to finish it")
            raise DataError(f"{root}: no {MANIFEST} there; write a data set with `metagmvae prepare`")
        parse_manifest(root / MANIFEST)
        return cls(root, read_json(root / MANIFEST))

    def split(self, name: str) -> dict[str, Any]:
        """Manifest part of a split.

        Raises:
            DataError: there is no such split; names those there are.
        """
        if name not in self.manifest["splits"]:
            raise DataError(f"{self.root}: no split {name!r}; it has {', '.join(self.splits)}")
        return self.manifest["splits"][name]

    def rows(
        self,
        split: str,
        reader: Reader = "auto",
        memory_limit_mb: int = 4096,
        check: bool = True,
    ) -> np.ndarray | MappedRows:
        """Images or features of a split in stored order, (n, C, H, W) or (n, F), indexable by arrays of rows.

        Args:
            split: its name.
            reader: `memory`, `mmap`, or `auto`: memory up to the limit.
            memory_limit_mb: in MiB, of decoded rows.
            check: compare every shard with its sha256 (a shard of another size is refused always).

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
        path = self._here(f"{split}/{shard['name']}", shard["sha256"])
        remedy = "`metagmvae verify` lists all damage; write the data set again"
        if not path.is_file():
            raise DataError(f"{path}: shard is missing; {remedy}")
        if path.stat().st_size != shard["bytes"]:
            raise DataError(f"{path}: shard has {path.stat().st_size} bytes, not {shard['bytes']}; {remedy}")
        if check and sha256_file(path) != shard["sha256"]:
            raise DataError(f"{path}: shard was altered after it was written (sha256 differs); {remedy}")
        blocks = shard_blocks(path)
        for _, shape, dtype in blocks:
            if shape[1:] != self.row_shape or np.dtype(dtype) != self.dtype:
                raise DataError(
                    f"{path}: holds rows {dtype} {shape[1:]}, and the manifest says {self.dtype.str} {self.row_shape}; "
                    f"{remedy}"
                )
        return [
            np.memmap(path, dtype=np.dtype(dtype), mode="r", offset=offset, shape=shape)
            for offset, shape, dtype in blocks
        ]

    def images(self, split: str, reader: Reader = "auto", memory_limit_mb: int = 4096) -> np.ndarray | MappedRows:
        """Images of a split; see `rows`.

        Raises:
            DataError: the data set holds features, or a shard is damaged.
        """
        if self.kind != "images":
            raise DataError(f"{self.uri}: holds features, and images are needed here; name the data set of the images")
        return self.rows(split, reader, memory_limit_mb)

    def attachment(self, name: str) -> Path:
        """A file that goes with the data set, whole and on this node.

        Raises:
            DataError: there is none, or it was altered.
        """
        known = self.manifest.get("attachments", {})
        if name not in known:
            raise DataError(f"{self.uri}: has no {name}; write the data set again")
        path = self._here(name, known[name]["sha256"])
        if not path.is_file() or sha256_file(path) != known[name]["sha256"]:
            raise DataError(f"{path}: is missing or was altered (sha256 differs); write the data set again")
        return path

    def index(self, split: str) -> pa.Table:
        """The index of a split, samples in stored order."""
        part = self.split(split)
        return read_index(self._here(f"{split}/{INDEX}", part["index_sha256"]))

    @contextmanager
    def open_file(self, name: str) -> Iterator[IO[bytes]]:
        """A file of the data set as a stream of bytes; nothing is kept on this node.

        Raises:
            DataError: it is missing.
        """
        if self.remote is not None:
            with self.remote.open(name) as file:
                yield file
            return
        if not (self.root / name).is_file():
            raise DataError(f"{self.root / name}: shard is missing; `metagmvae verify` lists all damage")
        with open(self.root / name, "rb") as file:
            yield file

    def _here(self, name: str, digest: str) -> Path:
        """A file of the data set on this node, fetched if need be."""
        path = self.root / name
        if self.remote is not None and not path.is_file():
            self.remote.fetch(name, path, digest)
        return path

    def labels(self, split: str) -> np.ndarray:
        """Class ids in stored order, int64 (n,)."""
        return self.index(split)["class_id"].to_numpy().astype(np.int64)

    def class_names(self, split: str) -> list[str]:
        """Names by class id."""
        table = self.index(split).select(["class_id", "class_name"])
        names = dict(zip(table["class_id"].to_pylist(), table["class_name"].to_pylist(), strict=True))
        return [names[number] for number in sorted(names)]
