"""`classify`, `figure` and `table`: predictions, plots and result tables of trained models."""

from __future__ import annotations

import logging
from argparse import BooleanOptionalAction, Namespace, _ArgumentGroup
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from metagmvae.infra.commands.encoder import ENCODER_HELP, add_encoder_options, encoder_options
from metagmvae.infra.commands.parsing import (
    DRY_RUN_HELP,
    Answer,
    FailedAnswer,
    Parsers,
    add_command,
    add_tracking,
    output_file,
    progress_bar,
)
from metagmvae.pipelines.records import DataError

if TYPE_CHECKING:
    from metagmvae.evaluation.paper_tables.table_structure import TableName

LOG = logging.getLogger(__name__)
MODEL_HELP = "run folder, checkpoint file, model package, or registered model (models:/name@alias)"


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    _add_classify(parsers)
    _add_figure(parsers)
    _add_table(parsers)


def _add_classify(parsers: Parsers) -> None:
    example = "metagmvae classify models:/omniglot@champion --support labelled --query unlabelled"
    description = "classify image files, or vectors, from a few labelled ones"
    parser = add_command(parsers, "classify", classify, description, example)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or {ENCODER_HELP} with published weights")
    help_text = "folder of labelled images, one sub-folder per class: DIR/CLASS/*.png; or, for a model of vectors, a "
    help_text += ".npz or .parquet file with vectors and labels"
    parser.add_argument("--support", required=True, metavar="DIR", help=help_text)
    help_text = "CSV file with the columns file and label: the labelled images of --support, whatever their folders"
    parser.add_argument("--labels", metavar="FILE", help=help_text)
    help_text = "images to classify: DIR/*.png, or one file; or a .npy, .npz or .parquet file of vectors"
    parser.add_argument("--query", required=True, metavar="DIR", help=help_text)
    parser.add_argument("--recursive", action="store_true", help="also classify the images in sub-folders of --query")
    help_text = "transductive: images are classified together, at most 500 in a random set; inductive: each alone, for "
    help_text += "streams (default: transductive)"
    parser.add_argument("--mode", choices=("transductive", "inductive"), default="transductive", help=help_text)
    help_text = "answer `unknown` for images of none of the classes (needs `metagmvae calibrate`)"
    parser.add_argument("--unknown", action="store_true", help=help_text)
    help_text = "only the N most probable classes of each image (default: the probability of every class)"
    parser.add_argument("--top-k", type=int, metavar="N", help=help_text)
    help_text = "give no class to an image whose highest probability is below P (default: 0)"
    parser.add_argument("--threshold", type=float, default=0.0, metavar="P", help=help_text)
    help_text = "write one row for each image to FILE.csv, FILE.parquet or FILE.jsonl, and print only counts"
    parser.add_argument("--table", metavar="FILE", type=output_file, help=help_text)
    help_text = "also plot the images with their predicted classes"
    parser.add_argument("--figure", metavar="FILE.png", type=output_file, help=help_text)
    help_text = "invert the images (255 - value), as `prepare omniglot` does, or not (default: as the training images)"
    parser.add_argument("--invert", action=BooleanOptionalAction, help=help_text)
    add_encoder_options(parser)
    help_text = "dataset whose validation classes choose the settings of --head (default: none, default settings)"
    parser.add_argument("--data", metavar="URI", help=help_text)
    add_tracking(parser)


def _add_figure(parsers: Parsers) -> None:
    example = "metagmvae figure runs/first --data data/omniglot --out figures"
    description = "plot learning curves, reconstructions, and figures 3 and 4 of the paper; or a sweep"
    parser = add_command(parsers, "figure", figure, description, example)
    help_text = "only this figure of the paper: 3, real and generated samples by mixture mode; 4, latents by t-SNE "
    help_text += "(default: all figures)"
    parser.add_argument("number", nargs="?", type=int, metavar="3|4", help=help_text)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; or folder of a sweep")
    parser.add_argument("--data", metavar="URI", help="dataset whose images are shown (not needed for a sweep)")
    parser.add_argument("--split", default="validation", help="split whose classes are shown (default: validation)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the PNG files")
    add_tracking(parser)


def _add_table(parsers: Parsers) -> None:
    example = "metagmvae table 1 --run --data data/omniglot --budget 5m"
    description = "print recorded results as a Markdown table: of models, or Table 1, 2 or 10 of the paper, or flips"
    parser = add_command(parsers, "table", table, description, example, "the same command continues")
    help_text = "name of a model; its results are in NAME.json, or in NAME-5way-1shot.json and so on. Or 1, 2 or 10: "
    help_text += (
        "this table of the paper, with the results in the folder whose settings are those of its rows. Or flips: "
    )
    help_text += "the differences between the paper and its published code, each alone, compared on the same episodes"
    parser.add_argument("names", metavar="NAME|1|2|10|flips", nargs="*", help=help_text)
    help_text = "folder of the result files (default: evaluation/results)"
    parser.add_argument("--results", default="evaluation/results", metavar="DIR", help=help_text)
    help_text = "write all tables of README.md and of the pages in evaluation/results in place instead"
    parser.add_argument("--write", action="store_true", help=help_text)
    _add_paper_tables(parser.add_argument_group("tables of the paper"))
    add_tracking(parser)


def _add_paper_tables(paper: _ArgumentGroup) -> None:
    """Add the options of the tables of the paper."""
    help_text = "only results on this dataset and split of its classes; may be repeated for several datasets"
    paper.add_argument("--data", action="append", default=[], metavar="URI", help=help_text)
    help_text = "only results whose training was planned for this time, such as 90s, 5m or 1h. With --run: time for "
    help_text += "the steps of each training (default with --run: 5m); encoding, clustering and evaluation are not "
    help_text += "counted"
    paper.add_argument("--budget", metavar="TIME", help=help_text)
    help_text = "only these rows, by their keys in the JSON document, such as maml or meta-gmvae-best (default: all)"
    paper.add_argument("--rows", nargs="+", default=[], metavar="KEY", help=help_text)
    help_text = "only the columns of these numbers of classes (default: all)"
    paper.add_argument("--ways", nargs="+", type=int, default=[], metavar="K", help=help_text)
    help_text = "only the columns of these numbers of labelled images per class (default: all)"
    paper.add_argument("--shots", nargs="+", type=int, default=[], metavar="S", help=help_text)
    help_text = "train and evaluate on --data what has no result with this budget, the smallest training first; run "
    help_text += "again, it continues"
    paper.add_argument("--run", action="store_true", dest="run_rows", help=help_text)
    paper.add_argument("--dry-run", action="store_true", help=f"with --run: {DRY_RUN_HELP}")
    help_text = "with --run: folder of the run folders (default: runs/tables)"
    paper.add_argument("--out", default="runs/tables", metavar="DIR", help=help_text)
    help_text = "with --run: episodes of each evaluation (default: 1000); fewer, at least 20, where they would take "
    help_text += "longer than the budget"
    paper.add_argument("--episodes", type=int, default=1000, metavar="N", help=help_text)
    help_text = "with --run: number of rows trained at the same time as Ray tasks (default: 0, one after another in "
    help_text += "this process without Ray)"
    paper.add_argument("--workers", type=int, default=0, metavar="N", help=help_text)
    help_text = "Ray cluster for --workers: host:port, auto or local (default: RAY_ADDRESS, else a new one here)"
    paper.add_argument("--address", default="", help=help_text)
    help_text = "with --run: train each row with each of these seeds; a cell is then the mean over its trainings ± "
    help_text += "their standard deviation (default: the seed of the preset)"
    paper.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help=help_text)
    help_text = "with --run: for example train.decode_samples=1 or tracking.enabled=false; may be repeated"
    paper.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=help_text)


def classify(arguments: Namespace) -> Answer:
    """Run `metagmvae classify`."""
    from metagmvae.infra.classification.classified_rows import FIELDS, check_table_name
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.infra.workflows.classify import ClassifyOptions, classify_folders
    from metagmvae.pipelines.shards.dataset import Dataset

    if arguments.table:
        check_table_name(arguments.table)
    dataset = Dataset.open(arguments.data) if arguments.data else None
    options = ClassifyOptions(
        arguments.mode,
        arguments.recursive,
        arguments.unknown,
        arguments.top_k,
        arguments.threshold,
        arguments.invert,
        Path(arguments.table) if arguments.table else None,
        Path(arguments.figure) if arguments.figure else None,
        arguments.head,
        dataset,
        Path(arguments.labels) if arguments.labels else None,
    )
    loaded = resolve_model(arguments.model, **encoder_options(arguments, dataset))
    if loaded.preprocessing is None and arguments.invert is None and not loaded.model.takes_vectors:
        LOG.warning(
            "metagmvae classify: %s does not record whether its training images were inverted; these images are not: "
            "give --invert or --no-invert",
            arguments.model,
        )
    progress = partial(progress_bar, quiet=arguments.json)
    answer = classify_folders(
        loaded, Path(arguments.support), Path(arguments.query), options=options, progress=progress
    )
    if not arguments.json and not set(FIELDS).intersection(answer["classes"]):
        for row in answer.get("queries", []):
            row.pop("probabilities", None)  # the other columns of the table say the same
    return answer


def figure(arguments: Namespace) -> Answer:
    """Run `metagmvae figure`."""
    from metagmvae.evaluation.figures.gallery import draw_gallery
    from metagmvae.evaluation.figures.paper_figures import FIGURES, draw_paper_figure
    from metagmvae.evaluation.sweeps.record import is_sweep
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.infra.runs.run_folder import METRICS, read_lines
    from metagmvae.pipelines.shards.dataset import Dataset

    out = Path(arguments.out)
    if arguments.number not in (None, *FIGURES):
        raise DataError(f"figure {arguments.number}: the figures of the paper with results are 3 and 4")
    if is_sweep(Path(arguments.model)):
        if arguments.number:
            raise DataError(f"figure {arguments.number}: shows a model, and {arguments.model} is a sweep; name a run")
        return _sweep_figures(Path(arguments.model), out)
    if not arguments.data:
        raise DataError(f"figures of {arguments.model} show images of a dataset: name it with --data")
    dataset = Dataset.open(arguments.data)
    dataset.split(arguments.split)
    loaded = resolve_model(arguments.model)
    if arguments.number:
        return {"figures": [str(draw_paper_figure(arguments.number, loaded, dataset, arguments.split, out))]}
    # Learning curves are drawn only if MODEL is a run folder.
    lines = read_lines(Path(arguments.model) / METRICS)
    files = draw_gallery(loaded, dataset, arguments.split, out, lines)
    return {"figures": [str(file) for file in files]}


def _sweep_figures(folder: Path, out: Path) -> Answer:
    from metagmvae.evaluation.sweeps.report import REPORT, write_report

    summary = write_report(folder, out)
    best = summary["best"] and {key: summary["best"][key] for key in ("number", "accuracy", "ci95", "step", "settings")}
    figures = [str(out / name) for name in summary["figures"]]
    return {"figures": figures, "report": str(out / REPORT), "trials": summary["by_status"], "best": best}


def table(arguments: Namespace) -> Answer:
    """Run `metagmvae table`."""
    from metagmvae.evaluation.comparison.results_table import results_table
    from metagmvae.evaluation.paper_tables.readme import write_pages
    from metagmvae.evaluation.paper_tables.table_structure import parse_table_name

    if len(arguments.names) == 1 and not arguments.write:
        name = parse_table_name(arguments.names[0])
        if name is not None:
            return _paper_table(arguments, name)
    given = {
        "--data": arguments.data,
        "--rows": arguments.rows,
        "--ways": arguments.ways,
        "--shots": arguments.shots,
        "--budget": arguments.budget,
        "--set": arguments.overrides,
        "--seeds": arguments.seeds,
    }
    given |= {"--run": arguments.run_rows, "--dry-run": arguments.dry_run}
    if used := [option for option, value in given.items() if value]:
        raise DataError(f"{used[0]}: is for a table of the paper; give its number: metagmvae table 1")
    if arguments.write:
        return {"changed": write_pages()}
    return {"table": results_table(Path(arguments.results), arguments.names)}


def _paper_table(arguments: Namespace, name: TableName) -> Answer:
    """Run `metagmvae table 1|2|10|flips`."""
    from metagmvae.evaluation.paper_tables.match_results import read_result_folder
    from metagmvae.evaluation.paper_tables.paper_table import table_document
    from metagmvae.evaluation.paper_tables.table_layout import markdown_document
    from metagmvae.evaluation.paper_tables.table_rows import table_parts
    from metagmvae.evaluation.paper_tables.table_structure import select_columns, select_rows
    from metagmvae.infra.fitting.fit_plan import parse_budget
    from metagmvae.infra.tables.table_request import TableRequest, open_data

    parts = select_columns(select_rows(table_parts(name), arguments.rows), arguments.ways, arguments.shots)
    results = Path(arguments.results)
    if arguments.dry_run and not arguments.run_rows:
        raise DataError("--dry-run: says what --run would do; give both")
    budget_s = parse_budget(arguments.budget or "5m") if arguments.budget or arguments.run_rows else None
    given = open_data(arguments.data, parts)
    answer: Answer = {}
    if arguments.run_rows:
        from metagmvae.infra.commands.data import task_mapper
        from metagmvae.infra.tables.table_run import run_table

        assert budget_s is not None
        places = (tuple(arguments.data), results, Path(arguments.out))
        trainings = (tuple(arguments.overrides), tuple(arguments.seeds), arguments.workers)
        request = TableRequest(name, *places, budget_s, arguments.episodes, *trainings)
        mapper = partial(task_mapper, arguments, gpu=True)
        answer = run_table(request, parts, given, mapper, dry_run=arguments.dry_run)
        if arguments.dry_run:
            return FailedAnswer(answer) if answer["failed"] else answer
    elif arguments.overrides or arguments.seeds:
        used = f"--set {arguments.overrides[0]}" if arguments.overrides else f"--seeds {arguments.seeds[0]}"
        raise DataError(f"{used}: is for the trainings of --run; give it too")
    images = [data.images for data in given]
    document = table_document(name, parts, read_result_folder(results), results, images, budget_s)
    answer |= {"table": markdown_document(document)}
    if arguments.json:
        answer["document"] = document.model_dump(mode="json")
    return FailedAnswer(answer) if answer.get("failed") else answer
