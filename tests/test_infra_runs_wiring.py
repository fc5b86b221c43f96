"""What is refused before a run begins, and that one folder has one training."""

import subprocess
import sys
from pathlib import Path

import pytest

from metagmvae.configs.load import load_settings
from metagmvae.infra.runs.folder_lock import LOCK, lock_run_folder
from metagmvae.infra.workflows.run_training import run_training
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

SMALL = {"model.channels": 8, "model.width": 32, "train.steps": 2, "train.set_size": 10, "train.samples": 4}
OFF = {"validation.every": 0, "tracking.enabled": "false", "run.figures": "false", "train.precision": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs") / "data"
    write_dataset(open_source("glyphs", classes=(8, 4, 3), drawings=10), folder)
    return folder


def settings(data, out, **more):
    pairs = SMALL | OFF | {"data.uri": data, "run.out": out} | more
    return load_settings("omniglot-5way", [f"{key}={value}" for key, value in pairs.items()])


HOLD = """
import sys
from pathlib import Path
from metagmvae.infra.runs.folder_lock import lock_run_folder
with lock_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_training_in_one_folder_is_refused_until_the_first_is_dead(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    root = str(Path(__file__).parents[1])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], cwd=root, text=True, **pipes)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(DataError, match="another process trains there"):
        run_training(settings(data, out))
    assert [path.name for path in out.iterdir()] == [LOCK]
    other.kill()
    other.communicate()
    assert run_training(settings(data, out)) == out
    assert (out / "checkpoint.pt").exists()
    with lock_run_folder(out):
        pass


def test_a_folder_of_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(DataError, match="mine: not"):
            run_training(settings(data, tmp_path / "mine"), resume=resume)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_resuming_where_nothing_is_says_that_it_starts(data, tmp_path, capsys):
    """A mistyped folder would else pass for a run that goes on."""
    run_training(settings(data, tmp_path / "run"), resume=True)
    said = f"{tmp_path / 'run'}: nothing to go on with; the run starts at its first step\n"
    assert said in capsys.readouterr().err
    run_training(settings(data, tmp_path / "run"), resume=True)
    assert "nothing to go on with" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"data.train_split": "nowhere"}, "no split 'nowhere'"),
        ({"validation.every": 1, "validation.way": 9}, "9 ways were asked for and there are 4 classes"),
        ({"run.out": "{tmp}/file/run"}, "cannot be made"),
        ({"run.device": "cuda"}, "no CUDA device"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(data, tmp_path, more, reason):
    (tmp_path / "file").write_text("in the way")
    more = {key: str(value).replace("{tmp}", str(tmp_path)) for key, value in more.items()}
    with pytest.raises(ValueError, match=reason) as caught:
        run_training(settings(data, more.pop("run.out", tmp_path / "run"), **more))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
