"""A training run: the checks before it starts, exclusive use of its folder, resuming, and what it opens how often."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from command_words import TINY

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.fewshot import encoder_package
from metagmvae.infra.runs.folder_lock import lock_run_folder
from metagmvae.infra.runs.run_folder import CHECKPOINT, FIGURES, TRAINING_LOCK
from metagmvae.infra.workflows import run_training as run_training_module
from metagmvae.infra.workflows.run_training import run_training
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
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
    pairs = SETTINGS | {"data.uri": data, "run.out": out} | changes
    return load_settings(preset, [f"{key}={value}" for key, value in pairs.items()])


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


def test_resume_without_checkpoint_prints_that_training_starts_at_step_1(data, tmp_path, capsys):
    """A mistyped folder would otherwise look like a resumed run."""
    run_training(settings(data, tmp_path / "run"), resume=True)
    line = f"{tmp_path / 'run'}: no checkpoint to resume from; training starts at step 1\n"
    assert line in capsys.readouterr().err
    run_training(settings(data, tmp_path / "run"), resume=True)
    assert "no checkpoint" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train_split": "nowhere"}, "no split 'nowhere'"),
        ({"validation.every": 1, "validation.way": 9}, "6 classes"),
        ({"run.out": "{tmp}/file/run"}, "cannot be created"),
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
    assert (out / FIGURES / "latent-map.png").is_file()
