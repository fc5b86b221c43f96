"""Several processes promote at the same moment: one wins, and the others are told by whom they were overtaken."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow_template
import pytest
from mlflow_template import judged_run

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.registry.alias_history import alias_version, read_history
from metagmvae.infra.registry.register import register
from metagmvae.infra.tracking.store import Store, connect
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs") / "data"
    write_dataset(open_source("glyphs", classes=(12, 6, 6), drawings=20), folder)
    return folder


def rounds(uri: str, data: Path, folder: Path, count: int, processes: int) -> list[list[dict]]:
    """What came of each round in which real processes promote at the same time."""
    script = Path(__file__).with_name("promotion_rounds.py")
    more = {"MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **more}
    running = []
    for place in range(processes):
        words = [sys.executable, str(script), uri, "glyphs", str(data), str(folder), str(count), str(place)]
        running.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))

    def wait(what: str) -> None:
        while len(list(folder.glob(f"{what}-*"))) < processes:
            assert all(process.poll() in (None, 0) for process in running)
            time.sleep(0.01)

    try:
        for number in range(count):
            wait(f"ready-{number}")
            (folder / f"go-{number}").touch()
            wait(f"done-{number}")
        lines = [[json.loads(line) for line in process.communicate()[0].splitlines()] for process in running]
    finally:
        for process in running:
            process.kill()  # of no effect on those that are done
    return [list(of_all) for of_all in zip(*lines, strict=True)]


def one_wins_each_round(found: list[list[dict]], store: Store) -> None:
    moves = [move for move in read_history(store, "glyphs") if move.action == "promoted"]
    for number, answers in enumerate(found):
        (winner,) = (answer for answer in answers if answer["decision"] == "promoted")
        assert (moves[number].former, moves[number].version) == (winner["before"], winner["mine"])
        for loser in answers:
            if loser is not winner:
                assert loser["decision"] == "overtaken"
                assert f"from version {winner['before']} to version {winner['mine']}" in loser["reason"]
                assert f"promoted by {moves[number].by} at {moves[number].time}" in loser["reason"]
    assert len(moves) == len(found)
    assert alias_version(store, "glyphs", "champion") == moves[-1].version


def three_versions(folder: Path, data: Path, tracking: TrackingSettings) -> Store:
    """A store in which three versions can win; the first is champion."""
    run = judged_run(folder, data)
    for _ in range(3):
        register(run, tracking, "glyphs")
    store = connect(tracking)
    assert alias_version(store, "glyphs", "champion") == "1"
    return store


@pytest.mark.timeout(900)  # several processes import all of it
def test_of_three_processes_that_promote_at_once_one_wins(data, tmp_path):
    store = three_versions(tmp_path / "run", data, mlflow_template.new_store(tmp_path / "mlflow"))
    register(tmp_path / "run", TrackingSettings(uri=store.uri), "glyphs", "")
    one_wins_each_round(rounds(store.uri, data, tmp_path, count=3, processes=3), store)


@pytest.mark.timeout(900)  # several processes import all of it
def test_of_two_processes_that_promote_at_once_through_a_server_one_wins(data, tmp_path):
    with mlflow_template.running_server(tmp_path / "server") as uri:
        store = three_versions(tmp_path / "run", data, TrackingSettings(uri=uri))
        one_wins_each_round(rounds(uri, data, tmp_path, count=3, processes=2), store)
