"""`doctor` and `bench`: is this machine fit, and how fast is it."""

from __future__ import annotations

from argparse import Namespace

from metagmvae.infra.commands.parsing import Answer, FailedAnswer, Parsers, add_command

BENCHES = ("step", "loader", "episodes", "simclr", "features", "prepare", "tune", "sweep-scale")


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    what = "check versions, devices, Ray, the MLflow store and disks, with a remedy for what is wrong"
    add_command(parsers, "doctor", doctor, what, "metagmvae doctor")

    example = "metagmvae bench step --record bench-step.json"
    what = "time a stage, beside the slow or usual form of it, in one run"
    parser = add_command(parsers, "bench", bench, what, example)
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--data", metavar="URI", help="loader, episodes, simclr: data set folder")
    parser.add_argument("--split", default="validation", help="loader, episodes, simclr: split (validation)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; the median counts (3)")
    parser.add_argument("--pictures", type=int, default=5000, help="loader: size of the image folder (5000)")
    parser.add_argument("--episodes", type=int, default=1000, help="episodes: of the fast form (1000)")
    parser.add_argument("--literal-episodes", type=int, default=10, help="episodes: of the slow form (10)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="features: rows that are written (1,000,000)")
    parser.add_argument("--source", help="prepare: folder or archive of raw images")
    parser.add_argument("--from", dest="kind", default="mini-imagenet", help="prepare: which source (mini-imagenet)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="prepare: numbers to try (0 1 2)")
    parser.add_argument("--trials", type=int, help="tune: of the sweep (200); sweep-scale: simulated ones (10,000)")
    parser.add_argument("--runs", type=int, default=200, help="sweep-scale: trials written into each store (200)")
    parser.add_argument("--writers", type=int, default=4, help="sweep-scale: processes that write at once; 0: none (4)")
    parser.add_argument(
        "--stores", nargs="*", default=[], metavar="URI", help="sweep-scale: MLflow stores beside SQLite"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: as many as torch takes by itself")
    parser.add_argument("--record", metavar="FILE.json", help="keep the result with what it was made with")


def doctor(arguments: Namespace) -> Answer:
    """Run `metagmvae doctor`."""
    from metagmvae.infra.workflows.doctor import examine

    rows = [check.row() for check in examine()]
    answer = {"checks": rows}
    return FailedAnswer(answer) if any(row["state"] == "wrong" for row in rows) else answer


def bench(arguments: Namespace) -> Answer:
    """Run `metagmvae bench`."""
    import torch

    from metagmvae.evaluation.provenance import provenance
    from metagmvae.infra.bench.dispatch import run_bench
    from metagmvae.pipelines.files import write_json
    from metagmvae.pipelines.records import DataError

    for option in ("repeats", "pictures", "episodes", "literal_episodes", "rows", "trials", "runs"):
        wanted = getattr(arguments, option)
        if wanted is not None and wanted < 1:
            raise DataError(f"--{option.replace('_', '-')} is {wanted}; give 1 or more")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    answer = {"bench": arguments.name, **run_bench(arguments)}
    if arguments.record:
        write_json(arguments.record, answer | {"environment": provenance()})
    return answer
