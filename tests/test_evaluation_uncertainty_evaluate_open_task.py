"""`evaluate --open` of encoders alone: accuracy and AUROC against plain loops, and where the level comes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_words import TINY, set_words
from sklearn.metrics import roc_auc_score

from metagmvae.evaluation.encoders.evaluate_encoders import evaluate_model
from metagmvae.evaluation.fewshot.encoding import encode_split
from metagmvae.infra.cli import main
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.pipelines.sampling.query_sets import QuerySampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.posterior_calibration import CALIBRATION

TASK: dict[str, Any] = {"way": 3, "shot": 2, "query": 4, "seed": 0}
EPISODES = 10
WORDS = ["--way", 3, "--shot", 2, "--query", 4, "--episodes", EPISODES, "--open", 2]


@pytest.fixture(scope="module")
def encoder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a contrastive pre-training of two steps."""
    out = tmp_path_factory.mktemp("runs") / "encoder"
    assert main(["pretrain", "omniglot-cpu", *set_words(TINY | {"data.uri": data, "run.out": out}), "--json"]) == 0
    return out


def rows(capsys: pytest.CaptureFixture[str], *words: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_nearest_mean_against_plain_loops(data: Path, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_level, without = rows(capsys, "evaluate", encoder, "--data", data, *WORDS)
    loaded, dataset = resolve_model(str(encoder)), Dataset.open(data)
    h_nF = encode_split(loaded.model, dataset, "test", torch.device("cpu")).flatten(1).double()
    support, query, truth = QuerySampler(dataset.labels("test"), **TASK, open_classes=2).batch(0, EPISODES)
    known, scores, largest, right = [], [], [], 0
    level = with_level["settings"]["background"]
    for e in range(EPISODES):
        means = [sum(F.normalize(h_nF[row], dim=0) for row in rows_of_class) for rows_of_class in support[e]]
        for row, label in zip(query[e], truth[e], strict=True):
            logits = np.array([20 * float(F.cosine_similarity(h_nF[row], mean, dim=0)) for mean in means])
            known.append(label < 3)
            scores.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max())
            largest.append(np.exp(logits.max() - scores[-1]))
            answer = logits.argmax() if logits.max() > level else 3
            right += answer == label
    assert with_level["auroc"] == pytest.approx(roc_auc_score(known, scores), abs=1e-3)
    assert without["auroc"] == pytest.approx(roc_auc_score(known, largest), abs=1e-3)
    assert with_level["open_accuracy"] == pytest.approx(right / len(known), abs=1.5 / len(known))
    (closed,) = evaluate_model(loaded, dataset, [TASK | {"episodes": EPISODES}])
    assert with_level["accuracy"] == without["accuracy"] == pytest.approx(closed.mean)
    assert with_level["mode"] == "inductive"
    assert (with_level["model"], "ece" in with_level, "ece" in without) == ("conv4, nearest-mean", True, False)
    assert without["model"] == "conv4, nearest-mean without background component"


def test_a_calibrated_encoder_uses_its_own_level_and_settings(
    data: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(encoder, tmp_path / "encoder")
    words = ["evaluate", own, "--data", data, *WORDS]
    fitted = rows(capsys, *words, "--head", "soft-k-means")
    assert [row["mode"] for row in fitted] == ["transductive"] * 2
    assert [set(row["settings"]) for row in fitted] == [{"temperature", "uniform", "background", "head"}, {"head"}]
    assert [set(row["settings"]["head"]) for row in fitted] == [{"temperature"}] * 2
    assert not (own / CALIBRATION).exists()
    calibrate = ["calibrate", own, "--data", data, "--head", "soft-k-means", "--way", 3, "--shot", 2, "--query", 4]
    assert main([*map(str, calibrate), "--seed", "5", "--episodes", "4", "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    used = rows(capsys, *words)[0]
    assert used["settings"]["background"] == stored["backgrounds"][0]["background"]
    assert used["model"] == "conv4, soft-k-means"
    # Another head than the calibrated one has no level; it is fitted again.
    assert rows(capsys, *words, "--head", "nearest-mean")[0]["model"] == "conv4, nearest-mean"
