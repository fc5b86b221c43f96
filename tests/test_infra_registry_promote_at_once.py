"""Several processes promote at the same moment: one wins, and the others report who overtook them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow_template
import pytest
from mlflow_template import untrained_run

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.registry.alias_history import alias_version, read_history
from metagmvae.infra.registry.register import register
from metagmvae.infra.tracking.store import Store, connect

pytestmark = [pytest.mark.mlflow, pytest.mark.slow]


def run_rounds(uri: str, data: Path, folder: Path, count: int, processes: int) -> list[list[dict]]:
    """Let real processes promote at the same time; return the answers of all processes for each round."""
    script = Path(__file__).with_name("promotion_rounds.py")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    running = []
    for index in range(processes):
        command = [sys.executable, str(script), uri, "glyphs", str(data), str(folder), str(count), str(index)]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))

    def wait_for_files(prefix: str) -> None:
        while len(list(folder.glob(f"{prefix}-*"))) < processes:
            assert all(process.poll() in (None, 0) for process in running)
            time.sleep(0.01)

    try:
        for number in range(count):
            wait_for_files(f"ready-{number}")
            (folder / f"go-{number}").touch()
            wait_for_files(f"done-{number}")
        lines = [[json.loads(line) for line in process.communicate()[0].splitlines()] for process in running]
    finally:
        for process in running:
            process.kill()  # has no effect on a process that has ended
    return [list(answers) for answers in zip(*lines, strict=True)]


def check_one_winner_per_round(rounds: list[list[dict]], store: Store) -> None:
    changes = [change for change in read_history(store, "glyphs") if change.action == "promoted"]
    for number, answers in enumerate(rounds):
        (winner,) = (answer for answer in answers if answer["decision"] == "promoted")
        assert (changes[number].former, changes[number].version) == (winner["before"], winner["mine"])
        for loser in answers:
            if loser is not winner:
                assert loser["decision"] == "overtaken"
                assert f"from version {winner['before']} to version {winner['mine']}" in loser["reason"]
                assert f"promoted by {changes[number].by} at {changes[number].time}" in loser["reason"]
    assert len(changes) == len(rounds)
    assert alias_version(store, "glyphs", "champion") == changes[-1].version


def three_versions(folder: Path, data: Path, tracking: TrackingSettings) -> Store:
    """Return a store with three versions; the first is champion."""
    run = untrained_run(folder, data)
    for _ in range(3):
        register(run, tracking, "glyphs")
    store = connect(tracking)
    assert alias_version(store, "glyphs", "champion") == "1"
    return store


@pytest.mark.timeout(900)  # several processes import torch and MLflow
def test_one_of_three_simultaneous_promotions_wins(data, tmp_path):
    store = three_versions(tmp_path / "run", data, mlflow_template.new_store(tmp_path / "mlflow"))
    register(tmp_path / "run", TrackingSettings(uri=store.uri), "glyphs", "")
    check_one_winner_per_round(run_rounds(store.uri, data, tmp_path, count=3, processes=3), store)


@pytest.mark.timeout(900)  # several processes import torch and MLflow
def test_one_of_two_simultaneous_promotions_through_a_server_wins(data, tmp_path):
    with mlflow_template.running_server(tmp_path / "server") as uri:
        store = three_versions(tmp_path / "run", data, TrackingSettings(uri=uri))
        check_one_winner_per_round(run_rounds(uri, data, tmp_path, count=3, processes=2), store)
