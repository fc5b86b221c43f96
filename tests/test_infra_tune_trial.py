"""A trial trains like `metagmvae train`, and the trials of a node share the rows of the dataset."""

import resource
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from command_words import TINY, pairs
from glyphs_dataset import new_dataset
from small_runs import without_times

from metagmvae.configs.load import load_settings, to_json
from metagmvae.infra.runs.local_context import LocalContext
from metagmvae.infra.runs.run_folder import METRICS, SETTINGS, read_lines
from metagmvae.infra.runs.train_in_process import train_in_process
from metagmvae.infra.runs.training_inputs import load_inputs
from metagmvae.infra.tune import trial
from metagmvae.infra.tune.sweep_folder import REASON
from metagmvae.infra.tune.trial import OUTSIDE, one_line, run_trial, shared_dataset
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.checkpoint import load_state

SMALL = TINY | {
    "pretrain.steps": 0,
    "train.steps": 6,
    "train.set_size": 20,
    "validation.every": 3,
    "run.figures": "false",
    "run.threads": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return new_dataset(tmp_path_factory.mktemp("glyphs") / "data", (200, 6, 3))


@pytest.fixture
def reports(monkeypatch):
    """The reports of a trial to Ray Tune, which does not run."""
    received = []
    monkeypatch.setattr(trial.tune, "report", received.append)
    return received


def new_trial(data, folder, **more):
    folder.mkdir(parents=True)
    settings = load_settings("omniglot-5way", pairs(SMALL | {"data.uri": data, "run.out": folder} | more))
    (folder / SETTINGS).write_text(to_json(settings))
    about_data = {"data": str(data), "fingerprint": Dataset.open(data).fingerprint}
    return {"number": 0, "folder": str(folder), "task": "5w1s", **about_data}, settings


def assert_same_lines(ours, theirs):
    assert without_times(read_lines(ours / METRICS)) == without_times(read_lines(theirs / METRICS))


def test_a_trial_is_bit_identical_to_train(data, tmp_path, reports):
    config, settings = new_trial(data, tmp_path / "trial")
    run_trial(config)
    alone = tmp_path / "alone"
    alone.mkdir()
    context = LocalContext(alone, torch.device("cpu"), resume=False)
    train_in_process(load_inputs(settings, Dataset.open(data)), context, "learner")
    assert_same_lines(tmp_path / "trial", alone)
    ours, theirs = (load_state(folder / "checkpoint.pt") for folder in (tmp_path / "trial", alone))
    for key, value in theirs["model"].items():
        assert torch.equal(ours["model"][key], value), key
    lines = [line for line in read_lines(alone / METRICS) if "validation/5w1s" in line]
    assert [report["step"] for report in reports] == [3, 6]
    assert [report["accuracy"] for report in reports] == [line["validation/5w1s"] for line in lines]
    assert all(report["ci95"] > 0 for report in reports)
    assert not (tmp_path / "trial" / REASON).exists()


def test_an_interrupted_trial_continues_and_repeats_its_reports(data, tmp_path, reports, monkeypatch):
    class Killed(BaseException):
        """Ends the training like the end of the process."""

    def kill(report):
        reports.append(report)
        raise Killed

    config, _ = new_trial(data, tmp_path / "trial")
    whole, _ = new_trial(data, tmp_path / "whole")
    run_trial(whole)
    complete = reports.copy()
    reports.clear()
    monkeypatch.setattr(trial.tune, "report", kill)
    with pytest.raises(Killed):
        run_trial(config)
    assert load_state(tmp_path / "trial" / "checkpoint.pt")["step"] == 2
    monkeypatch.setattr(trial.tune, "report", reports.append)
    run_trial(config)
    assert_same_lines(tmp_path / "trial", tmp_path / "whole")
    assert [r["accuracy"] for r in reports] == [r["accuracy"] for r in (complete[0], *complete)]
    reports.clear()
    run_trial(config)  # killed after its last step but before its line in the table: trains no step again
    assert [r["accuracy"] for r in reports] == [r["accuracy"] for r in complete]
    assert_same_lines(tmp_path / "trial", tmp_path / "whole")


def test_an_error_of_the_training_is_stored_as_one_line(data, tmp_path, reports):
    config, _ = new_trial(data, tmp_path / "diverges", **{"train.learning_rate": 1e9})
    run_trial(config)
    reason = (tmp_path / "diverges" / REASON).read_text()
    assert reason.count("\n") == 1
    assert "the update was not applied" in reason
    assert one_line(MemoryError("cannot allocate\n 8 GiB")) == "MemoryError: cannot allocate 8 GiB"
    assert one_line(DataError("no such\n split")) == "no such split"
    config, _ = new_trial(data, tmp_path / "unknown", **{"model.encoder": "resnet999"})
    run_trial(config)
    assert "resnet999" in (tmp_path / "unknown" / REASON).read_text()


def test_a_full_disk_is_reported_and_fails_no_trial(data, tmp_path, reports):
    config, _ = new_trial(data, tmp_path / "trial")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # less than a checkpoint, more than metric lines
    try:
        run_trial(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (report,) = reports
    assert report[OUTSIDE].startswith(f"{tmp_path}/trial/checkpoint.pt: cannot be written (File too large)")
    assert not (tmp_path / "trial" / REASON).exists()
    reports.clear()
    run_trial(config)
    assert [report["step"] for report in reports] == [3, 6]


def test_a_reason_that_cannot_be_written_is_reported(data, tmp_path, reports):
    config, _ = new_trial(data, tmp_path / "trial", **{"train.learning_rate": 1e9})
    (tmp_path / "trial" / REASON).symlink_to("/dev/full")
    run_trial(config)
    assert reports[-1][OUTSIDE].startswith(f"{tmp_path}/trial/{REASON}: cannot be written (No space left on device)")


def test_a_node_without_the_data_or_with_an_old_copy_trains_nothing(data, tmp_path, reports):
    config, _ = new_trial(data, tmp_path / "trial")
    run_trial(config | {"fingerprint": "0" * 64})
    run_trial(config | {"data": str(tmp_path / "gone")})
    old, gone = (report[OUTSIDE] for report in reports)
    assert f"{data} on {socket.gethostname()}: is another dataset ({config['fingerprint'][:12]}…) than" in old
    assert gone.startswith(f"{tmp_path / 'gone'}: ")
    assert not {METRICS, REASON} & {path.name for path in (tmp_path / "trial").iterdir()}


def test_a_node_without_the_folder_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match="this node does not see it; give --out a folder that all nodes share"):
        run_trial({"folder": str(tmp_path / "elsewhere"), "data": str(data), "task": "5w1s"})


def test_rows_are_opened_once_per_process_for_every_reader(data):
    dataset = shared_dataset(str(data))
    assert shared_dataset(str(data)) is dataset
    rows = dataset.rows("train", "memory")
    assert dataset.images("train", "auto") is rows
    numbers = np.arange(0, len(rows), 7)
    assert np.array_equal(rows[numbers], Dataset.open(data).rows("train", "memory")[numbers])
    assert np.array_equal(dataset.labels("train"), Dataset.open(data).labels("train"))


READ = """
import sys
import numpy as np
from metagmvae.infra.tune.trial import shared_dataset
rows = shared_dataset(sys.argv[1]).rows("train", "memory")
total = sum(int(rows[np.arange(first, min(first + 256, len(rows)))].sum()) for first in range(0, len(rows), 256))
print(total, flush=True)
sys.stdin.read()
"""


def test_trials_of_a_node_share_the_shards_in_memory(data):
    """If two processes read all rows, each page of a shard belongs to both."""
    root = str(Path(__file__).parents[1])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    trials = [subprocess.Popen([sys.executable, "-c", READ, str(data)], cwd=root, text=True, **pipes) for _ in range(2)]
    try:
        expected = int(Dataset.open(data).rows("train", "memory").sum(dtype=np.int64))
        assert [int(trial.stdout.readline()) for trial in trials] == [expected] * 2
        size = sum(shard.stat().st_size for shard in (data / "train").glob("*.tar"))
        for trial in trials:
            maps = [m for m in psutil.Process(trial.pid).memory_maps() if "/train/shard-" in m.path]
            assert sum(m.rss for m in maps) > 0.9 * size  # all of it was read by this process
            assert sum(m.private_dirty for m in maps) == 0  # no copy
            assert sum(m.pss for m in maps) < 0.6 * sum(m.rss for m in maps)  # proportional size: each page counts half
    finally:
        for trial in trials:
            trial.kill()
            trial.communicate()
