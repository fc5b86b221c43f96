"""A migrated, empty MLflow database, made once per test process and copied: migrations cost seconds."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from configs.schema import TrackingSettings
from infra.mlflow_store import connect


@functools.cache
def _template() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mlflow-template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    connect(TrackingSettings(store=str(folder)))
    return folder / "mlflow.db"


def new_store(folder: Path) -> TrackingSettings:
    """Settings of a fresh SQLite store in `folder`."""
    folder.mkdir(parents=True)
    shutil.copy(_template(), folder / "mlflow.db")
    return TrackingSettings(store=str(folder))
