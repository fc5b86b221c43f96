"""`classify`, `figure` and `table`: predictions, plots and result tables of trained models."""

from __future__ import annotations

import logging
from argparse import BooleanOptionalAction, Namespace
from functools import partial
from pathlib import Path

from metagmvae.infra.commands.encoder import ENCODER_HELP, add_encoder_options, encoder_options
from metagmvae.infra.commands.parsing import Answer, Parsers, add_command, add_tracking, output_file, progress_bar

LOG = logging.getLogger(__name__)
MODEL_HELP = "run folder, checkpoint file, model package, or registered model (models:/name@alias)"


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    example = "metagmvae classify models:/omniglot@champion --support labelled --query unlabelled"
    description = "classify image files from a few labelled ones"
    parser = add_command(parsers, "classify", classify, description, example)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or {ENCODER_HELP} with published weights")
    help_text = "folder of labelled images, one sub-folder per class: DIR/CLASS/*.png"
    parser.add_argument("--support", required=True, metavar="DIR", help=help_text)
    parser.add_argument("--query", required=True, metavar="DIR", help="folder of images to classify: DIR/*.png")
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

    example = "metagmvae table omniglot-cpu --results evaluation/results"
    description = "print recorded results next to the paper's as a Markdown table"
    parser = add_command(parsers, "table", table, description, example)
    help_text = "name of a model; its results are the files NAME-5way-1shot.json and so on"
    parser.add_argument("names", metavar="NAME", nargs="*", help=help_text)
    help_text = "folder of the result files (default: evaluation/results)"
    parser.add_argument("--results", default="evaluation/results", metavar="DIR", help=help_text)
    help_text = "write all tables of README.md and evaluation/results/README.md in place instead"
    parser.add_argument("--write", action="store_true", help=help_text)


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
    )
    loaded = resolve_model(arguments.model, **encoder_options(arguments, dataset))
    if loaded.preprocessing is None and arguments.invert is None:
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
    from metagmvae.pipelines.records import DataError
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
    from metagmvae.evaluation.comparison.readme import write_pages
    from metagmvae.evaluation.comparison.results_table import results_table

    if arguments.write:
        return {"changed": write_pages()}
    return {"table": results_table(Path(arguments.results), arguments.names)}
