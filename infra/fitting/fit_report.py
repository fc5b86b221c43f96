"""The page that `metagmvae fit` writes: what was found and done, accuracy, calibration, an episode, the commands."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metagmvae.evaluation.comparison.formatting import percent, points
from metagmvae.evaluation.comparison.html_page import write_page
from metagmvae.evaluation.comparison.page_figures import PageImage, draw_reliability
from metagmvae.infra.fitting.fit_plan import format_seconds
from metagmvae.infra.fitting.fit_state import REPORT, FitState
from metagmvae.pipelines.shards.dataset import Dataset

TEMPLATE = "fit.html"


def fit_result(
    state: FitState,
    out: Path,
    dataset: Dataset,
    records: Sequence[Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
    example: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the answer of `metagmvae fit`, also written with `--record`.

    Args:
        state: what was decided and measured.
        out: the output folder.
        dataset: the prepared images.
        records: see `write_fit_report`.
        compared: see `write_fit_report`.
        example: see `write_fit_report`.
    """
    schedule, splits, seconds = state.schedule, dataset.manifest["splits"], state.seconds
    assert schedule is not None
    keys = ["on", "way", "shot", "accuracy", "ci95", "ece", "ece_uncalibrated", "query", "episodes", "mode"]
    keys += ["groups", "left_out"]
    return {
        "model": str(out),
        "report": str(out / REPORT),
        "found": state.plan.found,
        "samples": {split: part["samples"] for split, part in splits.items()},
        "classes": {split: len({*dataset.class_names(split)} - {""}) for split in splits},
        **({"groups": state.plan.held_out} if state.plan.groups else {}),
        "preset": state.plan.preset,
        "steps": {"pretrain": schedule.pretrain_steps, "meta": schedule.meta_steps},
        "accuracy": [{key: record[key] for key in keys if key in record} for record in records],
        "baselines": [{"on": r["on"], **row} for r in records for row in r.get("baselines", [])],
        "paired": [{"on": r["on"], **row} for r in records for row in r.get("paired", [])],
        **({"frozen encoder": [dict(row) for row in compared]} if compared else {}),
        **({"example": f"{example['right']} of {example['queries']} files right"} if example else {}),
        "budget_s": state.plan.budget_s,
        "seconds": {**{k: round(v, 1) for k, v in seconds.items()}, "all": round(sum(seconds.values()), 1)},
        "next": f"metagmvae classify {shlex.quote(str(out))} --support LABELLED --query PICTURES",
    }


def write_fit_report(
    path: Path,
    state: FitState,
    records: Sequence[Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
    example: Mapping[str, Any] | None,
    environment: Mapping[str, Any],
) -> None:
    """Write the page atomically.

    Args:
        path: file to write.
        state: what was decided and measured; its `result` is filled.
        records: what `metagmvae evaluate --record` wrote for each task, with `on`: whose classes.
        compared: the rows of `frozen_encoder.compare_encoder`.
        example: `figure` (a PNG file), `right` and `queries` of the classified files; None: there is none.
        environment: `evaluation.provenance.provenance()`.

    Raises:
        DataError: the file cannot be written.
    """
    result, schedule = state.result, state.schedule
    assert result is not None
    assert schedule is not None
    reliability = {
        (record["way"], record["shot"]): record["reliability"] for record in records if "reliability" in record
    }
    images = [draw_reliability(reliability)] if reliability else []
    if example:
        uri = f"data:image/png;base64,{base64.b64encode(Path(example['figure']).read_bytes()).decode()}"
        caption = f"An episode of files that were not trained on: {example['right']} of {example['queries']} are right"
        images.append(PageImage(caption, uri, uri, 2))
    write_page(
        path,
        TEMPLATE,
        name=result["model"],
        sentences=[_sentence(record) for record in records] + _compared_sentences(compared),
        found=state.plan.found,
        will_do=state.plan.will_do,
        samples=result["samples"],
        classes=result["classes"],
        speed=[
            ("device", f"{schedule.device}, {schedule.threads} thread{'s' if schedule.threads > 1 else ''}"),
            ("seconds per step of contrastive pre-training", f"{schedule.pretrain_step_s:.3f}"),
            ("steps of contrastive pre-training", f"{schedule.pretrain_steps:,}"),
            ("steps of meta-training", f"{schedule.meta_steps:,}"),
            ("budget", format_seconds(state.plan.budget_s)),
            ("time used", format_seconds(result["seconds"]["all"])),
        ],
        seconds={part: f"{value:,.1f}" for part, value in result["seconds"].items()},
        tables=[_table(record) for record in records],
        compared=[_compared_row(row) for row in compared],
        encoder=state.plan.encoder,
        images=images,
        commands=state.commands,
        next_command=result["next"],
        environment=environment,
    )


def _sentence(record: Mapping[str, Any]) -> str:
    accuracy = percent(record["accuracy"], record["ci95"])
    text = (
        f"{accuracy}% of {record['way']}-way {record['shot']}-shot queries are classified correctly "
        f"({record['mode']}, {record['episodes']:,} episodes of {record['on']})"
    )
    if record.get("left_out"):
        text += f"; without the classes {', '.join(record['left_out'])}, whose groups do not suffice"
    if "ece" in record:
        text += f"; expected calibration error {100 * record['ece']:.1f} points"
    return f"{text}."


def _compared_sentences(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each task: against the better head of the frozen encoder."""
    best: dict[tuple[str, int], Mapping[str, Any]] = {}
    for row in compared:
        key = (row["on"], row["shot"])
        best[key] = max(best.get(key, row), row, key=lambda each: each["champion"])
    words = {"better": "beats", "worse": "is worse than", "undecided": "cannot be told apart from"}
    return [
        f"Training {words[row['verdict']]} the frozen encoder {row['encoder']} with {row['head']} at {row['way']} ways "
        f"and {_labelled_images(row['shot'])} ({on}): {points(row['difference'], row['ci95'])} points."
        for (on, _), row in best.items()
    ]


def _compared_row(row: Mapping[str, Any]) -> dict[str, str]:
    """Cells of one task and head of the frozen encoder."""
    settings = ", ".join(f"{key} {value}" for key, value in row["head_settings"].items())
    return {
        "task": f"{row['way']} ways, {_labelled_images(row['shot'])}: {row['on']}",
        "head": f"{row['head']} ({settings})" if settings else row["head"],
        "mode": row["head_mode"],
        "encoder": percent(row["champion"]),
        "trained": percent(row["challenger"]),
        "difference": points(row["difference"], row["ci95"]),
        "verdict": row["verdict"],
    }


def _labelled_images(shot: int) -> str:
    return f"{shot} labelled image{'s' if shot > 1 else ''} per class"


def _table(record: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of one task: the model, then the baselines on the same episodes with the paired difference."""
    differences = {row["baseline"]: row for row in record.get("paired", [])}
    rows = [
        {
            "name": "Meta-GMVAE",
            "mode": record["mode"],
            "accuracy": percent(record["accuracy"], record["ci95"]),
            "ece": f"{100 * record['ece']:.2f}" if "ece" in record else "",
            "difference": "",
            "verdict": "",
        }
    ]
    for row in record.get("baselines", []):
        difference = differences.get(row["baseline"])
        rows.append(
            {
                "name": row["baseline"],
                "mode": row["mode"],
                "accuracy": percent(row["accuracy"], row["ci95"]),
                "ece": f"{100 * row['ece']:.2f}" if "ece" in row else "",
                "difference": points(difference["difference"], difference["ci95"]) if difference else "",
                "verdict": difference["verdict"] if difference else "",
            }
        )
    title = f"{record['way']} ways, {_labelled_images(record['shot'])}: {record['on']}"
    return {"title": title, "rows": rows}
