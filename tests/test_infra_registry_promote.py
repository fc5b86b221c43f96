"""Promotion: only a challenger that is better on the same episodes becomes champion; rollback; overtaken promotions."""

import json
import shutil
from pathlib import Path

import mlflow_template
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from called_commands import answer_of, refusal_of
from glyphs_dataset import new_dataset
from mlflow_template import untrained_run

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.cli import main
from metagmvae.infra.registry import promote
from metagmvae.infra.registry.alias_history import alias_version, read_history
from metagmvae.infra.registry.register import register
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.tracking.store import Store, connect
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.checkpoint import load_state, save_state

pytestmark = pytest.mark.mlflow
FEW = ["--episodes", "40", "--query", "5"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, data):
    """A store with versions of `glyphs`: 1 has constant latents and is champion, 2 and 3 are better and equal."""
    folder = tmp_path_factory.mktemp("prepared")
    store = mlflow_template.new_store(folder / "mlflow")
    register(untrained_run(folder / "constant", data, constant=True), store, "glyphs")
    better = untrained_run(folder / "better", data)
    register(better, store, "glyphs")
    register(better, store, "glyphs")
    return folder / "mlflow"


@pytest.fixture
def store(prepared, tmp_path, monkeypatch) -> Store:
    """A copy of the prepared store, which commands use."""
    shutil.copytree(prepared, tmp_path / "mlflow")
    opened = connect(TrackingSettings(store=str(tmp_path / "mlflow")))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", opened.uri)
    return opened


@pytest.fixture
def run_promote(data):
    """Runs `promote` as a user does, on the data, and returns its answer."""

    def run_promote(*words: object, code: int = 0, uri: Path | None = data) -> dict:
        options = [] if "--rollback" in words or uri is None else ["--data", uri, *FEW]
        return answer_of("promote", *words, *options, code=code)

    return run_promote


def champion(store: Store, alias: str = "champion") -> str | None:
    return alias_version(store, "glyphs", alias)


def download_evidence(store: Store, answer: dict, folder: Path) -> Path:
    path = import_mlflow().artifacts.download_artifacts(
        artifact_uri=answer["evidence"], dst_path=str(folder), tracking_uri=store.uri
    )
    assert {file.name for file in Path(path).iterdir()} == {"decision.json", "episodes.parquet"}
    return Path(path)


def test_better_challenger_is_promoted_and_the_evidence_is_stored(store, run_promote, data, tmp_path):
    answer = run_promote("models:/glyphs/2", "--shots", "1", "5")
    assert (answer["decision"], answer["rule"], champion(store)) == ("promoted", "better", "2")
    assert (answer["challenger"], answer["champion"]) == ("models:/glyphs/2", "models:/glyphs/1")
    one, five = answer["tasks"]
    assert (one["task"], one["verdict"], five["task"]) == ("5w1s", "better", "5w5s")
    assert one["champion"] == pytest.approx(0.2, abs=0.02)  # chance
    folder = download_evidence(store, answer, tmp_path)
    rows = pq.read_table(folder / "episodes.parquet").to_pandas()
    one_shot = rows[rows.shot == 1]
    each = (one_shot.challenger - one_shot.champion).to_numpy()
    assert len(each) == 40
    assert one["difference"] == pytest.approx(each.mean())
    assert one["ci95"] == pytest.approx(1.96 * each.std(ddof=1) / np.sqrt(40))
    stored = json.loads((folder / "decision.json").read_text())
    assert {key: stored[key] for key in answer if key != "evidence"} == {
        k: v for k, v in answer.items() if k != "evidence"
    }
    assert {"by", "environment", "settings"} <= stored.keys()
    tags = store.client.get_model_version("glyphs", "2").tags
    assert tags["promotion.decision"] == "promoted"
    assert float(tags["promotion.5w1s.difference"]) == one["difference"]
    assert tags["promotion.champion"] == "models:/glyphs/1"
    assert tags["promotion.data_fingerprint"] == Dataset.open(data).fingerprint
    assert (tags["promotion.split"], tags["promotion.episodes"], tags["promotion.seed"]) == ("validation", "40", "0")
    assert tags["promotion.evidence"] == answer["evidence"]
    # `evaluate` uses the same episodes, and all other commands follow the alias.
    assert main(["evaluate", "models:/glyphs@champion", "--data", str(data), "--split", "validation", *FEW]) == 0
    tags = store.client.get_model_version("glyphs", "2").tags
    assert float(tags["results.validation.5w1s.transductive"]) == pytest.approx(one["challenger"], abs=1e-6)
    served = import_mlflow().pyfunc.load_model("models:/glyphs@champion")
    assert served.metadata.run_id == store.client.get_model_version("glyphs", "2").run_id


def test_challenger_that_is_not_better_is_refused_and_the_alias_stays(store, run_promote, tmp_path):
    run_promote("models:/glyphs/2")
    answer = run_promote("models:/glyphs/1", code=1)
    assert (answer["decision"], champion(store)) == ("refused", "2")
    assert "5w1s: 20." in answer["reason"]
    assert "the champion stays" in answer["reason"]
    assert store.client.get_model_version("glyphs", "1").tags["promotion.decision"] == "refused"
    download_evidence(store, answer, tmp_path)
    equal = run_promote("models:/glyphs/3", code=1)
    assert (equal["tasks"][0]["difference"], equal["tasks"][0]["verdict"]) == (0.0, "undecided")
    assert len(read_history(store, "glyphs")) == 2  # the first registration, and one promotion
    equal = run_promote("models:/glyphs/3", "--allow-equal", "--margin", "0")
    assert (equal["decision"], equal["rule"], champion(store)) == ("promoted", "not worse", "3")


def test_tags_describe_the_newest_decision_only(store, run_promote):
    run_promote("models:/glyphs/2", "--shots", "1", "5", "--dry-run")
    run_promote("models:/glyphs/2", "--shots", "1", "5")
    run_promote("models:/glyphs@champion", "--rollback")
    run_promote("models:/glyphs/2", "--shot", "5")
    tags = store.client.get_model_version("glyphs", "2").tags
    assert {key.split(".")[1] for key in tags if key.endswith(".difference")} == {"5w5s"}
    assert "promotion.rolled_back" not in tags


def test_first_challenger_becomes_champion(store, run_promote):
    store.client.delete_registered_model_alias("glyphs", "champion")
    answer = run_promote("models:/glyphs/1")
    assert (answer["decision"], answer["rule"], answer["champion"]) == ("promoted", "first", None)
    assert "no version has the alias 'champion' yet" in answer["reason"]
    assert answer["tasks"][0].keys() == {"task", "challenger", "ci95"}
    assert champion(store) == "1"
    answer = run_promote("models:/glyphs@champion", "--rollback", code=2)
    assert "no version to go back to; version 1 was the first one" in answer["error"]


def test_invalid_margin_is_refused_without_a_champion_too(store, run_promote):
    error = run_promote("models:/glyphs/2", "--alias", "candidate", "--margin", "5", code=2)["error"]
    assert "--margin 5.0: must be" in error
    assert champion(store, "candidate") is None


def test_another_alias_is_given_over_a_named_model(store, run_promote):
    answer = run_promote("models:/glyphs/1", "--alias", "staging", "--over", "models:/glyphs/2", code=1)
    assert (answer["champion"], champion(store, "staging")) == ("models:/glyphs/2", None)
    answer = run_promote("models:/glyphs/3", "--alias", "staging", "--over", "models:/glyphs@champion")
    assert (answer["decision"], champion(store, "staging"), champion(store)) == ("promoted", "3", "1")
    answer = run_promote("models:/glyphs/2", "--alias", "staging", "--over", "models:/glyphs@champion", code=2)
    assert "models:/glyphs@staging is models:/glyphs/3, which the challenger must be compared with" in answer["error"]


def test_dry_run_writes_nothing(store, run_promote, data, tmp_path):
    def content() -> list[str]:
        import sqlite3

        with sqlite3.connect(store.uri.removeprefix("sqlite:///")) as database:
            return list(database.iterdump())

    before = content()
    assert run_promote("models:/glyphs/2", "--dry-run")["decision"] == "would be promoted"
    run = untrained_run(tmp_path / "new", data, constant=True)
    files = {path.name for path in run.iterdir()}
    answer = run_promote(str(run), "--name", "glyphs", "--dry-run", code=1)
    assert (answer["decision"], answer["challenger"]) == ("would be refused", str(run))
    assert content() == before
    assert {path.name for path in run.iterdir()} == files


def test_run_folder_is_registered_once_and_without_an_alias(store, run_promote, data, tmp_path):
    run = untrained_run(tmp_path / "worse", data, constant=True, step=7)
    assert run_promote(str(run), code=2)["error"].endswith("set tracking.register_as, or give --name")
    answer = run_promote(str(run), "--name", "glyphs", code=1)
    assert (answer["challenger"], champion(store)) == ("models:/glyphs/4", "1")
    assert run_promote(str(run), "--name", "glyphs", code=1)["challenger"] == "models:/glyphs/4"
    better = run_promote(str(untrained_run(tmp_path / "better", data)), "--name", "glyphs")
    assert (better["challenger"], champion(store)) == ("models:/glyphs/5", "5")
    assert not resolve_model("models:/glyphs@champion").model.training


def test_rollbacks_undo_one_promotion_each_and_are_recorded(store, run_promote, capsys):
    run_promote("models:/glyphs/2")
    run_promote("models:/glyphs/3", "--allow-equal")
    would = run_promote("models:/glyphs", "--rollback", "--dry-run")
    assert (would["decision"], would["version"], champion(store)) == ("would be rolled back", "2", "3")
    back = run_promote("models:/glyphs", "--rollback")
    assert (back["decision"], back["version"], back["before"], champion(store)) == ("rolled back", "2", "3", "2")
    assert run_promote("models:/glyphs@champion", "--rollback")["version"] == champion(store) == "1"
    error = run_promote("models:/glyphs@champion", "--rollback", code=2)["error"]
    assert "no version to go back to; version 1 got the alias without a recorded promotion" in error
    assert [(c.action, c.version, c.former, c.undoes) for c in read_history(store, "glyphs")] == [
        ("registered", "1", None, None),
        ("promoted", "2", "1", None),
        ("promoted", "3", "2", None),
        ("rolled back", "2", "3", 3),
        ("rolled back", "1", "2", 2),
    ]
    assert "promotion.rolled_back" in store.client.get_model_version("glyphs", "3").tags
    assert main(["models", "glyphs"]) == 0
    assert "promoted over 2: 5w1s +0.00 ± 0.00, rolled back" in capsys.readouterr().out
    run_promote("models:/glyphs/2")
    store.client.delete_model_version("glyphs", "1")
    assert "models:/glyphs/1: no such version" in run_promote("models:/glyphs", "--rollback", code=2)["error"]
    assert champion(store) == "2"


@pytest.mark.parametrize("now", ["2", "3"])
def test_alias_that_was_moved_in_the_meantime_stays(store, run_promote, monkeypatch, now):
    evaluate = promote.evaluate_head_to_head

    def evaluate_and_move_alias(*request):
        comparison = evaluate(*request)
        store.client.set_registered_model_alias("glyphs", "champion", now)
        return comparison

    monkeypatch.setattr(promote, "evaluate_head_to_head", evaluate_and_move_alias)
    answer = run_promote("models:/glyphs/2", code=1)
    assert (answer["decision"], champion(store)) == ("overtaken", now)
    assert (
        f"moved from version 1 to version {now} in the meantime (moved by hand, without a record)" in answer["reason"]
    )
    # If another process promoted the same version, the tags are about that promotion.
    tag = store.client.get_model_version("glyphs", "2").tags.get("promotion.decision")
    assert tag == ("overtaken" if now == "3" else None)


WRONG = [
    (["models:/glyphs/1"], "is already champion of glyphs, as version 1"),
    (["models:/glyphs/9"], "no such version; versions of glyphs: 1, 2, 3"),
    (["models:/other/1"], "no registered model 'other'"),
    (["runs:/abc"], "give models:/NAME/VERSION, or the run folder"),
    (["nowhere"], "not a run folder"),
    (["models:/glyphs/2", "--name", "x"], "--name x: only for a run folder"),
    (["models:/glyphs/2", "--margin", "-1"], "--margin -1.0: must be"),
    (["models:/glyphs/2", "--split", "exam"], "no split 'exam'; choose one of"),
    (["models:/glyphs/2", "--way", "50"], "way 50 exceeds the 6 classes"),
    (["models:/glyphs/2", "--shot", "99"], "shot 99 and query 5 need 104 images"),
    (["models:/glyphs/2", "--episodes", "3"], "a confidence interval needs at least 30"),
    (["models:/glyphs/2", "--rollback"], "--rollback takes models:/NAME@ALIAS"),
    (["models:/glyphs@nobody", "--rollback"], "no such version; versions of glyphs"),
]


@pytest.mark.parametrize(("words", "reason"), WRONG)
def test_wrong_request_is_a_one_line_error(store, data, words, reason):
    assert reason in refusal_of("promote", "--data", data, *FEW, *words)
    assert champion(store) == "1"


def test_missing_and_other_datasets_are_refused(store, run_promote, tmp_path):
    assert "no dataset.json there" in run_promote("models:/glyphs/2", code=2, uri=tmp_path / "gone")["error"]
    assert (
        "--data is missing; name the dataset to evaluate on"
        in run_promote("models:/glyphs/2", code=2, uri=None)["error"]
    )
    other = new_dataset(tmp_path / "other", (12, 6, 6), drawings=21)
    error = run_promote("models:/glyphs/2", code=2, uri=other)["error"]
    assert "models:/glyphs/2 was trained on another dataset" in error
    assert "give its own dataset with --data, or use --other-data" in error
    answer = run_promote("models:/glyphs/2", "--other-data", uri=other)
    assert [warning.split(" was ")[0] for warning in answer["warnings"]] == ["models:/glyphs/2", "models:/glyphs/1"]


def test_splits_that_should_not_select_models_give_a_warning(store, run_promote):
    (warning,) = run_promote("models:/glyphs/2", "--split", "test", "--dry-run")["warnings"]
    assert "use --split validation" in warning
    both = run_promote("models:/glyphs/2", "--split", "train", "--dry-run")["warnings"]
    assert len(both) == 2
    assert all("was trained on the split 'train'" in warning for warning in both)


def test_encoders_are_evaluated_with_a_head_also_against_other_models(store, run_promote, data, tmp_path):
    runs = []
    for name, factor in (("features", 1.0), ("constant", 0.0)):
        runs.append(untrained_run(tmp_path / name, data))
        state = load_state(runs[-1] / "checkpoint.pt")
        weights = {key: value * factor for key, value in state["model"].items() if key.startswith("encoder.")}
        save_state(runs[-1] / "checkpoint.pt", state | {"kind": "encoder", "model": weights})
    features, constant = (str(run) for run in runs)
    first = run_promote(constant, "--name", "eyes")
    assert (first["rule"], first["mode"]) == ("first", "inductive")
    won = run_promote(features, "--name", "eyes")
    assert (won["decision"], won["tasks"][0]["verdict"]) == ("promoted", "better")
    assert store.client.get_model_version("eyes", "2").tags["kind"] == "encoder"
    answer = run_promote(features, "--name", "glyphs", "--head", "logistic-regression", "--dry-run")
    assert (answer["decision"], answer["tasks"][0]["verdict"]) == ("would be promoted", "better")
    assert (
        f"models:/glyphs/1 is evaluated in transductive mode and {features} in inductive mode" in answer["warnings"][0]
    )


def test_an_encoder_by_name_is_registered_and_promoted(store, run_promote, data, tmp_path):
    """Its folder, which `metagmvae encoder` writes, has no training data, so it always counts as of other data."""
    weights, folder = tmp_path / "net.pth", tmp_path / "encoder"
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    options = ["--weights", str(weights), "--image-size", "32", "--data", str(data), "--out", str(folder)]
    assert main(["encoder", "timm:test_resnet", *options]) == 0
    assert "--other-data" in run_promote(str(folder), "--name", "published", code=2)["error"]
    answer = run_promote(str(folder), "--name", "published", "--other-data", "--head", "em")
    assert (answer["decision"], answer["mode"]) == ("promoted", "transductive")
    loaded = resolve_model("models:/published@champion")
    assert loaded.info["weights"]["file"] == "net.pth"
    assert loaded.settings.model.encoder == "timm:test_resnet"
    version = store.client.get_model_version_by_alias("published", "champion")
    root = store.client.get_model_version_download_uri("published", version.version)
    listed = import_mlflow().artifacts.load_text(f"{root}/requirements.txt")
    assert any(line.startswith("timm==") for line in listed.splitlines())
    error = run_promote("models:/glyphs/2", "--head", "em", code=2)["error"]
    assert "--head em: is for an encoder alone" in error
