"""Command `compare`: runs, result files, sweeps, registered versions and rows of the paper in one table."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

from metagmvae.evaluation.provenance import provenance
from metagmvae.infra.commands.encoder import add_encoder_options, encoder_options
from metagmvae.infra.commands.parsing import (
    MIX_GROUPS_HELP,
    MODE_HELP,
    Answer,
    Parsers,
    add_command,
    add_tracking,
    output_file,
    progress_bar,
)
from metagmvae.pipelines.records import DataError

if TYPE_CHECKING:
    from metagmvae.evaluation.comparison.table import Comparison
    from metagmvae.evaluation.comparison.validation_rows import ComparedItem, EvaluatedModel
    from metagmvae.infra.workflows.compare_models import EvalRequest
    from metagmvae.pipelines.shards.dataset import Dataset


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    example = "metagmvae compare runs/first models:/omniglot@champion paper:omniglot --data data/omniglot --html c.html"
    what = "compare models, runs, sweeps and the paper: a table, paired differences, an HTML page"
    parser = add_command(parsers, "compare", compare, what, example)
    help_text = "run folder, result file, sweep folder, models:/NAME[@ALIAS|/VERSION], encoder (timm:NAME, "
    help_text += "torchvision:NAME), paper:DATASET[/ROW]; the others are compared with the first one"
    parser.add_argument("refs", metavar="WHAT", nargs="+", help=help_text)
    parser.add_argument("--data", metavar="URI", help="evaluate every model on episodes of this dataset")
    parser.add_argument("--split", default="test", help="with --data: split of the classes (test)")
    parser.add_argument("--way", type=int, nargs="+", default=[5], help="with --data: numbers of classes (5)")
    parser.add_argument("--shot", type=int, nargs="+", default=[1], help="with --data: labelled images per class (1)")
    parser.add_argument("--query", type=int, default=15, help="with --data: queries per class (15)")
    parser.add_argument("--episodes", type=int, default=1000, help="with --data: episodes per task (1000)")
    parser.add_argument("--seed", type=int, default=0, help="with --data: seed of the episodes (0)")
    parser.add_argument("--mode", choices=("transductive", "inductive"), default="transductive", help=MODE_HELP)
    parser.add_argument("--mix-groups", action="store_true", help=f"with --data: {MIX_GROUPS_HELP}")
    add_encoder_options(parser)
    parser.add_argument("--top", type=int, default=1, help="number of trials of each sweep, the best first (1)")
    parser.add_argument("--strict", action="store_true", help="refuse rows that were evaluated differently")
    help_text = "write a CSV file with one line for each row and task"
    parser.add_argument("--csv", metavar="FILE", type=output_file, help=help_text)
    help_text = "write an HTML page with all tables and figures"
    parser.add_argument("--html", metavar="FILE", type=output_file, help=help_text)
    add_tracking(parser)


def compare(arguments: Namespace) -> Answer:
    """Run `metagmvae compare`."""
    from metagmvae.evaluation.comparison.rows import check_comparable
    from metagmvae.evaluation.comparison.table import as_text_tables, write_csv
    from metagmvae.evaluation.comparison.table import compare as compare_rows
    from metagmvae.infra.workflows.compare_sources import read_items

    if arguments.mix_groups and not arguments.data:
        raise DataError("--mix-groups: only with --data, on whose episodes the models are evaluated")
    if arguments.top < 1:
        raise DataError(f"--top {arguments.top}: must be at least 1")
    items = read_items(arguments.refs, arguments.top)
    _check_encoder_options(arguments)
    evaluated: list[EvaluatedModel] = []
    dataset = None
    if arguments.data:
        dataset, request = _request(arguments)
        items, evaluated = _evaluate(arguments, items, dataset, request)
        if arguments.head is not None and not any(row.kind == "encoder" for item in items for row in item.rows):
            raise DataError(f"--head {arguments.head}: no encoder alone is compared; omit it")
    notes = _notes_on_missing(items) + _notes_on_left_out(evaluated)
    rows = [row for item in items for row in item.rows]
    if arguments.strict:
        check_comparable(rows)
    comparison = compare_rows(rows, notes)
    files: dict[str, Any] = {}
    if arguments.csv:
        write_csv(arguments.csv, comparison)
        files["csv"] = arguments.csv
    if arguments.html:
        _write_html(arguments, comparison, items, evaluated, dataset)
        files["html"] = arguments.html
    return (comparison.summary() if arguments.json else as_text_tables(comparison)) | _calibration(evaluated) | files


def _check_encoder_options(arguments: Namespace) -> None:
    """Check the options of encoders."""
    from metagmvae.evaluation.encoders.named_encoder import is_encoder_name

    named = [ref for ref in arguments.refs if is_encoder_name(ref)]
    given = {"--weights": arguments.weights, "--image-size": arguments.image_size, "--head": arguments.head}
    for option, value in given.items():
        if value is not None and not arguments.data:
            raise DataError(f"{option} {value}: only with --data, on whose episodes the encoder is evaluated")
    if arguments.weights is not None and len(named) != 1:
        raise DataError(
            f"--weights {arguments.weights}: is for one encoder by name, and {len(named)} are compared; write the "
            "others as models first: metagmvae encoder NAME --weights FILE"
        )
    if arguments.image_size is not None and not named:
        raise DataError(f"--image-size {arguments.image_size}: no encoder by name is compared; omit it")
    if named and not arguments.data:
        raise DataError(f"{named[0]}: has no stored results; give --data URI to evaluate it")


def _request(arguments: Namespace) -> tuple[Dataset, EvalRequest]:
    from metagmvae.infra.workflows.compare_models import EvalRequest
    from metagmvae.pipelines.shards.dataset import Dataset

    if arguments.episodes < 2:
        raise DataError(f"--episodes {arguments.episodes}: a confidence interval needs at least 2")
    dataset = Dataset.open(arguments.data)
    dataset.split(arguments.split)
    tasks = tuple(dict.fromkeys((way, shot) for way in arguments.way for shot in arguments.shot))
    keys = ("split", "query", "episodes", "seed", "mode", "head", "mix_groups")
    options = {key: getattr(arguments, key) for key in keys}
    options |= {key: value for key, value in encoder_options(arguments, None).items() if key != "dataset"}
    return dataset, EvalRequest(tasks=tasks, **options)


def _evaluate(
    arguments: Namespace, items: list[ComparedItem], dataset: Dataset, request: EvalRequest
) -> tuple[list[ComparedItem], list[EvaluatedModel]]:
    from metagmvae.infra.workflows.compare_models import evaluate_items

    if not any(item.is_model for item in items):
        raise DataError("--data: none of the compared items is a model; omit it")
    progress = partial(progress_bar, quiet=arguments.json)
    # The page shows calibration, and probabilities are not stored.
    return evaluate_items(items, dataset, request, reuse=not arguments.html, progress=progress)


def _notes_on_missing(items: list[ComparedItem]) -> list[str]:
    """Return a note for each version of `models:/NAME` that has no result."""
    missing = [item for item in items if not item.rows]
    for item in missing:
        if not item.optional or len(missing) == len(items):
            raise DataError(f"{item.ref}: no result yet; evaluate it with --data URI or `metagmvae evaluate`")
    return [f"{item.ref}: left out, because it has no result yet" for item in missing]


def _notes_on_left_out(evaluated: list[EvaluatedModel]) -> list[str]:
    """Return a note for each number of shots with classes that the episodes leave out."""
    from metagmvae.pipelines.sampling.episodes import left_out_line

    results = [result for model in evaluated for result in model.results.values() if result.left_out]
    return sorted({left_out_line("evaluation", r.shot, r.query, r.left_out) for r in results})


def _calibration(evaluated: list[EvaluatedModel]) -> dict[str, Any]:
    rows = [
        {"name": model.name, "way": way, "shot": shot, "ece": result.reliability.calibration_error}
        for model in evaluated
        for (way, shot), result in model.results.items()
        if result.reliability is not None
    ]
    return {"calibration": rows} if rows else {}


def _write_html(
    arguments: Namespace,
    comparison: Comparison,
    items: list[ComparedItem],
    evaluated: list[EvaluatedModel],
    dataset: Dataset | None,
) -> None:
    from metagmvae.evaluation.comparison.html_page import write_report
    from metagmvae.evaluation.comparison.page_figures import draw_models

    curves = [item for item in items if item.lines]
    images = draw_models(evaluated, dataset, arguments.split) if dataset is not None else []
    write_report(arguments.html, comparison, curves, images, provenance())
