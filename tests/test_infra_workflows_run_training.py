"""A training run: the checks before it starts, exclusive use of its folder, resuming, and what it opens how often."""

import errno
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from called_commands import answer_of, refusal_of
from command_words import TINY, pairs, set_words
from glyphs_dataset import new_dataset

from metagmvae.configs.load import load_settings, presets, settings_from_json, to_json
from metagmvae.evaluation.fewshot import encoder_package
from metagmvae.infra.cli import main
from metagmvae.infra.runs import local_context
from metagmvae.infra.runs.folder_lock import lock_run_folder
from metagmvae.infra.runs.run_folder import (
    CHECKPOINT,
    CONFIG,
    FIGURES,
    METRICS,
    TRAINING_LOCK,
    append_lines,
    read_settings,
)
from metagmvae.infra.runs.training_inputs import load_inputs
from metagmvae.infra.tracking import live_tracker
from metagmvae.infra.workflows import run_training as run_training_module
from metagmvae.infra.workflows.run_training import run_training
from metagmvae.pipelines.records import DataError, WorkError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.training.trainer.checkpoint import load_state
from metagmvae.training.trainer.package import load_model

SETTINGS = TINY | {"pretrain.steps": 0, "train.steps": 2, "validation.every": 0, "run.figures": "false"}
HOLD_LOCK = """
import sys
from pathlib import Path
from metagmvae.infra.runs.folder_lock import lock_run_folder
with lock_run_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def settings(data, out, preset="omniglot-5way", **changes):
    return load_settings(preset, pairs(SETTINGS | {"data.uri": data, "run.out": out} | changes))


def test_run_folder_has_one_training_at_a_time(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(out)], text=True, **pipes)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(DataError, match=str(out)):
        run_training(settings(data, out))
    assert [path.name for path in out.iterdir()] == [TRAINING_LOCK]
    other.kill()
    with lock_run_folder(out, patience_s=60):
        other.communicate()
    assert run_training(settings(data, out)) == out
    assert (out / CHECKPOINT).exists()
    with lock_run_folder(out):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_folder_with_other_files_is_not_touched(data, tmp_path, resume):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="mine: not"):
        run_training(settings(data, tmp_path / "mine"), resume=resume)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_resume_without_checkpoint_prints_that_training_starts_at_step_1(data, tmp_path, caplog):
    """A mistyped folder would otherwise look like a resumed run."""
    run_training(settings(data, tmp_path / "run"), resume=True)
    line = f"{tmp_path / 'run'}: no checkpoint to resume from; training starts at step 1"
    assert line in caplog.messages
    caplog.clear()
    run_training(settings(data, tmp_path / "run"), resume=True)
    assert "no checkpoint" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train_split": "nowhere"}, "no split 'nowhere'"),
        ({"validation.every": 1, "validation.way": 9}, "6 classes"),
        ({"run.out": "{tmp}/file/run"}, "file is no writable folder; choose another"),
        ({"model.encoder": "resnet99"}, "resnet99"),
        ({"model.encoder": "vgg11", "model.image_size": 8}, "vgg11"),
        ({"run.engine": "ray", "run.address": "127.0.0.1:9"}, "no Ray cluster answers there"),
        ({"run.engine": "ray", "run.address": "here"}, "give host:port"),
        ({"data.uri": "{tmp}/nowhere"}, "nowhere"),
        ({"data.validation_split": "val", "validation.every": 1}, "no split 'val'"),
        pytest.param(
            {"run.device": "cuda"},
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_impossible_settings_are_refused_before_the_folder_is_created(data, tmp_path, changes, message):
    (tmp_path / "file").write_text("a file, not a folder")
    changes = {key: str(value).replace("{tmp}", str(tmp_path)) for key, value in changes.items()}
    with pytest.raises(ValueError, match=message) as caught:
        run_training(settings(data, changes.pop("run.out", tmp_path / "run"), **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_corrected_command_needs_neither_resume_nor_another_folder(data, tmp_path, monkeypatch):
    """Also where the training fails after its start, before it has saved anything."""
    with pytest.raises(ValueError, match="resnet99"):
        run_training(settings(data, tmp_path / "run", **{"model.encoder": "resnet99"}))

    def fail(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(run_training_module, "train_in_process", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        run_training(settings(data, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [TRAINING_LOCK]
    monkeypatch.undo()
    run_training(settings(data, tmp_path / "run"))


def test_full_disk_ends_the_run_with_the_first_error_and_the_run_is_resumed(data, tmp_path, monkeypatch):
    """Neither the metric line nor the status can be written; what was saved before stays."""
    whole = run_training(settings(data, tmp_path / "whole"))

    def full(path, lines):
        (tmp_path / "run" / METRICS).write_text('{"stage": "meta", "st')  # as much as there was space for
        append_lines(Path("/dev/full"), lines)

    def refuse(folder, status):
        raise DataError(f"{folder}: cannot be written")

    monkeypatch.setattr(local_context, "append_lines", full)
    monkeypatch.setattr(live_tracker, "write_status", lambda *what: None if what[1] == "RUNNING" else refuse(*what))
    with pytest.raises(WorkError, match=r"No space left on device\); mend this and continue with --resume$"):
        run_training(settings(data, tmp_path / "run"))
    monkeypatch.undo()
    run = run_training(settings(data, tmp_path / "run"), resume=True)
    ours, theirs = (load_state(folder / CHECKPOINT) for folder in (run, whole))
    assert all(torch.equal(ours["model"][key], value) for key, value in theirs["model"].items())
    assert ours["step"] == theirs["step"]


def test_full_disk_at_a_checkpoint_names_the_file_and_the_way_on(data, tmp_path, monkeypatch):
    def full(file, state):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local_context, "save_state", full)
    message = (
        rf"^{tmp_path}/run/{CHECKPOINT}: cannot be written \(No space left on device\); mend this and continue with"
    )
    with pytest.raises(WorkError, match=message):
        run_training(settings(data, tmp_path / "run"))


def test_files_of_the_user_and_of_a_run_that_has_saved_something_stay(data, tmp_path, monkeypatch):
    run = run_training(settings(data, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".json"}

    def fail(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(run_training_module, "train_in_process", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        run_training(settings(data, run), resume=True)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".json"} == before


def test_run_folder_is_a_configuration(data, tmp_path, capsys):
    """`train RUN --resume`, and `train RUN --set run.out=…` for a new run with the same settings."""
    run = run_training(settings(data, tmp_path / "run"))
    assert load_settings(run / CONFIG) == read_settings(run)
    assert main(["train", str(run), "--resume"]) == 0
    assert "continue with --resume" in refusal_of("train", run)
    other = tmp_path / "other"
    assert main(["train", str(run), "--set", f"run.out={other}", "--set", "train.steps=3"]) == 0
    assert read_settings(other).train.steps == 3
    assert main(["pretrain", str(run), "--resume", "--set", "pretrain.steps=2"]) == 2
    assert "is a run of metagmvae train; resume it with that command" in capsys.readouterr().err
    (run / CONFIG).unlink()  # a run of an older version
    assert main(["train", str(run), "--resume"]) == 0


def test_a_run_folder_that_was_moved_is_resumed_where_it_is(data, tmp_path):
    run = run_training(settings(data, tmp_path / "run"))
    moved = run.rename(tmp_path / "moved")
    assert main(["train", str(moved), "--resume"]) == 0
    assert not run.exists()


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_dry_run_says_what_would_be_done_and_writes_nothing(data, tmp_path, capsys, command):
    changes = {"data.uri": data, "pretrain.steps": 2, "run.out": tmp_path / "run"}
    words = [*set_words(SETTINGS | changes), "--dry-run"]
    answer = answer_of(command, "omniglot-5way", *words)
    assert answer["steps"] == ({"pretrain": 2, "meta": 2} if command == "train" else {"pretrain": 2})
    assert answer["run"] == str(tmp_path / "run")
    assert answer["engine"].startswith("local, ")
    assert main([command, "omniglot-5way", *words, "--set=model.encoder=resnet99"]) == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "a" / "run"
    for more in ([], ["--resume"]):
        assert main([command, "omniglot-5way", *words, f"--set=run.out={below}", *more]) == 2
        assert f"run.out = {below}: cannot be written, because {tmp_path / 'file'} is no" in capsys.readouterr().err


@pytest.mark.parametrize("preset", presets())
def test_a_dataset_without_validation_split_is_trained_on_with_a_warning(preset, data, caplog):
    dataset = Dataset.open(data)
    without = Dataset(dataset.root, {**dataset.manifest, "splits": {"train": dataset.split("train")}})
    inputs = load_inputs(load_settings(preset), without)
    assert inputs.settings.validation.every == 0
    assert inputs.settings.train.selection == "last"
    assert settings_from_json(to_json(inputs.settings)) == inputs.settings
    warnings = [r.message for r in caplog.records if "validation" in r.message]
    if not load_settings(preset).validation.every:
        assert warnings == []
        return
    (warning,) = warnings
    assert "has no split 'validation'; training goes on without validation, and the last model is kept" in warning


def test_training_without_validation_split_runs_to_its_end(tmp_path, caplog):
    data = new_dataset(tmp_path / "data", (8, 0, 3))
    run = run_training(settings(data, tmp_path / "run", **{"validation.every": 1, "run.figures": "true"}))
    assert load_state(run / CHECKPOINT)["step"] == 2
    run_training(settings(data, tmp_path / "run", **{"validation.every": 1}), resume=True)


@pytest.fixture
def features(data, tmp_path):
    """The glyphs encoded by a small encoder."""
    pretraining = settings(data, tmp_path / "encoder", "omniglot-cpu", **{"pretrain.steps": 2})
    encoder = run_training(pretraining, kind="encoder")
    with encoder_package.feature_source(load_model(encoder), Dataset.open(data), "float32") as source:
        write_dataset(source, tmp_path / "features")
    return tmp_path / "features"


def test_dataset_encoder_and_device_are_opened_once(features, tmp_path, monkeypatch):
    calls = Counter()

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*arguments):
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)

    count(Dataset, "__init__")
    count(encoder_package, "load_package")
    count(run_training_module, "select_device")
    changes = {"validation.every": 1, "run.figures": "true"}
    out = run_training(settings(features, tmp_path / "run", "omniglot-cpu", **changes))
    assert calls == {"__init__": 1, "load_package": 1, "select_device": 1}
    assert (out / FIGURES / "latents.png").is_file()
