"""`evaluate`, `classify`, `figure` and `table`: trained models and what they are worth."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.infra.commands.parsing import Answer, Parsers, add_command, progress_bar

if TYPE_CHECKING:
    from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
    from metagmvae.pipelines.shards.dataset import Dataset
    from metagmvae.training.trainer.package import LoadedModel


MODEL_HELP = "run folder, checkpoint, package, or models:/name@alias"


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    _add_evaluate(parsers)
    example = "metagmvae classify models:/omniglot@champion --support labelled --query unlabelled"
    what = "name the class of images from a few labelled ones"
    parser = add_command(parsers, "classify", classify, what, example)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--support", required=True, metavar="DIR", help="DIR/<class>/*.png")
    parser.add_argument("--query", required=True, metavar="DIR", help="DIR/*.png")
    parser.add_argument("--figure", metavar="FILE.png", help="draw what was recognised")

    example = "metagmvae figure runs/first --data data/omniglot --out figures"
    what = "draw curves, reconstructions, the modes of episodes and the latent map; or what a sweep says"
    parser = add_command(parsers, "figure", figure, what, example)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; or folder of a sweep")
    parser.add_argument("--data", metavar="URI", help="data set; a sweep needs none")
    parser.add_argument("--split", default="validation", help="whose classes are shown (validation)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the PNG files")

    example = "metagmvae table omniglot-cpu --results evaluation/results"
    what = "recorded results beside the paper's, in Markdown"
    parser = add_command(parsers, "table", table, what, example)
    parser.add_argument("names", metavar="NAME", nargs="+", help="NAME-5way-1shot.json and so on")
    parser.add_argument("--results", default="evaluation/results", metavar="DIR", help="where they lie")


def _add_evaluate(parsers: Parsers) -> None:
    example = "metagmvae evaluate models:/omniglot@champion --data data/omniglot --way 5 --shot 1"
    parser = add_command(parsers, "evaluate", evaluate, "few-shot accuracy over seeded episodes", example)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", required=True, metavar="URI", help="data set")
    parser.add_argument("--split", default="test")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--ways", type=int, nargs="+", metavar="WAY", help="several ways from one model, in rows")
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--query", type=int, default=15)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=("transductive", "inductive"), default="transductive")
    parser.add_argument("--baselines", action="store_true", help="beside it, on the same features and episodes")
    parser.add_argument("--results", metavar="FILE.parquet", help="keep the accuracy of every episode")
    parser.add_argument("--record", metavar="FILE.json", help="keep the result with what it was made with")


def evaluate(arguments: Namespace) -> Answer:
    """Run `metagmvae evaluate`."""
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.pipelines.files import write_json
    from metagmvae.pipelines.shards.dataset import Dataset

    dataset = Dataset.open(arguments.data)
    dataset.split(arguments.split)
    loaded = resolve_model(arguments.model, shot=arguments.shot)
    results, beside = _evaluate(arguments, dataset, loaded)
    if arguments.results:
        results[0].write_parquet(arguments.results)
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
    if beside:
        answer["baselines"] = beside
    made_with = _made_with(loaded, dataset)
    if arguments.record:
        write_json(arguments.record, answer | made_with)
    if (Path(arguments.model) / "settings.json").is_file():
        from metagmvae.infra.tracking.run_results import keep_results

        answer["kept"] = keep_results(Path(arguments.model), arguments.split, results, about | made_with)
    if str(arguments.model).startswith("models:"):
        from metagmvae.infra.registry.version_results import keep_on_version
        from metagmvae.infra.tracking.store import redact

        about["data"] = redact(dataset.uri)  # found from everywhere, unlike a relative path
        answer["kept"] = keep_on_version(arguments.model, arguments.split, results, about | made_with)
    return answer


def _evaluate(
    arguments: Namespace, dataset: Dataset, loaded: LoadedModel
) -> tuple[list[EpisodeResults], list[dict[str, Any]]]:
    """One result for each way; rows of baselines if asked for."""
    from metagmvae.evaluation.fewshot.evaluate_tasks import evaluate_tasks

    same = {key: getattr(arguments, key) for key in ("shot", "query", "episodes", "seed")}
    tasks = [{"way": way, **same} for way in arguments.ways or [arguments.way]]
    results, beside = [], []
    for result, rows in evaluate_tasks(
        loaded,
        arguments.model,
        dataset,
        arguments.split,
        tasks,
        mode=arguments.mode,
        baselines=arguments.baselines,
        progress=partial(progress_bar, quiet=arguments.json),
    ):
        results.append(result)
        beside += rows
    return results, beside


def _made_with(loaded: LoadedModel, dataset: Dataset) -> dict[str, Any]:
    from metagmvae.configs.load import fingerprint
    from metagmvae.evaluation.provenance import provenance

    return {
        "settings": loaded.settings.model_dump(mode="json", include={"model", "adapt", "pretrain", "train"}),
        "settings_fingerprint": fingerprint(loaded.settings),
        "trained": loaded.info,
        "source_fingerprint": dataset.manifest["source_fingerprint"],
        "environment": provenance(),
    }


def classify(arguments: Namespace) -> Answer:
    """Run `metagmvae classify`."""
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.infra.workflows.classify import classify_folders

    loaded = resolve_model(arguments.model)
    picture = Path(arguments.figure) if arguments.figure else None
    return classify_folders(loaded, Path(arguments.support), Path(arguments.query), picture)


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
        raise DataError(f"figures of {arguments.model} show images of a data set: name it with --data")
    dataset = Dataset.open(arguments.data)
    dataset.split(arguments.split)
    loaded = resolve_model(arguments.model)
    # A model by another name than its run folder has no curves.
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
    from metagmvae.evaluation.comparison.readme import results_table

    return {"table": results_table(Path(arguments.results), arguments.names)}
