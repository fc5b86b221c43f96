"""Fixtures used by several test files."""

import os
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _no_tracking_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not write into the MLflow store of the user who runs them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def data_root() -> Path:
    """Folder of the real datasets, named by METAGMVAE_DATA.

    Without it the test is skipped, or fails if METAGMVAE_REQUIRE_DATA is 1, as in CI.
    """
    folder = Path(os.environ.get("METAGMVAE_DATA", ""))
    if os.environ.get("METAGMVAE_DATA") and folder.is_dir():
        return folder
    message = f"METAGMVAE_DATA = {os.environ.get('METAGMVAE_DATA')!r} is not a folder of real datasets"
    if os.environ.get("METAGMVAE_REQUIRE_DATA") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset of glyphs: 30, 6 and 6 classes with 20 images each."""
    from glyphs_dataset import new_dataset

    return new_dataset(tmp_path_factory.mktemp("glyphs") / "data", (30, 6, 6))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An opened dataset of glyphs: 8, 6 and 3 classes with 20 images each."""
    from glyphs_dataset import new_dataset

    from metagmvae.pipelines.shards.dataset import Dataset

    return Dataset.open(new_dataset(tmp_path_factory.mktemp("glyphs") / "data", (8, 6, 3)))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty folder for packages that add parts to metagmvae."""
    from added_packages import Site

    return Site(tmp_path / "site", monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """Settings of a new MLflow store."""
    from mlflow_template import new_store

    return new_store(tmp_path / "store")


@pytest.fixture
def plan(dataset: Any, tmp_path: Path) -> Any:
    """The plan of a small sweep on `dataset`."""
    from small_sweep import new_plan

    return new_plan(tmp_path, dataset)
