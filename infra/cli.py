"""`metagmvae`: the commands. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from infra import commands

Parsers = Any


class Parser(argparse.ArgumentParser):
    """One line for a wrong request."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        answer = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; what was finished stays, training goes on with --resume", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        # Our own errors are ValueErrors of one line: the request. Anything else: the work.
        print(f"metagmvae {arguments.command}: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2 if type(error).__module__.split(".")[0] in OURS and isinstance(error, ValueError) else 1
    if arguments.json:
        print(json.dumps(answer))
    else:
        print(commands.text(answer))
    return 0


OURS = ("configs", "pipelines", "training", "evaluation", "infra")


def _parser() -> Parser:
    parser = Parser(prog="metagmvae", description="Unsupervised meta-learning with Meta-GMVAE.")
    commands_of = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _prepare(commands_of)
    _train(commands_of)
    _evaluate(commands_of)
    _classify(commands_of)
    _track(commands_of)
    _demo(commands_of)
    return parser


def _add(parsers: Parsers, name: str, run: Any, what: str, example: str) -> argparse.ArgumentParser:
    parser = parsers.add_parser(name, help=what, description=what, epilog=f"example: {example}")
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _prepare(parsers: Parsers) -> None:
    example = "metagmvae prepare omniglot --source downloads --out data/omniglot"
    parser = _add(parsers, "prepare", commands.prepare, "write a data set as WebDataset shards with an index", example)
    parser.add_argument("name", choices=("folder", "glyphs", "omniglot"))
    parser.add_argument("--source", help="folder with the archives (Omniglot is downloaded without), or your pictures")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--split", help="omniglot: 1200-100-323 (default) or vinyals")
    parser.add_argument("--size", type=int, help="folder, omniglot: side of the images in pixels (28)")
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
    parser.add_argument("--seed", type=int, default=0, help="of the order in the shards")


def _train(parsers: Parsers) -> None:
    example = "metagmvae train omniglot-cpu --set data.uri=data/omniglot --set run.out=runs/first"
    parser = _add(parsers, "train", commands.train, "meta-train; CONFIG is a TOML file or a preset", example)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in run.out")
    parser.add_argument("--quiet", action="store_true", help="no live line")


def _evaluate(parsers: Parsers) -> None:
    example = "metagmvae evaluate models:/omniglot@champion --data data/omniglot --way 5 --shot 1"
    parser = _add(parsers, "evaluate", commands.evaluate, "few-shot accuracy over seeded episodes", example)
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, package, or models:/name@alias")
    parser.add_argument("--data", required=True, help="data set folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--query", type=int, default=15)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=("transductive", "inductive"), default="transductive")
    parser.add_argument("--results", metavar="FILE.parquet", help="keep the accuracy of every episode")
    parser.add_argument("--record", metavar="FILE.json", help="keep the result with what it was made with")


def _classify(parsers: Parsers) -> None:
    example = "metagmvae classify models:/omniglot@champion --support labelled --query unlabelled"
    parser = _add(parsers, "classify", commands.classify, "name the class of images from a few labelled ones", example)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--support", required=True, metavar="DIR", help="DIR/<class>/*.png, as many in each class")
    parser.add_argument("--query", required=True, metavar="DIR", help="DIR/*.png")


def _track(parsers: Parsers) -> None:
    example = "metagmvae track runs/first"
    parser = _add(parsers, "track", commands.track, "send a run to MLflow: what is not there yet", example)
    parser.add_argument("run_dir", metavar="RUN_DIR")


def _demo(parsers: Parsers) -> None:
    parser = _add(parsers, "demo", commands.demo, "the whole way on generated glyphs", "metagmvae demo --out my-demo")
    parser.add_argument("--out", default="metagmvae-demo", help="new folder for everything the demo makes")
    parser.add_argument("--workers", type=int, default=2, help="Ray workers that train")


if __name__ == "__main__":
    raise SystemExit(main())
