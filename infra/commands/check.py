"""`doctor` checks the installation, `bench` measures speed, `presets` and `config` show and check settings."""

from __future__ import annotations

import shlex
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from metagmvae.evaluation.provenance import provenance
from metagmvae.infra.bench.dispatch import BENCHES
from metagmvae.infra.commands.parsing import Answer, FailedAnswer, Parsers, add_command, output_file
from metagmvae.pipelines.records import DataError

if TYPE_CHECKING:
    from metagmvae.configs.schema import Settings

WIDTH = 100
"""Columns of `config explain` and `doctor`."""


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    what = "list the bundled settings: data, hardware, time, recorded 5-way accuracy in percent for 1 and 5 shots"
    add_command(parsers, "presets", presets, what, "metagmvae presets")
    _add_config(parsers)
    what = "check versions, devices, Ray, the MLflow store and disks, and print a remedy for each problem"
    add_command(parsers, "doctor", doctor, what, "metagmvae doctor")

    example = "metagmvae bench step --record bench-step.json"
    what = "measure the speed of one stage next to a literal or conventional implementation"
    parser = add_command(parsers, "bench", bench, what, example)
    help_text = (
        "what to measure: step (training step), loader (reading images), episodes (evaluation), simclr (augmentation), "
        "features (feature shards), prepare (writing shards), tune (sweep)"
    )
    parser.add_argument("name", choices=tuple(BENCHES), help=help_text)
    parser.add_argument("--data", metavar="URI", help="loader, episodes, simclr: data set folder")
    parser.add_argument("--split", default="validation", help="loader, episodes, simclr: split (validation)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions; the median is reported (3)")
    parser.add_argument("--pictures", type=int, default=5000, help="loader: images in the image folder (5000)")
    parser.add_argument("--episodes", type=int, default=1000, help="episodes: number for the fast evaluation (1000)")
    help_text = "episodes: number for the literal evaluation (10)"
    parser.add_argument("--literal-episodes", type=int, default=10, help=help_text)
    parser.add_argument("--rows", type=int, default=1_000_000, help="features: rows to write and read (1,000,000)")
    parser.add_argument("--source", help="prepare: folder or archive of raw images")
    help_text = "prepare: kind of the source (mini-imagenet)"
    parser.add_argument("--from", dest="kind", default="mini-imagenet", help=help_text)
    help_text = "prepare: numbers of workers to compare (0 1 2)"
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help=help_text)
    parser.add_argument("--trials", type=int, help="tune: number of trials (200)")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads (0: PyTorch's default)")
    help_text = "also write the result and the environment to this file"
    parser.add_argument("--record", metavar="FILE.json", type=output_file, help=help_text)


def _add_config(parsers: Parsers) -> None:
    what = "show, explain, check or copy settings: a preset, a TOML file or those of a run"
    parser = add_command(parsers, "config", show, what, "metagmvae config explain omniglot-cpu train")
    actions = parser.add_subparsers(metavar="ACTION", required=True, help="what to do, see `config ACTION --help`")

    def add_action(name: str, run: Callable[[Namespace], Answer], what: str, example: str) -> ArgumentParser:
        action = add_command(actions, name, run, what, f"metagmvae config {name} {example}")
        help_text = "name of a preset, TOML file, or folder of a run"
        action.add_argument("config", metavar="CONFIG", help=help_text)
        help_text = "change a setting, for example train.steps=500; may be given several times"
        action.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=help_text)
        return action

    add_action("show", show, "print all settings as TOML", "omniglot-cpu --set train.steps=500")
    what = "say what settings mean, their values and defaults; * marks what CONFIG changes"
    action = add_action("explain", explain, what, "omniglot-cpu train.learning_rate")
    help_text = "setting or section, such as train.learning_rate or adapt (default: all)"
    action.add_argument("keys", metavar="KEY", nargs="*", help=help_text)
    add_action("validate", validate, "check settings without a dataset", "mine.toml")
    action = add_action("copy", copy, "write settings to a new TOML file, to be edited", "omniglot-cpu mine.toml")
    action.add_argument("file", metavar="FILE", type=output_file, help="TOML file to write")


def presets(arguments: Namespace) -> Answer:
    """Run `metagmvae presets`."""
    from metagmvae.configs import load
    from metagmvae.configs.describe import preset_head
    from metagmvae.evaluation.paper_tables.readme import RESULTS, preset_accuracies

    rows = []
    for name in load.presets():
        head, settings = preset_head(name), load.load_settings(name)
        row = {"preset": name, **preset_accuracies(RESULTS, name), "data": settings.data.uri}
        row |= {"hardware": head.hardware, "time": head.time}
        rows.append(row | {"trains": head.title} if arguments.json else row)
    return {"presets": rows}


def show(arguments: Namespace) -> Answer:
    """Run `metagmvae config show`."""
    from metagmvae.configs.load import to_toml

    settings = _settings(arguments)
    return {"settings": settings.model_dump(mode="json") if arguments.json else to_toml(settings)}


def explain(arguments: Namespace) -> Answer:
    """Run `metagmvae config explain`."""
    from metagmvae.configs.describe import describe_settings

    described = describe_settings(_settings(arguments), arguments.keys)
    if arguments.json:
        return {"settings": [asdict(item) | {"changed": item.value != item.default} for item in described]}
    lines = []
    for item in described:
        mark, default = ("* ", f" (default: {item.default})") if item.value != item.default else ("  ", "")
        lines.append(f"{mark}{item.key} = {item.value}{default}")
        choices = f" One of: {', '.join(map(str, item.choices))}." if item.choices else ""
        indent = 6 * " "
        lines += textwrap.wrap(item.text + choices, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return {"settings": "\n".join(lines)}


def validate(arguments: Namespace) -> Answer:
    """Run `metagmvae config validate`."""
    from metagmvae.configs.describe import describe_settings
    from metagmvae.configs.load import fingerprint

    settings = _settings(arguments)
    changed = sum(item.value != item.default for item in describe_settings(settings))
    return {"valid": arguments.config, "name": settings.name, "changed": changed, "fingerprint": fingerprint(settings)}


def copy(arguments: Namespace) -> Answer:
    """Run `metagmvae config copy`."""
    from metagmvae.configs import load
    from metagmvae.configs.describe import preset_text
    from metagmvae.pipelines.files import atomic_file

    settings = _settings(arguments)
    is_preset = arguments.config in load.presets() and not Path(arguments.config).exists()
    text = preset_text(arguments.config) if is_preset and not arguments.overrides else load.to_toml(settings)
    if Path(arguments.file).is_file():
        raise DataError(f"{arguments.file}: exists already; choose another file")
    with atomic_file(arguments.file) as file:
        file.write(text.encode())
    return {"file": arguments.file, "next": shlex.join(["metagmvae", "train", arguments.file])}


def _settings(arguments: Namespace) -> Settings:
    """Settings of a preset, a TOML file or the folder of a run, with the overrides."""
    from metagmvae.configs.load import load_settings, settings_from_json, to_json
    from metagmvae.infra.runs.run_folder import SETTINGS, read_settings

    if (Path(arguments.config) / SETTINGS).is_file():
        return settings_from_json(to_json(read_settings(Path(arguments.config))), arguments.overrides)
    return load_settings(arguments.config, arguments.overrides)


def doctor(arguments: Namespace) -> Answer:
    """Run `metagmvae doctor`."""
    from metagmvae.infra.workflows.doctor import run_checks

    rows = [{"check": name} | asdict(result) for name, result in run_checks()]
    answer = {"checks": rows if arguments.json else "\n".join(line for row in rows for line in _check_lines(row))}
    return FailedAnswer(answer) if any(row["state"] == "wrong" for row in rows) else answer


def _check_lines(row: dict[str, str]) -> list[str]:
    """State, name and finding of a check in lines of `WIDTH` columns, and the remedy of a problem."""
    head = f"{row['state']:6}{row['check']:18}"
    found = textwrap.wrap(row["found"], WIDTH, initial_indent=head, subsequent_indent=24 * " ")
    remedy = textwrap.wrap(f"remedy: {row['remedy']}", WIDTH, initial_indent=24 * " ", subsequent_indent=32 * " ")
    return found + (remedy if row["remedy"] else [])


def bench(arguments: Namespace) -> Answer:
    """Run `metagmvae bench`."""
    import torch

    from metagmvae.configs.limits import MAX_THREADS
    from metagmvae.pipelines.files import write_json

    for option in ("repeats", "pictures", "episodes", "literal_episodes", "rows", "trials"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise DataError(f"--{option.replace('_', '-')} is {value}; give 1 or more")
    if not 0 <= arguments.threads <= MAX_THREADS:
        raise DataError(f"--threads is {arguments.threads}; give a number from 0 to {MAX_THREADS:,}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    answer = {"bench": arguments.name, **BENCHES[arguments.name](arguments)}
    if arguments.record:
        write_json(arguments.record, answer | {"environment": provenance()})
    return answer
