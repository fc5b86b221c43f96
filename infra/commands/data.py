"""`prepare` writes datasets; `verify` checks them."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.infra.commands.parsing import DRY_RUN_HELP, Answer, FailedAnswer, Parsers, add_command, progress_bar
from metagmvae.pipelines.optional_packages import optional_package
from metagmvae.pipelines.output_target import check_outside
from metagmvae.pipelines.records import DataError

if TYPE_CHECKING:
    from metagmvae.pipelines.records import MapTasks


SOURCE_OPTIONS = (
    *("split", "size", "channels", "invert", "crop", "classes", "labels", "groups", "join_splits"),
    *("fractions", "validation_classes", "test_classes", "max_broken", "allow_missing", "dtype"),
)
"""Options of `prepare` that are passed to the source if given; the source refuses those that it does not have."""
DRAWN_CLASSES = ("folder", "npz", "parquet", "vectors", "webdataset")
"""Sources that draw classes for validation and test, with `--seed`."""


SEED_HELP = "seed of the order of the images, and of the classes that are held out at random (default: 0)"
CONTINUED = "the same command continues with the shards that are finished"
"""What a stopped command that writes shards says."""


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    _add_prepare(parsers)
    example = "metagmvae verify data/omniglot"
    description = "check every file of a dataset and list those that are missing, damaged or do not belong to it"
    parser = add_command(parsers, "verify", verify, description, example)
    parser.add_argument("uri", metavar="URI", help="folder or s3://bucket/prefix of the dataset")


def _add_prepare(parsers: Parsers) -> None:
    example = "metagmvae prepare omniglot --source downloads --out data/omniglot"
    description = "write images or vectors as a dataset: WebDataset shards with an index"
    parser = add_command(parsers, "prepare", prepare, description, example, CONTINUED)
    help_text = "kind of the source: folder, npz (NumPy file), parquet (table of image files), webdataset (tar files "
    help_text += "of others), omniglot, mini-imagenet, glyphs (generated, without files), vectors (of another network: "
    help_text += ".npy, .npz, .parquet), or one that another package adds"
    parser.add_argument("name", metavar="KIND", help=help_text)
    help_text = (
        "folder or file of images or vectors, or folder with the archives of the dataset (Omniglot is downloaded if "
        "this is left out)"
    )
    parser.add_argument("--source", metavar="PATH", help=help_text)
    parser.add_argument("--out", required=True, metavar="URI", help="folder or s3://bucket/prefix to write to")
    parser.add_argument("--split", help="omniglot: 1200-100-323 or vinyals (default: 1200-100-323)")
    help_text = "height and width of the images in pixels (default: omniglot: 28; mini-imagenet: 84; folder: 28 for "
    help_text += "drawings, else the median shorter side of the images, from 28 to 84)"
    parser.add_argument("--size", type=int, metavar="N", help=help_text)
    parser.add_argument("--channels", type=int, help="folder: 1 for grey or 3 for RGB (default: as the images)")
    help_text = "folder: invert the images; use it for dark strokes on a bright background"
    parser.add_argument("--invert", action="store_true", default=None, help=help_text)
    help_text = "folder: resize whole images to squares, which changes their aspect ratio, instead of cutting out the "
    help_text += "middle square; use it for spectrograms and lines of text"
    parser.add_argument("--no-crop", action="store_false", dest="crop", default=None, help=help_text)
    help_text = "folder: sub-folders are not classes; everything becomes the training split"
    parser.add_argument("--unlabelled", action="store_false", dest="classes", default=None, help=help_text)
    help_text = "folder: CSV or JSON Lines file with the columns file and label (and split, if wanted): the classes of "
    help_text += "the images; their folders then mean nothing, and images without a row are left out; vectors: .npy or "
    help_text += "a table with the column label, one row for each vector, in their order"
    parser.add_argument("--labels", metavar="FILE", help=help_text)
    help_text = "folder: column of --labels; npz, parquet: array or column; vectors: one of both; webdataset: suffix "
    help_text += "of a file: its value, such as the patient, keeps images together: the images are divided into the "
    help_text += "splits, not the classes, so the "
    help_text += "splits share classes (default: by classes)"
    parser.add_argument("--groups", metavar="COLUMN", help=help_text)
    help_text = "vectors: number format of the dataset (default: that of the vectors, float16 or float32)"
    parser.add_argument("--dtype", choices=["float16", "float32"], help=help_text)
    help_text = "folder: join folders of the splits that hold the same classes (train/cat, test/cat), and divide the "
    help_text += "classes anew"
    parser.add_argument("--join-splits", action="store_true", default=None, help=help_text)
    help_text = "folder: fractions of the classes (with --groups: of the images; default there: 0.6 0.2 0.2) for the "
    help_text += "three splits"
    parser.add_argument("--fractions", type=float, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help=help_text)
    help_text = "folder: number of classes for the validation split, drawn at random (default: a fifth of the "
    help_text += "classes if there are at least 20, ten of them with 20 images; else 0)"
    parser.add_argument("--validation-classes", type=int, metavar="N", help=help_text)
    help_text = "folder: number of classes for the test split (default: as --validation-classes)"
    parser.add_argument("--test-classes", type=int, metavar="N", help=help_text)
    help_text = "folder: largest fraction of unreadable images that are skipped (default: 0.01)"
    parser.add_argument("--max-broken", type=float, metavar="FRACTION", help=help_text)
    help_text = "mini-imagenet: accept a source that lacks classes or images"
    parser.add_argument("--allow-missing", action="store_true", default=None, help=help_text)
    help_text = "further option of a source, such as image=COLUMN and label=COLUMN of parquet (suffixes of "
    help_text += "webdataset), or of one that another "
    help_text += "package adds; may be repeated"
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", dest="options", help=help_text)
    parser.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    help_text = "images per shard; plain webdataset needs at least one shard for each of its workers (default: 8192)"
    parser.add_argument("--rows-per-shard", type=int, default=8192, metavar="N", help=help_text)
    help_text = "decoded stores pixels; encoded stores photographs as JPEG or WebP files, in a tenth to a half of the "
    help_text += "space: files stay as they were read where that gives exactly the prepared pixels (default: decoded)"
    parser.add_argument("--store", choices=["decoded", "encoded"], default="decoded", help=help_text)
    help_text = "of images that --store encoded encodes again: lossless (WebP), or 1 to 100 (JPEG; default: lossless)"
    parser.add_argument("--quality", metavar="Q", help=help_text)
    add_worker_options(parser)


def add_worker_options(parser: ArgumentParser) -> None:
    """Add `--workers` and `--address` to a command that writes shards."""
    help_text = "number of Ray tasks that write shards at the same time (default: 0, this process without Ray)"
    parser.add_argument("--workers", type=int, default=0, metavar="N", help=help_text)
    help_text = "Ray cluster for --workers: host:port, auto or local (default: RAY_ADDRESS, else a new one here)"
    parser.add_argument("--address", default="", help=help_text)
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN_HELP)


def prepare(arguments: Namespace) -> Answer:
    """Run `metagmvae prepare`."""
    from metagmvae.infra.workflows.prepare import describe_output, write_source
    from metagmvae.pipelines.files import local_folder
    from metagmvae.pipelines.shards.object_store import is_remote
    from metagmvae.pipelines.sources.source import check_integer, open_source

    check_integer("--rows-per-shard", arguments.rows_per_shard, 1)
    layout = {
        "seed": arguments.seed,
        "shard_rows": arguments.rows_per_shard,
        "store": arguments.store,
        "quality": _quality(arguments),
    }
    given = {name: getattr(arguments, name) for name in SOURCE_OPTIONS}
    options = {name: value for name, value in given.items() if value is not None} | _further(arguments.options)
    if arguments.name in DRAWN_CLASSES:
        options["seed"] = arguments.seed
    # Absolute, because Ray workers have other working directories.
    folder = str(Path(arguments.source).absolute()) if arguments.source else None
    if folder is not None and not is_remote(arguments.out):
        check_outside(local_folder(arguments.out).absolute(), Path(folder))
    with task_mapper(arguments) as map_tasks:
        source = open_source(arguments.name, folder, map_tasks=map_tasks, **options)
        if arguments.dry_run:
            answer = describe_output(source, arguments.out, **layout)
            return answer | {"skipped": source.report.get("skipped", []), **source.files}
        with progress_bar("shards", arguments.json) as on_progress:
            return write_source(source, arguments.out, map_tasks=map_tasks, on_progress=on_progress, **layout)


def _quality(arguments: Namespace) -> Any:
    """The quality of images that are encoded again.

    Raises:
        DataError: it is no quality, or nothing is encoded.
    """
    from metagmvae.pipelines.shards.manifest import LOSSLESS

    given = arguments.quality
    if given is None or (given == LOSSLESS and arguments.store == "encoded"):
        return LOSSLESS
    if arguments.store == "decoded":
        raise DataError(f"--quality {given} has no effect on pixels; give --store encoded with it")
    if not (given.isascii() and given.isdecimal() and 1 <= int(given) <= 100):
        raise DataError(f"--quality is {given!r}; give lossless, or a whole number from 1 to 100")
    return int(given)


def _further(options: Sequence[str]) -> dict[str, Any]:
    """Values by key of `--option KEY=VALUE`; numbers, true, false and lists are written as in JSON.

    Raises:
        DataError: a word has another form.
    """
    values = {}
    for word in options:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise DataError(f"--option {word}: give KEY=VALUE")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


def task_mapper(arguments: Namespace, *, gpu: bool = False) -> AbstractContextManager[MapTasks | None]:
    """Return a context with a function that runs tasks on Ray, see `ray_map`; with None for `--workers 0`."""
    if not arguments.workers:
        return nullcontext()

    with optional_package("ray", f"--workers {arguments.workers}", "--workers 0"):
        from metagmvae.infra.cluster.tasks import ray_map

    return ray_map(arguments.workers, arguments.address, gpu=gpu)


def verify(arguments: Namespace) -> Answer:
    """Run `metagmvae verify`."""
    from metagmvae.pipelines.shards.object_store import is_remote, temporary_copy
    from metagmvae.pipelines.shards.verify import verify_dataset

    local_copy = temporary_copy(arguments.uri) if is_remote(arguments.uri) else nullcontext(arguments.uri)
    with local_copy as root, progress_bar("files", arguments.json) as on_progress:
        problems = verify_dataset(root, on_progress)
    rows = [{"kind": problem.kind, "file": problem.path, "detail": problem.detail} for problem in problems]
    answer = {"data": str(arguments.uri), "problems": rows}
    return FailedAnswer(answer) if rows else answer
