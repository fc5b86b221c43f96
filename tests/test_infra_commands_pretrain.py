"""`metagmvae pretrain` with each objective: from a preset to an evaluated encoder; wrong settings give one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from called_commands import answer_of
from command_words import TINY, set_words

from metagmvae.infra.cli import main
from metagmvae.infra.runs.run_folder import METRICS

SMALL = TINY | {"train.log_every": 1, "run.figures": "false"}
OBJECTIVES: dict[str, tuple[dict[str, object], set[str]]] = {
    "acai": ({}, {"squared_error", "adversarial_loss", "critic_loss"}),
    "bigan": ({"pretrain.projector": "[8]"}, {"discriminator_loss", "generator_loss"}),
    "deepcluster": ({"pretrain.clusters": 10}, {"cluster_accuracy"}),
    "psco": ({"pretrain.projector": "[16, 8]", "pretrain.queue": 64}, {"moco_loss", "supervised_loss"}),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_preset_trains_an_encoder_that_can_be_evaluated(
    objective: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, metrics = OBJECTIVES[objective]
    words = set_words(SMALL | changes | {"data.uri": data, "run.out": tmp_path / "run"})
    assert main(["pretrain", f"omniglot-{objective}", "--json", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert metrics <= lines[0].keys()
    assert "validation/5w1s" in lines[-1]
    request = ["--data", str(data), "--shot", "1", "--episodes", "4", "--json"]
    assert 0 < answer_of("evaluate", tmp_path / "run", *request)["accuracy"] <= 1


@pytest.mark.parametrize(
    ("objective", "change", "message"),
    [
        ("deepcluster", {"data.reader": "stream"}, 'data.reader ("stream") reads images sequentially'),
        ("deepcluster", {"pretrain.clusters": 601}, "pretrain.clusters (601) exceeds the 600 images"),
        ("acai", {"pretrain.batch": 601}, "pretrain.batch (601) exceeds the 600 images"),
        ("bigan", {"pretrain.projector": "[]"}, "model.rectified (true) gives features above 0"),
        ("psco", {"pretrain.projector": "[]"}, "projector (none) must have at least one size for psco"),
        ("psco", {"pretrain.queue": 8}, "batch (16) exceeds queue (8)"),
        ("psco", {"pretrain.shots": 99, "pretrain.queue": 64}, "shots (99) exceeds queue (64)"),
        ("acai", {"pretrain.optimizer": "lars", "pretrain.beta1": 0.5}, "beta1 (0.5) is a setting of Adam and SGD"),
        ("acai", {"pretrain.objective": "acia"}, "pretrain.objective"),
    ],
)
def test_wrong_settings_give_one_line(
    objective: str,
    change: dict[str, object],
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = set_words(SMALL | change | {"data.uri": data, "run.out": tmp_path / "run"})
    assert main(["pretrain", f"omniglot-{objective}", *words, "-q"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert message in line
    assert not (tmp_path / "run").exists()
