"""A run that was killed can be continued; the checkpoint of another run is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from called_commands import refusal_of
from command_words import TINY, set_words

from metagmvae.infra.cli import main
from metagmvae.infra.runs.run_folder import CHECKPOINT, METRICS, RECORD, SETTINGS, STATUS
from metagmvae.training.trainer.checkpoint import load_state, save_state

RUN = TINY | {"pretrain.steps": 0, "train.steps": 2, "validation.every": 0, "run.figures": "false"}
DIE = """
import os, pathlib, sys
replace = os.replace
def die(source, target):
    if pathlib.Path(target).name == sys.argv[1]:
        os._exit(9)
    replace(source, target)
os.replace = die
from metagmvae.infra.cli import main
main(sys.argv[2:])
"""


def words(data, out, *more, **changes):
    settings = RUN | {"data.uri": data, "run.out": out} | changes
    return ["train", "omniglot-5way", *set_words(settings), *more]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("resume") / "run"
    assert main(words(data, out)) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(("name", "more"), [(SETTINGS, []), (RECORD, ["--resume"]), (CHECKPOINT, ["--resume"])])
def test_a_killed_training_is_continued_without_leftovers(data, tmp_path, name, more):
    out = tmp_path / "run"
    process = subprocess.run([sys.executable, "-c", DIE, name, *words(data, out)], check=False)
    assert process.returncode == 9
    assert list(out.glob(f".{name}.*"))
    assert main(words(data, out, *more)) == 0
    assert not [path.name for path in out.iterdir() if path.name.endswith(".tmp")]
    assert load_state(out / CHECKPOINT)["step"] == 2


def changed_state(run, **changes):
    save_state(run / CHECKPOINT, load_state(run / CHECKPOINT) | changes)


def test_the_checkpoint_of_another_run_is_refused(data, run, tmp_path, capsys):
    def resume():
        code = main(words(data, run, "--resume"))
        error = capsys.readouterr().err
        assert code == 2
        assert error.count("\n") == 1
        return error

    other = tmp_path / "other"
    assert main(words(data, other, **{"train.seed": 5})) == 0
    capsys.readouterr()
    shutil.copy(other / CHECKPOINT, run / CHECKPOINT)
    assert "checkpoint.pt: written by a run with other settings (train.seed: 0, 5)" in resume()
    changed_state(other, settings=(run / SETTINGS).read_text(), data_fingerprint="f" * 64)
    shutil.copy(other / CHECKPOINT, run / CHECKPOINT)
    assert "checkpoint.pt: written by a run on other data (ffffffffffff…)" in resume()
    assert len((run / METRICS).read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stage": "dreaming"}, "stage = "),
        ({"stage": "pretrain", "step": 1}, "is of step 1, but pretrain has 0"),
        ({"kind": "encoder"}, "is of encoder, stage meta, not of meta-gmvae"),
        ({"step": 9}, "is of step 9, but meta has 2"),
        ({"step": -1}, "step = -1"),
        ({"elapsed": "long"}, 'elapsed = "long"'),
        ({"settings": "[" * 5000}, "nested too deeply"),
        ({"step": 1, "optimizer": {"state": {}, "param_groups": []}}, "does not fit the model or optimiser"),
        ({"step": 1, "optimizer": {}}, "does not fit the model or optimiser"),
        ({"step": 1, "rng": {}}, "does not fit the model or optimiser"),
        ({"model": {"weight": torch.zeros(3)}}, "does not fit the model or optimiser"),
    ],
)
def test_edited_checkpoints_are_refused_in_one_line(data, run, capsys, change, reason):
    changed_state(run, **change)
    assert reason in refusal_of(*words(data, run, "--resume"))


LINE = '{{"stage":"meta","step":1,"global_step":1,"elapsed_s":1.0,"loss":1.0,"validation/5w1s":{}}}\n'
BROKEN = [
    (SETTINGS, "[" * 100_000, "nested too deeply"),
    (SETTINGS, "9" * 5000, "not valid JSON"),
    (SETTINGS, '{"train": 7}', "settings.json: train = 7"),
    (SETTINGS, "\xff", "not UTF-8"),
    (RECORD, "[]", "run.json"),
    (RECORD, '{"data_fingerprint": 7}', "run.json: data_fingerprint = 7"),
    (METRICS, "7\n", "metrics.jsonl line 1"),
    (METRICS, '{"global_step": "x"}\n', "metrics.jsonl line 1: stage is missing"),
    (METRICS, "{\n", "metrics.jsonl line 1: not valid JSON"),
    (METRICS, LINE.format('"x"'), "metrics.jsonl line 1: validation/5w1s = 'x': must be a number"),
    (METRICS, LINE.format("true"), "metrics.jsonl line 1: validation/5w1s = True: must be a number"),
    (METRICS, LINE.format("[1]"), "metrics.jsonl line 1: validation/5w1s"),
]


@pytest.mark.parametrize(("name", "text", "reason"), BROKEN)
def test_broken_documents_of_a_run_are_named_in_one_line(data, run, capsys, name, text, reason):
    (run / name).write_text(text, encoding="latin1")
    error = refusal_of(*words(data, run, "--resume"))
    assert name in error
    assert reason in error


@pytest.mark.parametrize("text", ["7", "{}", '{"status": "DREAMING"}', json.dumps({"owner": {"pid": 10**30}})])
def test_a_broken_status_is_named(run, text):
    from metagmvae.infra.runs.status import read_status
    from metagmvae.pipelines.records import DataError

    (run / STATUS).write_text(text)
    with pytest.raises(DataError, match=r"status\.json: .*; delete the file"):
        read_status(run)


def test_a_run_without_steps_is_refused_before_its_folder_exists(data, tmp_path):
    assert "train.steps is 0" in refusal_of(*words(data, tmp_path / "run", **{"train.steps": 0}))
    assert not (tmp_path / "run").exists()
