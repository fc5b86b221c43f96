"""Fixtures that several tests share."""

import os
from pathlib import Path

import pytest


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
