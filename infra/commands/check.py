"""`doctor` checks the installation; `bench` measures speed."""

from __future__ import annotations

from argparse import Namespace

from metagmvae.infra.bench.dispatch import BENCHES, run_bench
from metagmvae.infra.commands.parsing import Answer, FailedAnswer, Parsers, add_command, output_file


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    what = "check versions, devices, Ray, the MLflow store and disks, and print a remedy for each problem"
    add_command(parsers, "doctor", doctor, what, "metagmvae doctor")

    example = "metagmvae bench step --record bench-step.json"
    what = "measure the speed of one stage next to a literal or conventional implementation"
    parser = add_command(parsers, "bench", bench, what, example)
    help_text = (
        "what to measure: step (training step), loader (reading images), episodes (evaluation), simclr (augmentation), "
        "features (feature shards), prepare (writing shards), tune (sweep)"
    )
    parser.add_argument("name", choices=tuple(BENCHES), help=help_text)
    parser.add_argument("--data", metavar="URI", help="loader, episodes, simclr: data set folder")
    parser.add_argument("--split", default="validation", help="loader, episodes, simclr: split (validation)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions; the median is reported (3)")
    parser.add_argument("--pictures", type=int, default=5000, help="loader: images in the image folder (5000)")
    parser.add_argument("--episodes", type=int, default=1000, help="episodes: number for the fast evaluation (1000)")
    help_text = "episodes: number for the literal evaluation (10)"
    parser.add_argument("--literal-episodes", type=int, default=10, help=help_text)
    parser.add_argument("--rows", type=int, default=1_000_000, help="features: rows to write and read (1,000,000)")
    parser.add_argument("--source", help="prepare: folder or archive of raw images")
    help_text = "prepare: kind of the source (mini-imagenet)"
    parser.add_argument("--from", dest="kind", default="mini-imagenet", help=help_text)
    help_text = "prepare: numbers of workers to compare (0 1 2)"
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help=help_text)
    parser.add_argument("--trials", type=int, help="tune: number of trials (200)")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads (0: PyTorch's default)")
    help_text = "also write the result and the environment to this file"
    parser.add_argument("--record", metavar="FILE.json", type=output_file, help=help_text)


def doctor(arguments: Namespace) -> Answer:
    """Run `metagmvae doctor`."""
    from metagmvae.infra.workflows.doctor import run_checks

    rows = [check.row() for check in run_checks()]
    answer = {"checks": rows}
    return FailedAnswer(answer) if any(row["state"] == "wrong" for row in rows) else answer


def bench(arguments: Namespace) -> Answer:
    """Run `metagmvae bench`."""
    import torch

    from metagmvae.configs.limits import MAX_THREADS
    from metagmvae.evaluation.provenance import provenance
    from metagmvae.pipelines.files import write_json
    from metagmvae.pipelines.records import DataError

    for option in ("repeats", "pictures", "episodes", "literal_episodes", "rows", "trials"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise DataError(f"--{option.replace('_', '-')} is {value}; give 1 or more")
    if not 0 <= arguments.threads <= MAX_THREADS:
        raise DataError(f"--threads is {arguments.threads}; give a number from 0 to {MAX_THREADS:,}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    answer = {"bench": arguments.name, **run_bench(arguments)}
    if arguments.record:
        write_json(arguments.record, answer | {"environment": provenance()})
    return answer
