"""Fixtures that several tests share."""

import os
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _no_tracking_server_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not write into the store of whoever runs them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def data_root() -> Path:
    """Folder of the real data sets, from METAGMVAE_DATA; missing, the test is skipped, or fails where CI asks."""
    folder = Path(os.environ.get("METAGMVAE_DATA", ""))
    if os.environ.get("METAGMVAE_DATA") and folder.is_dir():
        return folder
    message = f"METAGMVAE_DATA = {os.environ.get('METAGMVAE_DATA')!r} names no folder of real data"
    if os.environ.get("METAGMVAE_REQUIRE_DATA") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small data set of glyphs."""
    from metagmvae.pipelines.shards.dataset import Dataset
    from metagmvae.pipelines.shards.writer import write_dataset
    from metagmvae.pipelines.sources.source import open_source

    folder = tmp_path_factory.mktemp("glyphs") / "data"
    write_dataset(open_source("glyphs", classes=(8, 6, 3), drawings=20), folder)
    return Dataset.open(folder)


@pytest.fixture
def plan(dataset: Any, tmp_path: Path) -> Any:
    """Of a small sweep on it."""
    from small_sweep import new_plan

    return new_plan(tmp_path, dataset)
