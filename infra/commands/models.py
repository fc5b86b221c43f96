"""`evaluate`, `classify`, `figure` and `table`: accuracy, predictions, plots and result tables of trained models."""

from __future__ import annotations

import logging
from argparse import BooleanOptionalAction, Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.infra.commands.parsing import MODE_HELP, Answer, Parsers, add_command, output_file, progress_bar

if TYPE_CHECKING:
    from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
    from metagmvae.pipelines.shards.dataset import Dataset
    from metagmvae.training.trainer.package import LoadedModel

LOG = logging.getLogger(__name__)
MODEL_HELP = "run folder, checkpoint file, model package, or registered model (models:/name@alias)"


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    _add_evaluate(parsers)
    example = "metagmvae classify models:/omniglot@champion --support labelled --query unlabelled"
    description = "classify image files from a few labelled ones"
    parser = add_command(parsers, "classify", classify, description, example)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    help_text = "folder of labelled images, one sub-folder per class: DIR/CLASS/*.png"
    parser.add_argument("--support", required=True, metavar="DIR", help=help_text)
    parser.add_argument("--query", required=True, metavar="DIR", help="folder of images to classify: DIR/*.png")
    help_text = "also plot the images with their predicted classes"
    parser.add_argument("--figure", metavar="FILE.png", type=output_file, help=help_text)
    help_text = "invert the images (255 - value), as `prepare omniglot` does, or not (default: as the training images)"
    parser.add_argument("--invert", action=BooleanOptionalAction, help=help_text)

    example = "metagmvae figure runs/first --data data/omniglot --out figures"
    description = "plot learning curves, reconstructions, mixture modes of episodes and a map of latents; or a sweep"
    parser = add_command(parsers, "figure", figure, description, example)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; or folder of a sweep")
    parser.add_argument("--data", metavar="URI", help="dataset whose images are shown (not needed for a sweep)")
    parser.add_argument("--split", default="validation", help="split whose classes are shown (default: validation)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the PNG files")

    example = "metagmvae table omniglot-cpu --results evaluation/results"
    description = "print recorded results next to the paper's as a Markdown table"
    parser = add_command(parsers, "table", table, description, example)
    help_text = "name of a model; its results are the files NAME-5way-1shot.json and so on"
    parser.add_argument("names", metavar="NAME", nargs="*", help=help_text)
    help_text = "folder of the result files (default: evaluation/results)"
    parser.add_argument("--results", default="evaluation/results", metavar="DIR", help=help_text)
    help_text = "write all tables of README.md and evaluation/results/README.md in place instead"
    parser.add_argument("--write", action="store_true", help=help_text)


def _add_evaluate(parsers: Parsers) -> None:
    example = "metagmvae evaluate models:/omniglot@champion --data data/omniglot --way 5 --shot 1"
    description = "measure the few-shot accuracy of a model on reproducible random episodes"
    parser = add_command(parsers, "evaluate", evaluate, description, example)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", required=True, metavar="URI", help="dataset")
    parser.add_argument("--split", default="test", help="split of the dataset (default: test)")
    parser.add_argument("--way", type=int, default=5, metavar="K", help="classes per episode (default: 5)")
    help_text = "several numbers of classes instead of --way, one result row each"
    parser.add_argument("--ways", type=int, nargs="+", metavar="K", help=help_text)
    help_text = "labelled images per class (default: 1)"
    parser.add_argument("--shot", type=int, default=1, metavar="S", help=help_text)
    help_text = "images to classify per class (default: 15)"
    parser.add_argument("--query", type=int, default=15, metavar="Q", help=help_text)
    help_text = "half of the classes have --query images to classify, the others one; the model is not told which "
    help_text += "(the result is not stored with the model)"
    parser.add_argument("--unbalanced", action="store_true", help=help_text)
    parser.add_argument("--episodes", type=int, default=1000, metavar="N", help="number of episodes (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    parser.add_argument("--mode", choices=("transductive", "inductive"), default="transductive", help=MODE_HELP)
    help_text = "also evaluate baselines on the same features and episodes, with settings chosen on the validation "
    help_text += "classes, and the paired differences of the model to them"
    parser.add_argument("--baselines", action="store_true", help=help_text)
    parser.add_argument(
        "--results",
        metavar="FILE.parquet",
        type=output_file,
        help="write the accuracy of every episode, of the baselines too",
    )
    help_text = "write the result with settings, fingerprints and versions"
    parser.add_argument("--record", metavar="FILE.json", type=output_file, help=help_text)


def evaluate(arguments: Namespace) -> Answer:
    """Run `metagmvae evaluate`."""
    from metagmvae.evaluation.fewshot.baseline_tuning import baseline_trials, baselines_summary
    from metagmvae.evaluation.fewshot.evaluate_episodes import write_episodes
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.pipelines.files import write_json
    from metagmvae.pipelines.shards.dataset import Dataset

    dataset = Dataset.open(arguments.data)
    dataset.split(arguments.split)
    loaded = resolve_model(arguments.model, shot=arguments.shot)
    results = _evaluate(arguments, dataset, loaded)
    if arguments.results:
        write_episodes(arguments.results, results)
    about = {
        "split": arguments.split,
        "data": str(arguments.data),
        "data_fingerprint": dataset.fingerprint,
        "model": str(arguments.model),
    }
    if arguments.ways:
        answer = {"rows": [result.summary() for result in results], **about}
    else:
        answer = results[0].summary() | about
    answer |= baselines_summary(results)
    # Too long for the text output.
    trials = {"baseline_trials": rows} if (rows := baseline_trials(results)) else {}
    origin = _origin(loaded, dataset)
    if arguments.record:
        write_json(arguments.record, answer | trials | origin)
    # Stored results are found by way and shot, and all of them have balanced queries.
    kept = {} if arguments.unbalanced else _keep(arguments, dataset, results, about | origin)
    return answer | (trials if arguments.json else {}) | kept


def _keep(
    arguments: Namespace, dataset: Dataset, results: list[EpisodeResults], made_with: dict[str, Any]
) -> dict[str, Any]:
    """Store the results with a run folder or a registered version; say where."""
    from metagmvae.infra.runs.run_folder import SETTINGS

    if (Path(arguments.model) / SETTINGS).is_file():
        from metagmvae.infra.tracking.run_results import save_results

        return {"kept": save_results(Path(arguments.model), arguments.split, results, made_with)}
    if str(arguments.model).startswith("models:"):
        from metagmvae.configs.credentials import redact
        from metagmvae.infra.registry.version_results import save_on_version

        # The URI is valid on other machines too, unlike a relative path.
        made_with |= {"data": redact(dataset.uri)}
        return {"kept": save_on_version(arguments.model, arguments.split, results, made_with)}
    return {}


def _evaluate(arguments: Namespace, dataset: Dataset, loaded: LoadedModel) -> list[EpisodeResults]:
    """Return the result for each number of ways."""
    from metagmvae.evaluation.fewshot.evaluate_tasks import evaluate_tasks

    common = {key: getattr(arguments, key) for key in ("shot", "query", "episodes", "seed", "unbalanced")}
    tasks = [{"way": way, **common} for way in arguments.ways or [arguments.way]]
    return evaluate_tasks(
        loaded,
        dataset,
        tasks,
        split=arguments.split,
        mode=arguments.mode,
        baselines=arguments.baselines,
        name=arguments.model,
        progress=partial(progress_bar, quiet=arguments.json),
    )


def _origin(loaded: LoadedModel, dataset: Dataset) -> dict[str, Any]:
    """Dataset, settings, fingerprints, versions and training of the encoder that a result was produced with."""
    from metagmvae.configs.load import fingerprint
    from metagmvae.evaluation.fewshot.encoder_package import encoder_origin
    from metagmvae.evaluation.provenance import dataset_origin, provenance

    selected_by = loaded.info.get("selected_by")
    return {
        "dataset": dataset_origin(dataset.manifest, dataset.fingerprint),
        "settings": loaded.settings.model_dump(mode="json", include={"model", "adapt", "pretrain", "train"}),
        "settings_fingerprint": fingerprint(loaded.settings),
        "trained": loaded.info,
        "checkpoint": {"chosen_by": selected_by or "the last step", "validation_labels": bool(selected_by)},
        "encoder": encoder_origin(loaded, dataset),
        "source_fingerprint": dataset.manifest["source_fingerprint"],
        "environment": provenance(),
    }


def classify(arguments: Namespace) -> Answer:
    """Run `metagmvae classify`."""
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.infra.workflows.classify import FIELDS, classify_folders

    loaded = resolve_model(arguments.model)
    if loaded.preprocessing is None and arguments.invert is None:
        LOG.warning(
            "metagmvae classify: %s does not record whether its training images were inverted; these images are not: "
            "give --invert or --no-invert",
            arguments.model,
        )
    figure_file = Path(arguments.figure) if arguments.figure else None
    answer = classify_folders(loaded, Path(arguments.support), Path(arguments.query), figure_file, arguments.invert)
    if not arguments.json and not set(FIELDS).intersection(answer["classes"]):
        for row in answer["queries"]:
            del row["probabilities"]  # the other columns of the table say the same
    return answer


def figure(arguments: Namespace) -> Answer:
    """Run `metagmvae figure`."""
    from metagmvae.evaluation.figures.gallery import draw_gallery
    from metagmvae.evaluation.sweeps.record import is_sweep
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.infra.runs.run_folder import METRICS, read_lines
    from metagmvae.pipelines.records import DataError
    from metagmvae.pipelines.shards.dataset import Dataset

    if is_sweep(Path(arguments.model)):
        return _sweep_figures(Path(arguments.model), Path(arguments.out))
    if not arguments.data:
        raise DataError(f"figures of {arguments.model} show images of a dataset: name it with --data")
    dataset = Dataset.open(arguments.data)
    dataset.split(arguments.split)
    loaded = resolve_model(arguments.model)
    # Learning curves are drawn only if MODEL is a run folder.
    lines = read_lines(Path(arguments.model) / METRICS)
    files = draw_gallery(loaded, dataset, arguments.split, Path(arguments.out), lines)
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
