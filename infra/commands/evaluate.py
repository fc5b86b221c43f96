"""`evaluate`: few-shot accuracy of a trained model, with its calibration and baselines."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.evaluation.provenance import provenance
from metagmvae.infra.commands.encoder import ENCODER_HELP, add_encoder_options, encoder_options
from metagmvae.infra.commands.models import MODEL_HELP
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
    from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
    from metagmvae.pipelines.shards.dataset import Dataset
    from metagmvae.training.trainer.package import LoadedModel


def add(parsers: Parsers) -> None:
    """Add the command of this module to the parser."""
    example = "metagmvae evaluate models:/omniglot@champion --data data/omniglot --way 5 --shot 1"
    description = "measure the few-shot accuracy of a model on reproducible random episodes"
    parser = add_command(parsers, "evaluate", evaluate, description, example)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or {ENCODER_HELP} with published weights")
    parser.add_argument("--data", required=True, metavar="URI", help="dataset")
    parser.add_argument("--split", default="test", help="split of the dataset (default: test)")
    parser.add_argument("--way", type=int, default=5, metavar="K", help="classes per episode (default: 5)")
    help_text = "several numbers of classes instead of --way, one result row each"
    parser.add_argument("--ways", type=int, nargs="+", metavar="K", help=help_text)
    help_text = "labelled images per class; several numbers: one result row each, and the images are encoded once "
    help_text += "(default: 1)"
    parser.add_argument("--shot", type=int, nargs="+", default=[1], metavar="S", help=help_text)
    _add_queries(parser)
    help_text = "change a setting of the adaptation, for example adapt.proportions=estimated, or model.average (views "
    help_text += "whose features are averaged); may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=help_text)
    parser.add_argument("--episodes", type=int, default=1000, metavar="N", help="number of episodes (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    parser.add_argument("--mode", choices=("transductive", "inductive"), default="transductive", help=MODE_HELP)
    add_encoder_options(parser)
    help_text = "also evaluate baselines on the same features and episodes, with settings chosen on the validation "
    help_text += "classes, and the paired differences of the model to them"
    parser.add_argument("--baselines", action="store_true", help=help_text)
    help_text = "write the accuracy of every episode, of the baselines too"
    parser.add_argument("--results", metavar="FILE.parquet", type=output_file, help=help_text)
    help_text = "write the result with settings, fingerprints and versions"
    parser.add_argument("--record", metavar="FILE.json", type=output_file, help=help_text)
    help_text = "write a page with accuracy, calibration error, reliability diagram and an example episode"
    parser.add_argument("--html", metavar="FILE.html", type=output_file, help=help_text)
    add_tracking(parser)


def _add_queries(parser: ArgumentParser) -> None:
    """Add the options that say which images are classified."""
    help_text = "images to classify per class (default: 15)"
    parser.add_argument("--query", type=int, default=15, metavar="Q", help=help_text)
    parser.add_argument("--mix-groups", action="store_true", help=f"{MIX_GROUPS_HELP} (not stored with the model)")
    help_text = "half of the classes have --query images to classify, the others one; the model is not told which "
    help_text += "(the result is not stored with the model)"
    parser.add_argument("--unbalanced", action="store_true", help=help_text)
    help_text = "dirichlet:ALPHA: K times --query images to classify, whose classes are drawn with proportions from a "
    help_text += "Dirichlet distribution, the more unequal the smaller ALPHA (not stored with the model either)"
    parser.add_argument("--queries", metavar="KIND", default="balanced", help=f"balanced (default), or {help_text}")
    help_text = "N further classes per episode with --query images and no labelled ones: accuracy, AUROC, and what the "
    help_text += "queries of no labelled class cost the others, in both modes (needs `metagmvae calibrate`, but not "
    help_text += "for an encoder alone, whose head is fitted on the validation classes)"
    parser.add_argument("--open", type=int, default=0, metavar="N", dest="open_classes", help=help_text)


def evaluate(arguments: Namespace) -> Answer:
    """Run `metagmvae evaluate`."""
    from metagmvae.evaluation.encoders.result_record import result_origin
    from metagmvae.evaluation.fewshot.evaluate_episodes import write_episodes
    from metagmvae.pipelines.files import write_json
    from metagmvae.pipelines.shards.dataset import Dataset

    queries = _queries(arguments)
    dataset = Dataset.open(arguments.data)
    dataset.split(arguments.split)
    models = _models(arguments, dataset)
    loaded = models[0][0]
    about = {"split": arguments.split, "data": str(arguments.data), "data_fingerprint": dataset.fingerprint}
    about["model"] = str(arguments.model)
    origin = result_origin(loaded, dataset)
    if arguments.open_classes:
        answer = _evaluate_open(arguments, dataset, loaded, queries) | about
        if arguments.record:
            write_json(arguments.record, answer | origin)
        return answer
    results = _evaluate(arguments, dataset, models, queries)
    if arguments.results:
        write_episodes(arguments.results, results)
    answer, details = _answer(arguments, loaded, results, about)
    if arguments.record:
        write_json(arguments.record, answer | details | origin)
    if arguments.html:
        _write_page(arguments, dataset, loaded, results)
        answer["html"] = arguments.html
    # Stored results are found by way, shot and mode; all of them have balanced queries, the settings of the model,
    # labelled images and queries of different groups, and no head.
    special = arguments.unbalanced or queries["dirichlet"] is not None or arguments.overrides or results[0].head
    special = special or arguments.mix_groups
    kept = {} if special else _keep(arguments, dataset, results, about | origin)
    diagram = {"reliability": _diagram(details["reliability"])} if details["reliability"] else {}
    return answer | (details if arguments.json else diagram) | kept


def _queries(arguments: Namespace) -> dict[str, Any]:
    """Return `unbalanced`, `dirichlet` and `mix_groups` of the tasks."""
    kind, _, value = arguments.queries.partition(":")
    if arguments.open_classes < 0:
        raise DataError(f"--open {arguments.open_classes}: must be at least 1")
    several = len(arguments.shot) > 1
    without = {"--ways": arguments.ways, "--results": arguments.results, "--html": arguments.html}
    without["several numbers in --shot"] = several
    if arguments.open_classes and (given := [name for name, used in without.items() if used]):
        raise DataError(f"--open: cannot be combined with {given[0]}; leave one of them out")
    if arguments.queries == "balanced":
        return {"unbalanced": arguments.unbalanced, "dirichlet": None, "mix_groups": arguments.mix_groups}
    try:
        alpha = float(value)
    except ValueError:
        alpha = 0.0
    if kind != "dirichlet" or not 0 < alpha < float("inf"):
        raise DataError(f"--queries {arguments.queries}: give balanced, or dirichlet:ALPHA with a number above 0")
    if arguments.unbalanced:
        raise DataError("--unbalanced and --queries: give one of them")
    return {"unbalanced": False, "dirichlet": alpha, "mix_groups": arguments.mix_groups}


def _models(arguments: Namespace, dataset: Dataset) -> list[tuple[LoadedModel, list[int]]]:
    """The models that the numbers of shots select."""
    from metagmvae.infra.workflows.evaluated_models import models_by_shot

    options = encoder_options(arguments, dataset)
    models = models_by_shot(arguments.model, arguments.shot, arguments.overrides, **options)
    given = [name for name in ("record", "html") if getattr(arguments, name)]
    if len(models) > 1 and given:
        reason = f"describes one model, and {arguments.model} keeps another one for each number of shots"
        raise DataError(f"--{given[0]}: {reason}; give one --shot")
    return models


def _answer(
    arguments: Namespace, loaded: LoadedModel, results: list[EpisodeResults], about: dict[str, Any]
) -> tuple[Answer, dict[str, Any]]:
    """The answer, and details that are too long for the text output: reliability diagram, trials of the baselines."""
    from metagmvae.evaluation.encoders.evaluate_encoders import head_records
    from metagmvae.evaluation.fewshot.baseline_tuning import baseline_trials, baselines_summary

    several_shots = len(arguments.shot) > 1
    if arguments.ways or several_shots:
        answer = {"rows": [result.summary() for result in results], **about}
    else:
        answer = results[0].summary() | about
    bins = [
        ({"way": result.way} if arguments.ways else {}) | ({"shot": result.shot} if several_shots else {}) | row
        for result in results
        if result.reliability is not None
        for row in result.reliability.summary()["bins"]
    ]
    trials = {"baseline_trials": rows} if (rows := baseline_trials(results)) else {}
    answer |= head_records(loaded, results) | baselines_summary(results)
    return answer, {"reliability": bins} | trials


def _diagram(bins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reliability diagram as text: a bar of the accuracy of each bin, and a mark at its confidence."""
    width, rows = 30, []
    for row in bins:
        bar = list(("#" * round(width * row["accuracy"])).ljust(width + 1))
        bar[round(width * row["confidence"])] = "|"
        rows.append(row | {"accuracy #, confidence |": "".join(bar)})
    return rows


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


def _evaluate(
    arguments: Namespace, dataset: Dataset, models: list[tuple[LoadedModel, list[int]]], queries: dict[str, Any]
) -> list[EpisodeResults]:
    """Return the result for each number of ways and shots; each model encodes the images once."""
    from metagmvae.evaluation.encoders.evaluate_encoders import evaluate_model

    common = {key: getattr(arguments, key) for key in ("query", "episodes", "seed")}
    ways = arguments.ways or [arguments.way]
    results = []
    for loaded, shots in models:
        results += evaluate_model(
            loaded,
            dataset,
            [{"way": way, "shot": shot, **common, **queries} for way in ways for shot in shots],
            split=arguments.split,
            mode=arguments.mode,
            head=arguments.head,
            baselines=arguments.baselines,
            name=arguments.model,
            progress=partial(progress_bar, quiet=arguments.json),
        )
    return sorted(results, key=lambda result: (ways.index(result.way), arguments.shot.index(result.shot)))


def _evaluate_open(
    arguments: Namespace, dataset: Dataset, loaded: LoadedModel, queries: dict[str, Any]
) -> dict[str, Any]:
    """Return `rows`: the model in both modes, without its background component, and the baselines if asked for."""
    from metagmvae.evaluation.uncertainty.evaluate_open_task import evaluate_open_task

    numbers = {key: getattr(arguments, key) for key in ("way", "query", "episodes", "seed", "open_classes")}
    numbers["shot"] = arguments.shot[0]
    results = evaluate_open_task(
        loaded,
        dataset,
        numbers | queries,
        split=arguments.split,
        head=arguments.head,
        baselines=arguments.baselines,
        name=arguments.model,
        progress=partial(progress_bar, quiet=arguments.json),
    )
    return {"rows": [result.summary() for result in results]}


def _write_page(arguments: Namespace, dataset: Dataset, loaded: LoadedModel, results: list[EpisodeResults]) -> None:
    from metagmvae.evaluation.comparison.html_page import write_report
    from metagmvae.evaluation.comparison.page_figures import draw_models
    from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, Score
    from metagmvae.evaluation.comparison.table import compare
    from metagmvae.evaluation.comparison.validation_rows import EvaluatedModel

    first = results[0]
    episodes = (first.query, arguments.episodes, first.seed, first.unbalanced, first.dirichlet, first.groups)
    protocol = EvalProtocol(first.mode, arguments.split, dataset.fingerprint, *episodes)
    by_task = {(result.way, result.shot): result for result in results}
    scores = {task: Score(result.mean, result.ci95, result) for task, result in by_task.items()}
    row = Row(loaded.settings.name, "model", str(arguments.model), protocol, scores)
    models = [EvaluatedModel(loaded.settings.name, loaded, by_task)]
    page = draw_models(models, dataset, arguments.split)
    write_report(arguments.html, compare([row], []), [], page, provenance())
