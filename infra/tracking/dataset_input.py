"""The data set of a run or of a result as an MLflow data set: its name, its fingerprint as digest, and its place.

With it, `MlflowClient.search_logged_models` ranks models by a metric on one data set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from metagmvae.configs.credentials import redact
from metagmvae.evaluation.provenance import known_dataset
from metagmvae.infra.tracking.convert import MetricPoint
from metagmvae.infra.tracking.store import Store
from metagmvae.pipelines.shards.object_store import is_remote

DIGEST_LENGTH = 36
"""MLflow stores no longer digest; these are the first digits of the fingerprint (SHA-256)."""


@dataclass(frozen=True)
class DatasetReference:
    """A data set that an MLflow store can be asked for."""

    name: str
    digest: str
    uri: str
    fingerprint: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> DatasetReference | None:
        """The data set in a record of a run or of a result; None if the record does not say which one it was.

        Args:
            record: `data_fingerprint`, `data` (its URI), and `dataset` with its `name`, which older records lack.
        """
        fingerprint, uri = record.get("data_fingerprint"), redact(str(record.get("data") or ""))
        if not fingerprint:
            return None
        origin = record.get("dataset") or known_dataset(str(fingerprint))
        name = origin.get("name") or PurePosixPath(uri).name or "dataset"
        return cls(str(name), str(fingerprint)[:DIGEST_LENGTH], uri, str(fingerprint))

    def training_input(self) -> Any:
        """The `DatasetInput` of a run that trains on it."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=self.name,
            digest=self.digest,
            source_type="s3" if is_remote(self.uri) else "local",
            source=json.dumps({"uri": self.uri}),
            profile=json.dumps({"fingerprint": self.fingerprint}),
        )
        return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def log_model_metrics(
    store: Store, run_id: str, model_id: str, points: Sequence[MetricPoint], record: Mapping[str, Any]
) -> None:
    """Log metrics of a run that belong to one of its models and to the data set of a record.

    An empty `model_id` stands for no model, see `logged_model_id`; for the record see `DatasetReference.of`.
    """
    reference = DatasetReference.of(record)
    dataset = {} if reference is None else {"dataset_name": reference.name, "dataset_digest": reference.digest}
    for point in points:
        options = {"timestamp": point.timestamp_ms, "step": point.step, "model_id": model_id or None, **dataset}
        store.client.log_metric(run_id, point.key, point.value, synchronous=True, **options)


def logged_model_id(version: Any) -> str:
    """The logged model that a version was created from; empty for versions of MLflow 2, which had none."""
    found = re.search(r"/(m-[0-9a-f]{32})/artifacts/?$", version.source or "")
    return version.model_id or (found[1] if found else "")
