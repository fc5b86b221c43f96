"""What a decision about a challenger rests on: files in the challenger's run, and tags of its version."""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.comparison.head_to_head import EvalPlan, HeadToHead
from metagmvae.evaluation.comparison.promotion_rule import Decision, write_pairs
from metagmvae.infra.registry.registry_lock import whoami
from metagmvae.infra.tracking.convert import flatten
from metagmvae.infra.tracking.store import Store, redact, tracking_errors
from metagmvae.pipelines.files import write_json

Result = Literal["promoted", "refused", "overtaken", "would be promoted", "would be refused"]
"""Overtaken: another promotion moved the alias while this challenger was judged."""
PREFIX = "promotion."
FOLDER = "promotions"


@dataclass(frozen=True)
class Evidence:
    """A decision with all that it was made by."""

    challenger: str
    """`models:/name/version`; a run folder where nothing is to be registered."""
    champion: str
    """`models:/name/version`; empty: there was none."""
    alias: str
    course: EvalPlan
    outcome: HeadToHead
    decision: Decision
    record: dict[str, Any]
    """Versions, machine, commit and time, as `environment_record` gives them."""

    def rows(self) -> list[dict[str, Any]]:
        """One for each task: accuracies of both as shares, difference, its interval, p, verdict."""
        if self.outcome.differences:
            kept = ("challenger", "champion", "difference", "ci95", "t_test", "wilcoxon", "verdict")
            return [
                {"task": f"{paired.way}w{paired.shot}s"} | {key: paired.summary()[key] for key in kept}
                for paired in self.outcome.differences
            ]
        return [
            {"task": f"{result.way}w{result.shot}s", "challenger": result.mean, "ci95": result.ci95}
            for result in self.outcome.challenger
        ]

    def answer(self, result: Result, reason: str = "") -> dict[str, Any]:
        """As plain values."""
        course, task = self.course, self.course.tasks[0]
        answer: dict[str, Any] = {
            "decision": result,
            "reason": reason or self.decision.reason,
            "challenger": self.challenger,
            "champion": self.champion or None,
            "alias": self.alias,
            "tasks": self.rows(),
            "rule": self.decision.rule,
            "margin": self.decision.margin,
            "data": redact(course.dataset.uri),
            "data_fingerprint": course.dataset.fingerprint,
            "split": course.split,
            "mode": self.outcome.challenger[0].mode,
            **{key: task[key] for key in ("query", "episodes", "seed")},
        }
        return answer | ({"warnings": list(self.outcome.warnings)} if self.outcome.warnings else {})


def keep_files(store: Store, version: Any, evidence: Evidence, settings: Settings, result: Result, reason: str) -> str:
    """Put `decision.json` and `episodes.parquet` into the version's run.

    Args:
        store: of the version.
        version: MLflow's entry of the challenger.
        evidence: of the decision.
        settings: of the challenger.
        result: what came of it.
        reason: empty: that of the decision.

    Returns:
        Where they are: `runs:/id/promotions/…`.

    Raises:
        TrackingError: the store cannot be reached.
    """
    place = f"{FOLDER}/{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{evidence.alias}-{result}-{uuid.uuid4().hex[:6]}"
    content = evidence.answer(result, reason) | {
        "by": whoami(),
        "settings": settings.model_dump(mode="json", include={"model", "adapt", "pretrain", "train"}),
        "environment": evidence.record,
    }
    with tempfile.TemporaryDirectory() as folder, tracking_errors(store.uri):
        write_json(Path(folder) / "decision.json", content)
        write_pairs(Path(folder) / "episodes.parquet", evidence.outcome.challenger, evidence.outcome.champion)
        store.client.log_artifacts(version.run_id, folder, place)
    return f"runs:/{version.run_id}/{place}"


def keep_tags(store: Store, version: Any, evidence: Evidence, result: Result, reason: str, where: str) -> None:
    """Tags `promotion.…` of the version: the newest decision about it, nothing left of earlier ones.

    Raises:
        TrackingError: the store cannot be reached.
    """
    answer = evidence.answer(result, reason)
    by_task = {row.pop("task"): row for row in answer.pop("tasks")}
    del answer["challenger"]
    answer |= {
        "tasks": list(by_task),
        "warnings": "; ".join(answer.get("warnings", [])) or None,
        "by": whoami(),
        "time": evidence.record["time"],
        "commit": evidence.record["commit"],
        "package": evidence.record["versions"]["metagmvae"],
        "evidence": where,
    }
    tags = flatten({PREFIX.rstrip("."): answer | by_task})
    with tracking_errors(store.uri):
        for key in version.tags:
            if key.startswith(PREFIX) and key not in tags:
                store.client.delete_model_version_tag(version.name, version.version, key)
        for key, value in tags.items():
            store.client.set_model_version_tag(version.name, version.version, key, value[:5000])
