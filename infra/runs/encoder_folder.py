"""Writes an encoder by name as a folder that commands take as a model and as a run."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from metagmvae.configs.load import fingerprint
from metagmvae.evaluation.provenance import dataset_origin, provenance
from metagmvae.infra.runs.run_folder import RECORD, SETTINGS
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.output_target import cannot_write
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.package import LoadedModel, save_package


def write_encoder(loaded: LoadedModel, dataset: Dataset, out: Path) -> None:
    """Write a model package with the settings and the record of a run, so that it can be registered too; atomic.

    Args:
        loaded: by `named_encoder`.
        dataset: whose images it takes. It was not trained on them, so the record has no fingerprint of training data.
        out: new folder.

    Raises:
        DataError: the folder exists or cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise cannot_write(out, error, "choose another folder") from error
    try:
        package = save_package(folder / "package", loaded)
        record = provenance() | {"settings_fingerprint": fingerprint(loaded.settings), "kind": "encoder"}
        record |= {"data": dataset.uri, "dataset": dataset_origin(dataset.manifest, dataset.fingerprint)}
        write_json(package / SETTINGS, loaded.settings.model_dump(mode="json"))
        write_json(package / RECORD, record)
        if out.exists():
            raise DataError(f"{out}: already exists; choose a new folder")
        package.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
