"""A command that torchrun or srun starts several times says how several processes are used."""

import json
import subprocess
import sys

import pytest

from metagmvae.infra.cli import main
from metagmvae.infra.runs.folder_lock import lock_run_folder
from metagmvae.pipelines.records import DataError

PREPARE = ["prepare", "glyphs", "--option", "classes=[6,6,6]"]
VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def launched(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["train", "glyphs-demo"], "and give --set run.engine=ray --set run.workers=4"),
        (["tune", "glyphs-demo", "--space", "core"], "and give --workers-at-once 4"),
        ([*PREPARE, "--out", "data"], "and give --workers 4"),
        (["evaluate", "run", "--data", "data"], "start it without the launcher"),
    ],
)
def test_one_of_several_processes_does_nothing(launched, tmp_path, monkeypatch, capsys, words, options):
    monkeypatch.chdir(tmp_path)
    launched(RANK="1", WORLD_SIZE="4")
    assert main([*words, "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert "has started 4 processes" in error
    assert error.endswith(options)
    assert err == f"metagmvae {words[0]}: {error}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "8"},  # some clusters set it to the number of nodes
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"},  # tasks that write to folders of their own
    ],
)
def test_a_process_alone_runs(launched, tmp_path, variables):
    launched(**variables)
    assert main([*PREPARE, "--out", str(tmp_path / "data"), "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("tasks", "hint"), [("2", r" \(srun has started 2 tasks; start one: .*run.workers=2\)$"), ("1", "…$")]
)
def test_tasks_of_srun_that_share_a_folder_are_named(launched, tmp_path, tasks, hint):
    launched(SLURM_PROCID="1", SLURM_STEP_NUM_TASKS=tasks)
    with (
        lock_run_folder(tmp_path),
        pytest.raises(DataError, match=f"another process trains in this folder.*{hint}"),
        lock_run_folder(tmp_path),
    ):
        pass


@pytest.mark.slow
def test_torchrun_itself(launched, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    words = [*launcher, "metagmvae", *PREPARE, "--out", str(tmp_path / "data")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "metagmvae prepare: RANK and WORLD_SIZE=2 are set: a launcher such as torchrun has started 2" in ended.stderr
    assert list(tmp_path.iterdir()) == []
