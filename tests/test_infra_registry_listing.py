"""`metagmvae models`: registered versions, and whether their datasets still exist unchanged."""

import json
import shutil

import mlflow_template
import pytest
from called_commands import answer_of, refusal_of
from glyphs_dataset import new_dataset

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.cli import main
from metagmvae.infra.registry.listing import data_state
from metagmvae.infra.registry.register import register
from metagmvae.infra.tracking.store import connect
from metagmvae.pipelines.shards.dataset import Dataset

pytestmark = pytest.mark.mlflow


@pytest.fixture
def data(tmp_path):
    return new_dataset(tmp_path / "data", (6, 6, 6))


@pytest.fixture
def store(tmp_path, monkeypatch):
    tracking = mlflow_template.new_store(tmp_path / "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", connect(tracking).uri)
    return connect(tracking)


def list_models(*words: str) -> list[dict]:
    return answer_of("models", *words)["models"]


def test_dataset_is_unchanged_changed_damaged_or_gone(data, tmp_path):
    uri, fingerprint = str(data), Dataset.open(data).fingerprint
    assert data_state(uri, fingerprint) == ("yes", "")
    state, reason = data_state(uri, "f" * 64)
    assert (state, f"is {fingerprint[:12]}…, it was ffffffffffff…" in reason) == ("changed", True)
    (data / "test" / "shard-000000.tar").unlink()
    state, reason = data_state(uri, fingerprint)
    assert (state, "1 files are missing, for example test/shard-000000.tar" in reason) == ("damaged", True)
    shutil.rmtree(data)
    state, reason = data_state(uri, fingerprint)
    assert (state, "no dataset.json there" in reason) == ("gone", True)


def test_versions_with_their_aliases_results_promotions_and_datasets(store, data, tmp_path, capsys):
    run = mlflow_template.new_run(tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"data": str(tmp_path / "trained on")}))
    tracking = TrackingSettings(uri=store.uri)
    register(run, tracking, "one", results={"5w1s": {"accuracy": 0.5, "ci95": 0.01}})
    register(run, tracking, "one")
    register(run, tracking, "two")
    options = ["--data", str(data), "--query", "5", "--episodes", "30"]
    assert main(["evaluate", "models:/one/2", *options]) == 0
    assert main(["promote", "models:/one/2", "--other-data", *options]) == 1
    newest, oldest = list_models("one")
    assert (newest["version"], newest["aliases"], newest["kind"]) == ("2", [], "few-shot classifier")
    assert (oldest["version"], oldest["aliases"], oldest["promotion"]) == ("1", ["champion"], {})
    assert oldest["results"] == {"5w1s": {"accuracy": 0.5, "ci95": 0.01}}
    assert newest["results"].keys() == {"test.5w1s.transductive"}
    assert newest["promotion"]["decision"] == "refused"
    assert newest["promotion"]["5w1s"]["difference"] == 0.0
    assert newest["promotion"]["data_fingerprint"] == Dataset.open(data).fingerprint
    states = {entry["of"]: (entry["uri"], entry["state"]) for entry in newest["data"]}
    assert states == {
        "training": (str(tmp_path / "trained on"), "gone"),
        "test.5w1s.transductive": (str(data), "yes"),
        "promotion": (str(data), "yes"),
    }
    assert [(row["name"], row["version"]) for row in list_models()] == [("one", "2"), ("one", "1"), ("two", "1")]
    capsys.readouterr()
    assert main(["models", "one"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["model", "aliases", "kind"]
    assert "refused over 1: 5w1s +0.00 ± 0.00" in lines[3]
    assert f"{data} yes" in lines[3]
    assert "5w1s 50.00 ± 1.00" in lines[4]


def test_models_of_other_programs_are_listed_too(store, tmp_path, capsys):
    store.client.create_registered_model("theirs")
    store.client.create_model_version("theirs", str(tmp_path))
    (row,) = list_models()
    assert (row["name"], row["kind"], row["results"], row["data"]) == ("theirs", "unknown", {}, [])
    assert main(["models"]) == 0
    assert "unknown" in capsys.readouterr().out
    store.client.set_model_version_tag("theirs", "1", "promotion.tasks", "five")
    assert "models:/theirs/1: tags results.… or promotion.… are damaged" in refusal_of("models")


def test_unknown_name_and_empty_registry(store, capsys):
    assert list_models() == []
    assert "no registered model 'nothing' in" in refusal_of("models", "nothing")
    assert main(["models"]) == 0
    assert "models: none" in capsys.readouterr().out
