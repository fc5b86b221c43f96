"""`fit`: from a folder of pictures to a classifier and a report."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from metagmvae.evaluation.provenance import provenance
from metagmvae.infra.commands.encoder import ENCODER_HELP, add_encoder_options
from metagmvae.infra.commands.parsing import DRY_RUN_HELP, Answer, Parsers, add_command, output_file


def add(parsers: Parsers) -> None:
    """Add the command of this module to the parser."""
    description = (
        "look at a folder of pictures, prepare it, train a model within a time budget, evaluate it, and write "
    )
    description += "the model and a report; run again, it continues"
    example = "metagmvae fit pictures --budget 20m --out models/mine"
    parser = add_command(parsers, "fit", fit, description, example, "the same command continues")
    help_text = "folder or archive of images; with class folders, some classes are held out to measure the accuracy"
    parser.add_argument("pictures", metavar="PICTURES", help=help_text)
    help_text = "folder of labelled images, DIR/CLASS/*.png, on which the model is evaluated too"
    parser.add_argument("--labelled", metavar="DIR", help=help_text)
    help_text = "time for everything, such as 90s, 20m or 1h30m (default: 20m)"
    parser.add_argument("--budget", default="20m", metavar="TIME", help=help_text)
    help_text = "new folder for the model, the report and all files (default: models/NAME of the pictures)"
    parser.add_argument("--out", metavar="MODEL", help=help_text)
    help_text = f"also compare with this published encoder, not trained, on the same episodes: {ENCODER_HELP}"
    parser.add_argument("--encoder", metavar="NAME", help=help_text)
    add_encoder_options(parser, head=False)
    parser.add_argument("--unlabelled", action="store_true", help="sub-folders of PICTURES are not classes")
    help_text = "CSV file with the classes of PICTURES, as in `prepare folder`; their folders then mean nothing"
    parser.add_argument("--labels", metavar="FILE", help=help_text)
    help_text = "column of --labels whose value, such as the patient, keeps images together: the accuracy is then that "
    help_text += "on images of other patients, of the same classes"
    parser.add_argument("--groups", metavar="COLUMN", help=help_text)
    help_text = "resize whole images to squares instead of cutting out the middle square, as in `prepare folder`"
    parser.add_argument("--no-crop", action="store_false", dest="crop", help=help_text)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the held-out classes and the training (default: 0)"
    )
    help_text = "also write the result with plan, speed and versions"
    parser.add_argument("--record", metavar="FILE.json", type=output_file, help=help_text)
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN_HELP)
    parser.set_defaults(commands=parsers.choices)


def fit(arguments: Namespace) -> Answer:
    """Run `metagmvae fit`."""
    from metagmvae.infra.fitting.fit import FitRequest, plan_fit, run_fit
    from metagmvae.infra.fitting.fit_plan import parse_budget
    from metagmvae.infra.fitting.fit_state import STATE
    from metagmvae.pipelines.files import read_json, write_json
    from metagmvae.pipelines.sources.source import check_integer

    def run(words: Sequence[str]) -> Answer:
        name, *options = words
        request = arguments.commands[name].parse_args(options)
        request.json, request.quiet = arguments.json, arguments.quiet
        answer: Answer = request.run(request)
        return answer

    check_integer("--seed", arguments.seed, 0)
    pictures = Path(arguments.pictures)
    name = pictures.absolute().stem if pictures.is_file() else pictures.absolute().name
    out = Path(arguments.out) if arguments.out else Path("models") / (name or "pictures")
    labelled = Path(arguments.labelled) if arguments.labelled else None
    budget_s = parse_budget(arguments.budget)
    weights = Path(arguments.weights) if arguments.weights else None
    encoder = (arguments.encoder, weights, arguments.image_size)
    labels = Path(arguments.labels) if arguments.labels else None
    options = (arguments.seed, arguments.unlabelled, *encoder, arguments.crop, labels, arguments.groups)
    request = FitRequest(pictures, labelled, out, budget_s, *options)
    if arguments.dry_run:
        plan, stored = plan_fit(request)
        begun = {"continues": str(out)} if stored else {}
        return {"dry run": "nothing was written", "found": plan.found, "will do": plan.will_do, **begun}
    answer = run_fit(request, run)
    if arguments.record:
        stored = read_json(out / STATE)
        speed = {"plan": stored["plan"], "schedule": stored["schedule"]}
        write_json(arguments.record, answer | speed | {"environment": provenance()})
    if arguments.json:
        return answer
    # The rest was said before, or is in the report.
    shown = {key: value for key, value in answer.items() if key not in ("found", "baselines", "paired")}
    if frozen := answer.get("frozen encoder"):
        keys = {"challenger": "trained", "champion": "frozen", "difference": "difference", "ci95": "ci95"}
        columns = {"on": "on", "head": "head", "way": "way", "shot": "shot", **keys, "verdict": "verdict"}
        shown["frozen encoder"] = [{title: row[key] for key, title in columns.items()} for row in frozen]
    return shown
