"""Reads a dataset: images or features by row for training, labels and index for evaluation.

There are two exact readers: `memory` reads a split into one array, and `mmap` maps the tar files into memory (encoded
images are decoded once by `memory`, and by `mmap` whenever they are read). A third,
approximate one is `stream` (`pipelines.sampling.sequential`), for data that do not fit on the local disk. No reader
needs the index, which contains the labels, so training without labels cannot see them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa

from metagmvae.pipelines.files import local_folder, open_file, reading, sha256_file
from metagmvae.pipelines.grouped_labels import EpisodeLabels, GroupedLabels
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.blocks import Block, MappedRows, block_positions, shard_blocks
from metagmvae.pipelines.shards.checked_file import SHARD_REMEDY, check_file
from metagmvae.pipelines.shards.encoded import EncodedRows, EncodedShard, Members, image_members, stream_images
from metagmvae.pipelines.shards.index import GROUP, read_index
from metagmvae.pipelines.shards.manifest import INDEX, LATER_KEYS, MANIFEST, dataset_fingerprint, read_manifest
from metagmvae.pipelines.shards.object_store import RemotePrefix, is_remote, open_copy
from metagmvae.pipelines.shards.unfinished import PLAN
from metagmvae.pipelines.vectors import VECTORS, image_remedy

MIB = 2**20
SPOOL_BYTES = 64 * MIB
"""Memory for a shard that is streamed from an object store; larger ones are written to the temporary folder."""
Reader = Literal["auto", "memory", "mmap"]


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
        self.content = VECTORS if features and manifest["encoder"].get("encoder") == VECTORS else self.kind
        """`images`, `features`, or `vectors`: features that a user computed elsewhere, of no images that are known."""
        self.dtype = np.dtype(manifest["dtype"])
        self.encoded = "store" in manifest
        """Whether the shards contain encoded images."""
        self.splits: list[str] = list(manifest["splits"])
        recorded = manifest.get("preprocessing")
        self.preprocessing = None if recorded is None else Preprocessing.model_validate(recorded)
        """What `metagmvae prepare` did to each image; None if an older version wrote the dataset (unknown)."""
        # The digest of the file itself for a manifest of an older version, whatever its formatting.
        later = any(key in manifest for key in LATER_KEYS)
        self.fingerprint = dataset_fingerprint(manifest) if later else sha256_file(root / MANIFEST)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.row_shape))
        counts = ", ".join(f"{split} {part['samples']:,}" for split, part in self.manifest["splits"].items())
        return f"<Dataset {self.uri}: {self.kind} {shape}; {counts}>"

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
        root = local_folder(uri)
        with reading(root):
            exists = (root / MANIFEST).exists()
        if not exists:
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
    ) -> np.ndarray | MappedRows | EncodedRows:
        """Images (n, C, H, W) or features (n, F) of a split in stored order, indexable by arrays of row indices.

        Args:
            split: name of the split.
            reader: `memory`, `mmap`, or `auto`: memory up to the limit, else mmap.
            memory_limit_mb: limit for `auto` in MiB.
            check: compare every shard with its sha256, once per process. The size is always compared.

        Raises:
            DataError: a shard is missing, truncated or altered, or `memory` cannot decode an image. (What `mmap`
                returns raises it when the image is read.)
        """
        part = self.split(split)
        if not part["samples"]:
            return np.empty((0, *self.row_shape), self.dtype)
        size = part["samples"] * int(np.prod(self.row_shape)) * self.dtype.itemsize
        mapped = reader == "mmap" or (reader == "auto" and size > memory_limit_mb * MIB)
        if self.encoded:
            encoded = EncodedRows([self._encoded(split, shard, check) for shard in part["shards"]], self.row_shape)
            return encoded if mapped else encoded[:]
        blocks = [block for shard in part["shards"] for block in self._blocks(split, shard, check)]
        return MappedRows(blocks) if mapped else np.concatenate(blocks)

    def _blocks(self, split: str, shard: dict[str, Any], check: bool) -> list[np.ndarray]:
        path = self._checked_shard(split, shard, check)
        with open_file(path) as file:
            blocks = self._row_blocks(file, path, shard)
        return [
            np.memmap(path, dtype=np.dtype(dtype), mode="r", offset=offset, shape=shape)
            for offset, shape, dtype in blocks
        ]

    def _encoded(self, split: str, shard: dict[str, Any], check: bool) -> EncodedShard:
        path = self._checked_shard(split, shard, check)
        with open_file(path) as file:
            members = self._members(file, path, shard)
        return EncodedShard(path, np.memmap(path, mode="r").data, members.offsets, members.sizes)

    def _checked_shard(self, split: str, shard: dict[str, Any], check: bool) -> Path:
        path = self._local_path(f"{split}/{shard['name']}", shard["sha256"], shard["bytes"])
        check_file(path, "shard", shard["sha256"] if check else None, shard["bytes"])
        return path

    def row_positions(self, file: IO[bytes], path: str | Path, shard: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size in bytes of each row of an open shard, int64 (rows,); `path` is for messages.

        Raises:
            DataError: the shard has other rows than the manifest.
        """
        if self.encoded:
            return self._members(file, path, shard)[:2]
        return block_positions(self._row_blocks(file, path, shard))

    def stream_rows(self, file: IO[bytes], path: str | Path, shard: dict[str, Any]) -> Iterator[np.ndarray]:
        """All rows of an open shard in their order, in arrays of some hundreds: (n, C, H, W) or (n, F).

        Raises:
            DataError: the shard has other rows than the manifest, or an image cannot be decoded.
        """
        if self.encoded:
            yield from stream_images(file, path, self._members(file, path, shard), self.row_shape)
            return
        for offset, shape, dtype in self._row_blocks(file, path, shard):
            file.seek(offset)
            raw = file.read(math.prod(shape) * np.dtype(dtype).itemsize)
            yield np.frombuffer(raw, dtype).reshape(shape)

    def _members(self, file: IO[bytes], path: str | Path, shard: dict[str, Any]) -> Members:
        members = image_members(file, path)
        _compare_rows(path, len(members.offsets), shard)
        return members

    def _row_blocks(self, file: IO[bytes], path: str | Path, shard: dict[str, Any]) -> list[Block]:
        """Blocks of an open shard, compared with its entry in the manifest."""
        blocks = shard_blocks(file, path)
        for _, shape, dtype in blocks:
            if shape[1:] != self.row_shape or np.dtype(dtype) != self.dtype:
                raise DataError(
                    f"{path}: rows are {dtype} {shape[1:]}, but {self.dtype.str} {self.row_shape} in the manifest; "
                    f"{SHARD_REMEDY}"
                )
        _compare_rows(path, sum(block.shape[0] for block in blocks), shard)
        return blocks

    def images(
        self, split: str, reader: Reader = "auto", memory_limit_mb: int = 4096
    ) -> np.ndarray | MappedRows | EncodedRows:
        """Images of a split; see `rows`.

        Raises:
            DataError: the dataset contains features, or a shard is damaged.
        """
        if self.kind != "images":
            raise DataError(f"{self.uri}: contains {self.content}, but images are needed; {image_remedy(self.content)}")
        return self.rows(split, reader, memory_limit_mb)

    def attachment(self, name: str) -> Path:
        """Local path of an additional file of the dataset (the encoder of features).

        Raises:
            DataError: it does not exist or was altered.
        """
        attachments = self.manifest.get("attachments", {})
        if name not in attachments:
            raise DataError(f"{self.uri}: has no {name}; write the dataset again")
        path = self._local_path(name, attachments[name]["sha256"], attachments[name]["bytes"])
        check_file(path, name, attachments[name]["sha256"], attachments[name]["bytes"])
        return path

    def index(self, split: str) -> pa.Table:
        """The index of a split; its rows are the samples in stored order.

        Raises:
            DataError: it is missing, altered or damaged.
        """
        part = self.split(split)
        path = self._local_path(f"{split}/{INDEX}", part["index_sha256"])
        check_file(path, "index", part["index_sha256"])
        return read_index(path, rows=part["samples"], classes=part["classes"], groups=part.get("groups"))

    @contextmanager
    def open_shard(self, split: str, shard: dict[str, Any]) -> Iterator[IO[bytes]]:
        """Open a shard that has the sha256 in the manifest, without keeping a copy of a remote one.

        A remote shard is downloaded into a temporary file (in memory up to `SPOOL_BYTES`), a local one is read in
        place; it is compared once per process.

        Raises:
            DataError: the shard is missing or altered.
        """
        name = f"{split}/{shard['name']}"
        if self.remote is None:
            check_file(self.root / name, "shard", shard["sha256"], shard["bytes"])
            with open_file(self.root / name) as file:
                yield file
            return
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as copy:
            self.remote.copy(name, copy, shard["sha256"], shard["bytes"])
            yield copy

    def _local_path(self, name: str, digest: str, size: int | None = None) -> Path:
        """Path of a file on this machine; a remote file is downloaded first."""
        path = self.root / name
        if self.remote is not None and not path.is_file():
            self.remote.fetch(name, path, digest, size)
        return path

    def labels(self, split: str) -> np.ndarray:
        """Class ids in stored order, int64 (n,)."""
        return self.index(split)["class_id"].to_numpy().astype(np.int64)

    def episode_labels(self, split: str) -> EpisodeLabels:
        """What episodes are drawn from: `labels`, with the groups of the rows if the dataset has groups."""
        labels = self.labels(split)
        if "groups" not in self.split(split):
            return labels
        groups = self.index(split)[GROUP.name].to_numpy().astype(np.int64)
        return GroupedLabels(labels, groups, self.class_names(split))

    def class_names(self, split: str) -> list[str]:
        """Class names, indexed by class id."""
        table = self.index(split).select(["class_id", "class_name"])
        names = dict(zip(table["class_id"].to_pylist(), table["class_name"].to_pylist(), strict=True))
        return [names[class_id] for class_id in sorted(names)]


def _compare_rows(path: str | Path, rows: int, shard: dict[str, Any]) -> None:
    if rows != shard["rows"]:
        raise DataError(f"{path}: {rows:,} rows, but {shard['rows']:,} in the manifest; {SHARD_REMEDY}")
