"""`compare`: runs, results, sweeps, registered versions and the paper in one table, and on the same episodes."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

from metagmvae.infra.commands.parsing import Answer, Parsers, add_command, progress_bar

if TYPE_CHECKING:
    from metagmvae.evaluation.comparison.table import Comparison
    from metagmvae.evaluation.comparison.validation_rows import ComparedItem
    from metagmvae.infra.workflows.compare_models import EvalRequest, EvaluatedItem
    from metagmvae.pipelines.shards.dataset import Dataset


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    example = "metagmvae compare runs/first models:/omniglot@champion paper:omniglot --data data/omniglot --html c.html"
    what = "compare models, runs, sweeps and the paper: a table, paired differences, a report"
    parser = add_command(parsers, "compare", compare, what, example)
    parser.add_argument(
        "refs",
        metavar="WHAT",
        nargs="+",
        help="run folder, result file, sweep folder, models:/NAME[@ALIAS|/VERSION], paper:DATASET[/ROW]; the first one "
        "is what the others are held against",
    )
    parser.add_argument("--data", metavar="URI", help="judge every model afresh on episodes of this data set")
    parser.add_argument("--split", default="test", help="with --data: whose classes (test)")
    parser.add_argument("--way", type=int, nargs="+", default=[5], help="with --data (5)")
    parser.add_argument("--shot", type=int, nargs="+", default=[1], help="with --data (1)")
    parser.add_argument("--query", type=int, default=15, help="with --data (15)")
    parser.add_argument("--episodes", type=int, default=1000, help="with --data (1000)")
    parser.add_argument("--seed", type=int, default=0, help="with --data (0)")
    parser.add_argument("--mode", choices=("transductive", "inductive"), default="transductive")
    parser.add_argument("--top", type=int, default=1, help="trials of each sweep, the best first (1)")
    parser.add_argument("--strict", action="store_true", help="refuse rows that were judged differently")
    parser.add_argument("--csv", metavar="FILE", help="one line for each row and task")
    parser.add_argument("--html", metavar="FILE", help="one page with everything, pictures too")


def compare(arguments: Namespace) -> Answer:
    """Run `metagmvae compare`."""
    from metagmvae.evaluation.comparison.rows import check_comparable
    from metagmvae.evaluation.comparison.table import as_text_tables, write_csv
    from metagmvae.evaluation.comparison.table import compare as compare_rows
    from metagmvae.infra.workflows.compare_sources import read_sources
    from metagmvae.pipelines.records import DataError

    if arguments.top < 1:
        raise DataError(f"--top is {arguments.top}; give 1 or more")
    sources = read_sources(arguments.refs, arguments.top)
    judged: list[EvaluatedItem] = []
    dataset = None
    if arguments.data:
        dataset, request = _request(arguments)
        sources, judged = _evaluate(arguments, sources, dataset, request)
    notes = _not_evaluated(sources)
    rows = [row for source in sources for row in source.rows]
    if arguments.strict:
        check_comparable(rows)
    comparison = compare_rows(rows, notes)
    files: dict[str, Any] = {}
    if arguments.csv:
        write_csv(arguments.csv, comparison)
        files["csv"] = arguments.csv
    if arguments.html:
        _write_html(arguments, comparison, sources, judged, dataset)
        files["html"] = arguments.html
    return (comparison.summary() if arguments.json else as_text_tables(comparison)) | _calibration(judged) | files


def _request(arguments: Namespace) -> tuple[Dataset, EvalRequest]:
    from metagmvae.infra.workflows.compare_models import EvalRequest
    from metagmvae.pipelines.records import DataError
    from metagmvae.pipelines.shards.dataset import Dataset

    if arguments.episodes < 2:
        raise DataError(f"--episodes is {arguments.episodes}; an interval needs two at least")
    dataset = Dataset.open(arguments.data)
    dataset.split(arguments.split)
    tasks = dict.fromkeys((way, shot) for way in arguments.way for shot in arguments.shot)
    return dataset, EvalRequest(
        arguments.split, tuple(tasks), arguments.query, arguments.episodes, arguments.seed, arguments.mode
    )


def _evaluate(
    arguments: Namespace, sources: list[ComparedItem], dataset: Dataset, request: EvalRequest
) -> tuple[list[ComparedItem], list[EvaluatedItem]]:
    from metagmvae.infra.workflows.compare_models import evaluate_all
    from metagmvae.pipelines.records import DataError

    if not any(source.judgeable for source in sources):
        raise DataError("--data: there is no model to judge among what is compared; leave it out")
    # Probabilities are not stored, and a page shows how far they can be believed.
    progress = partial(progress_bar, quiet=arguments.json)
    return evaluate_all(sources, dataset, request, afresh=bool(arguments.html), progress=progress)


def _not_evaluated(sources: list[ComparedItem]) -> list[str]:
    """Notes on versions that are left out; what was asked for by its own name is refused.

    Raises:
        DataError: nothing is known of something that was named, or of everything.
    """
    from metagmvae.pipelines.records import DataError

    unknown = [source for source in sources if not source.rows]
    for source in unknown:
        if not source.listed or len(unknown) == len(sources):
            remedy = "judge it here with --data URI, or by metagmvae evaluate"
            raise DataError(f"{source.ref}: was not judged yet; {remedy}")
    return [f"{source.ref}: left out, as it was not judged yet" for source in unknown]


def _calibration(judged: list[EvaluatedItem]) -> dict[str, Any]:
    rows = [
        {"name": one.source.name, "way": way, "shot": shot, "ece": result.reliability.calibration_error}
        for one in judged
        for (way, shot), result in one.results.items()
        if result.reliability is not None
    ]
    return {"calibration": rows} if rows else {}


def _write_html(
    arguments: Namespace,
    comparison: Comparison,
    sources: list[ComparedItem],
    judged: list[EvaluatedItem],
    dataset: Dataset | None,
) -> None:
    from metagmvae.evaluation.comparison.html_page import write_report
    from metagmvae.evaluation.comparison.page_figures import Curve, ModelPage, draw_models
    from metagmvae.evaluation.provenance import provenance

    curves = [Curve(source.name, source.lines) for source in sources if source.lines]
    pages = [ModelPage(one.source.name, one.loaded, one.results) for one in judged]
    pictures = draw_models(pages, dataset, arguments.split) if dataset is not None else []
    write_report(arguments.html, comparison, curves, pictures, provenance())
