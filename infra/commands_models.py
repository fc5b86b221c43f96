"""`evaluate`, `classify`, `figure` and `table`: trained models and what they are worth."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.command import Answer, Parsers, add_command

if TYPE_CHECKING:
    from evaluation.benchmark import EpisodeResults
    from evaluation.package import LoadedModel
    from pipelines.dataset import Dataset

MODEL_HELP = "run folder, checkpoint, package, or models:/name@alias"


def add(parsers: Parsers) -> None:
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
    from infra.model_uri import resolve_model
    from pipelines.dataset import Dataset
    from pipelines.files import write_json

    dataset = Dataset.open(arguments.data)
    dataset.split(arguments.split)
    loaded = resolve_model(arguments.model, shot=arguments.shot)
    results, beside = _judge(arguments, dataset, loaded)
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
        from infra.run_results import keep_results

        answer["kept"] = keep_results(Path(arguments.model), arguments.split, results, about | made_with)
    if str(arguments.model).startswith("models:"):
        from infra.mlflow_store import shown
        from infra.version_results import keep_on_version

        about["data"] = shown(dataset.uri)  # found from everywhere, unlike a relative path
        answer["kept"] = keep_on_version(arguments.model, arguments.split, results, about | made_with)
    return answer


def _judge(
    arguments: Namespace, dataset: Dataset, loaded: LoadedModel
) -> tuple[list[EpisodeResults], list[dict[str, Any]]]:
    """One result for each way; rows of baselines if asked for."""
    from infra.judging import judge_tasks

    same = {key: getattr(arguments, key) for key in ("shot", "query", "episodes", "seed")}
    tasks = [{"way": way, **same} for way in arguments.ways or [arguments.way]]
    results, beside = [], []
    for result, rows in judge_tasks(
        loaded,
        arguments.model,
        dataset,
        arguments.split,
        tasks,
        mode=arguments.mode,
        baselines=arguments.baselines,
        quiet=arguments.json,
    ):
        results.append(result)
        beside += rows
    return results, beside


def _made_with(loaded: LoadedModel, dataset: Dataset) -> dict[str, Any]:
    from configs.load import fingerprint
    from evaluation.environment import environment_record

    return {
        "settings": loaded.settings.model_dump(mode="json", include={"model", "adapt", "pretrain", "train"}),
        "settings_fingerprint": fingerprint(loaded.settings),
        "trained": loaded.info,
        "source_fingerprint": dataset.manifest["source_fingerprint"],
        "environment": environment_record(),
    }


def classify(arguments: Namespace) -> Answer:
    from infra.classify import classify_folders
    from infra.model_uri import resolve_model

    loaded = resolve_model(arguments.model)
    picture = Path(arguments.figure) if arguments.figure else None
    return classify_folders(loaded, Path(arguments.support), Path(arguments.query), picture)


def figure(arguments: Namespace) -> Answer:
    from evaluation.gallery import draw_gallery
    from evaluation.sweep_space import is_sweep
    from infra.model_uri import resolve_model
    from infra.surroundings import METRICS, read_lines
    from pipelines.dataset import Dataset
    from pipelines.records import DataError

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
    from evaluation.sweep_report import REPORT, write_report

    summary = write_report(folder, out)
    best = summary["best"] and {key: summary["best"][key] for key in ("number", "accuracy", "ci95", "step", "settings")}
    figures = [str(out / name) for name in summary["figures"]]
    return {"figures": figures, "report": str(out / REPORT), "trials": summary["by_status"], "best": best}


def table(arguments: Namespace) -> Answer:
    from evaluation.report import results_table

    return {"table": results_table(Path(arguments.results), arguments.names)}
