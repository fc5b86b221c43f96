"""`prepare` and `verify`: data sets."""

from __future__ import annotations

import hashlib
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from metagmvae.infra.commands.parsing import Answer, FailedAnswer, Parsers, add_command, progress_bar

if TYPE_CHECKING:
    from metagmvae.pipelines.records import MapTasks


SOURCE_OPTIONS = ("split", "size", "channels", "invert", "classes", "fractions", "max_broken", "allow_missing")
"""Of `prepare`: those that are given go to the source, which refuses what it does not know."""


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    _add_prepare(parsers)
    example = "metagmvae verify data/omniglot"
    parser = add_command(
        parsers, "verify", verify, "name every missing, damaged or foreign file of a data set", example
    )
    parser.add_argument("uri", metavar="URI", help="folder, or s3://bucket/prefix, of a data set")


def _add_prepare(parsers: Parsers) -> None:
    example = "metagmvae prepare omniglot --source downloads --out data/omniglot"
    what = "write a data set as WebDataset shards with an index"
    parser = add_command(parsers, "prepare", prepare, what, example)
    parser.add_argument("name", choices=("folder", "glyphs", "mini-imagenet", "omniglot"))
    parser.add_argument("--source", help="folder with the archives (Omniglot is downloaded without), or your pictures")
    parser.add_argument("--out", required=True, help="folder, or s3://bucket/prefix, to write")
    parser.add_argument("--split", help="omniglot: 1200-100-323 (default) or vinyals")
    parser.add_argument("--size", type=int, help="side of the images in pixels (28; mini-imagenet: 84)")
    parser.add_argument("--channels", type=int, help="folder: 1 (grey, default) or 3 (RGB)")
    parser.add_argument(
        "--invert", action="store_true", default=None, help="folder: strokes are dark on a bright ground"
    )
    parser.add_argument(
        "--unlabelled", action="store_false", dest="classes", default=None, help="folder: folders are no classes"
    )
    parser.add_argument(
        "--fractions", type=float, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help="folder: split the classes"
    )
    parser.add_argument("--max-broken", type=float, help="folder: largest share of images that cannot be read (0.01)")
    parser.add_argument(
        "--allow-missing", action="store_true", default=None, help="mini-imagenet: take what is there of a part"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order in the shards")
    add_workers(parser)


def add_workers(parser: ArgumentParser) -> None:
    """Options of commands that write shards."""
    parser.add_argument("--workers", type=int, default=0, help="Ray tasks at once (0: in this process, without Ray)")
    parser.add_argument("--address", default="", help="Ray cluster for --workers (a cluster of this machine)")


def prepare(arguments: Namespace) -> Answer:
    """Run `metagmvae prepare`."""
    from metagmvae.pipelines.shards.writer import write_dataset
    from metagmvae.pipelines.sources.source import open_source

    given = {name: getattr(arguments, name) for name in SOURCE_OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    # Absolute: Ray's workers have working directories of their own.
    folder = str(Path(arguments.source).absolute()) if arguments.source else None
    with map_tasks_of(arguments) as map_tasks:
        source = open_source(arguments.name, folder, map_tasks=map_tasks, **options)
        with (
            target(arguments.out) as (out, uri),
            progress_bar("shards", arguments.json) as on_progress,
        ):
            manifest = write_dataset(source, out, seed=arguments.seed, map_tasks=map_tasks, on_progress=on_progress)
    return {
        "data": uri,
        "name": manifest["name"],
        "samples": {split: part["samples"] for split, part in manifest["splits"].items()},
        "classes": {split: part["classes"] for split, part in manifest["splits"].items()},
        "shards": {split: len(part["shards"]) for split, part in manifest["splits"].items()},
        "skipped": source.report.get("skipped", []),
    }


@contextmanager
def target(out: str) -> Iterator[tuple[Path, str]]:
    """Where shards are written, and the name of the data set; for an object store they are published afterwards.

    They wait in the cache folder: the same command finishes what a stopped one has left there.
    """
    from metagmvae.pipelines.shards.object_store import RemotePrefix, cache_root, is_remote, publish

    if not is_remote(out):
        yield Path(out).absolute(), str(Path(out).absolute())
        return
    RemotePrefix(out).sizes()  # a store that refuses says so before the work
    folder = cache_root() / "writing" / hashlib.sha256(out.encode()).hexdigest()[:16]
    yield folder, out
    publish(folder, out)
    shutil.rmtree(folder)


def map_tasks_of(arguments: Namespace, gpus: int = 0) -> AbstractContextManager[MapTasks | None]:
    """What runs tasks, by --workers and --address; each has so many GPUs to itself."""
    if not arguments.workers:
        return nullcontext()
    from metagmvae.infra.cluster.tasks import ray_map

    return ray_map(arguments.workers, arguments.address, gpus)


def verify(arguments: Namespace) -> Answer:
    """Run `metagmvae verify`."""
    from metagmvae.pipelines.shards.object_store import is_remote, temporary_copy
    from metagmvae.pipelines.shards.verify import verify_dataset

    here = temporary_copy(arguments.uri) if is_remote(arguments.uri) else nullcontext(arguments.uri)
    with here as root, progress_bar("files", arguments.json) as on_progress:
        problems = verify_dataset(root, on_progress)
    rows = [{"kind": problem.kind, "file": problem.path, "detail": problem.detail} for problem in problems]
    answer = {"data": str(arguments.uri), "problems": rows}
    return FailedAnswer(answer) if rows else answer
