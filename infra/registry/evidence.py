"""Evidence for a decision about a challenger: files in the challenger's run, and tags of its version.

What reads or writes a store raises a TrackingError if it cannot be reached.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from metagmvae.configs.credentials import redact
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.comparison.head_to_head import EvalPlan, HeadToHead
from metagmvae.evaluation.comparison.promotion_rule import Decision, write_pairs
from metagmvae.evaluation.encoders.result_record import SECTIONS
from metagmvae.infra.registry.alias_change import whoami
from metagmvae.infra.tracking.convert import flatten
from metagmvae.infra.tracking.store import Store
from metagmvae.infra.tracking.tracking_errors import tracking_errors
from metagmvae.pipelines.files import read_json, write_json
from metagmvae.pipelines.records import DataError

Status = Literal["promoted", "refused", "overtaken", "would be promoted", "would be refused"]
"""What happened to the challenger. Overtaken: the alias was moved while the models were evaluated."""
PREFIX = "promotion."
FOLDER = "promotions"
DECISION = "decision.json"


@dataclass(frozen=True)
class Evidence:
    """A decision and the numbers that it is based on."""

    challenger: str
    """`models:/name/version`, or a run folder in a dry run."""
    champion: str
    """`models:/name/version`; empty: there was none."""
    alias: str
    plan: EvalPlan
    comparison: HeadToHead
    decision: Decision
    provenance: dict[str, Any]
    """Versions, machine, commit and time."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per task: accuracies (fractions), difference, its 95% interval, p-values, verdict."""
        if self.comparison.differences:
            columns = ("challenger", "champion", "difference", "ci95", "t_test", "wilcoxon", "verdict")
            return [
                {"task": f"{paired.way}w{paired.shot}s"} | {key: paired.summary()[key] for key in columns}
                for paired in self.comparison.differences
            ]
        return [
            {"task": f"{result.way}w{result.shot}s", "challenger": result.mean, "ci95": result.ci95}
            for result in self.comparison.challenger
        ]

    def answer(self, status: Status, reason: str = "") -> dict[str, Any]:
        """Return the answer of the command; an empty reason stands for that of the decision."""
        plan, task = self.plan, self.plan.tasks[0]
        answer: dict[str, Any] = {
            "decision": status,
            "reason": reason or self.decision.reason,
            "challenger": self.challenger,
            "champion": self.champion or None,
            "alias": self.alias,
            "tasks": self.rows(),
            "rule": self.decision.rule,
            "margin": self.decision.margin,
            "data": redact(plan.dataset.uri),
            "data_fingerprint": plan.dataset.fingerprint,
            "split": plan.split,
            "mode": self.comparison.challenger[0].mode,
            **{key: task[key] for key in ("query", "episodes", "seed")},
        }
        return answer | ({"warnings": list(self.comparison.warnings)} if self.comparison.warnings else {})

    def record(self, settings: Settings, status: Status, reason: str = "") -> dict[str, Any]:
        """Return the content of `decision.json`: the answer, who decided, settings of the challenger, environment."""
        return self.answer(status, reason) | {
            "by": whoami(),
            "settings": settings.model_dump(mode="json", include=SECTIONS),
            "environment": self.provenance,
        }


def upload_evidence(store: Store, version: Any, evidence: Evidence, record: Mapping[str, Any], folder: str = "") -> str:
    """Upload `decision.json` and `episodes.parquet` to the run of the challenger's version.

    `folder` is that of an earlier upload to overwrite; empty: a new one.

    Returns:
        The folder, `runs:/id/promotions/…`.
    """
    root = f"runs:/{version.run_id}/"
    if not folder:
        time, unique = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}", uuid.uuid4().hex[:6]
        folder = f"{root}{FOLDER}/{time}-{evidence.alias}-{record['decision']}-{unique}"
    with tempfile.TemporaryDirectory() as local, tracking_errors(store.uri):
        write_json(Path(local) / DECISION, record)
        write_pairs(Path(local) / "episodes.parquet", evidence.comparison.challenger, evidence.comparison.champion)
        store.client.log_artifacts(version.run_id, local, folder.removeprefix(root))
    return folder


def tag_version(store: Store, version: Any, record: Mapping[str, Any], folder: str) -> None:
    """Set the tags `promotion.…` of the version to the newest decision, and delete those of earlier decisions.

    The tag with the folder of the decision is set last, so it says that all others are complete.
    """
    by_task = {row["task"]: {key: value for key, value in row.items() if key != "task"} for row in record["tasks"]}
    environment = record["environment"]
    tags = {key: value for key, value in record.items() if key not in ("challenger", "settings", "environment")}
    tags |= {
        "tasks": list(by_task),
        "warnings": "; ".join(record.get("warnings", [])) or None,
        "time": environment["time"],
        "commit": environment["commit"],
        "package": environment["versions"]["metagmvae"],
    }
    flat = flatten({PREFIX.rstrip("."): tags | by_task | {"evidence": folder}})
    with tracking_errors(store.uri):
        for key in version.tags:
            if key.startswith(PREFIX) and key not in flat:
                store.client.delete_model_version_tag(version.name, version.version, key)
        for key, value in flat.items():
            store.client.set_model_version_tag(version.name, version.version, key, value[:5000])


def complete_tags(store: Store, version: Any, folder: str) -> dict[str, Any] | None:
    """Set the tags of a version whose promotion was interrupted after the alias had moved.

    `folder` holds the evidence of its promotion.

    Returns:
        The answer of the interrupted command; None if the tags are complete.

    Raises:
        DataError: the stored decision cannot be read.
    """
    if version.tags.get(f"{PREFIX}evidence") == folder:
        return None
    path = f"{folder.removeprefix(f'runs:/{version.run_id}/')}/{DECISION}"
    with tempfile.TemporaryDirectory() as local, tracking_errors(store.uri):
        record: dict[str, Any] = read_json(Path(store.client.download_artifacts(version.run_id, path, local)))
    try:
        tag_version(store, version, record, folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}/{DECISION}: not the record of a promotion; delete its run's folder") from error
    return {key: value for key, value in record.items() if key not in ("by", "settings", "environment")}
