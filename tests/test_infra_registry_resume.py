"""A finished run that is resumed keeps its version, wherever its dataset lies now."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow_template
import pytest
from called_commands import answer_of
from command_words import TINY, set_words
from glyphs_dataset import new_dataset

from metagmvae.infra.registry.register import register
from metagmvae.infra.tracking.store import connect

pytestmark = pytest.mark.mlflow
SMALL = TINY | {"pretrain.steps": 0, "train.steps": 2, "validation.every": 0, "run.figures": "false"}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains or resumes a small run and returns the answer of the command, or its error."""
    monkeypatch.chdir(tmp_path)
    new_dataset(tmp_path / "data", (12, 6, 6))
    mlflow_template.new_store(tmp_path / "runs" / "mlflow")

    def train(data, *words, code: int = 0, **changes):
        settings = SMALL | {"tracking.enabled": "true", "tracking.register_as": "glyphs"}
        settings |= {"data.uri": data, "run.out": "runs/a"} | changes
        answer = answer_of("train", "omniglot-5way", *set_words(settings), *words, code=code)
        return answer["error"] if code else answer

    return train


def test_resuming_a_finished_run_registers_no_second_version(train, tmp_path):
    first = train("data")
    assert (first["registered"], first["alias"]) == ("models:/glyphs/1", "models:/glyphs@champion")
    shutil.move(tmp_path / "data", tmp_path / "moved")
    for data in ("moved", str(tmp_path / "moved"), "./moved"):
        again = train(data, "--resume")
        assert (again["registered"], again["alias"]) == (first["registered"], first["alias"])
    client = connect(mlflow_template.TrackingSettings(store="runs/mlflow")).client
    assert [version.version for version in client.search_model_versions("name = 'glyphs'")] == [1]
    assert len(client.search_runs(["1"])) == 1


def test_other_data_at_the_same_path_are_refused(train, tmp_path):
    train("data")
    shutil.rmtree(tmp_path / "data")
    new_dataset(tmp_path / "data", (12, 6, 6), drawings=21)
    assert "was trained on other data than" in train("data", "--resume", code=2)


def test_names_are_refused_before_the_training(train, tmp_path, monkeypatch):
    assert "reserves this alias" in train("data", code=2, **{"tracking.alias": "latest"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "localhost:5000")
    assert "write http://localhost:5000" in train("data", code=2)
    assert not (tmp_path / "runs" / "a").exists()


def test_registering_twice_on_purpose_makes_two_versions(store, tmp_path):
    run = mlflow_template.new_run(tmp_path / "run", best_by_shot=(1, 5))
    assert [register(run, store, "a", shot=1, once=once).version for once in (True, True, False)] == ["1", "1", "2"]
    assert register(run, store, "a", shot=5, once=True).version == "3"  # another best model of the run
    client = connect(store).client
    models = client.search_logged_models([e.experiment_id for e in client.search_experiments()])
    assert [model.status for model in models] == ["READY"] * 3  # the later ones have deleted no model of a version
    with pytest.raises(ValueError, match="reserves this alias"):
        register(run, store, "a", alias="v1")


def test_two_processes_that_register_a_run_at_once_make_one_version(store, tmp_path):
    run, start = mlflow_template.new_run(tmp_path / "run"), threading.Barrier(2)

    def register_once(_):
        start.wait()
        return register(run, store, "few-shot", once=True)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(register_once, range(2))
    assert first == second
    assert len(connect(store).client.search_model_versions("name = 'few-shot'")) == 1


def test_repeated_request_creates_one_version(store, tmp_path, monkeypatch):
    mlflow_template.repeat_requests(monkeypatch, "create_model_version")
    registered = register(mlflow_template.new_run(tmp_path / "run"), store, "few-shot")
    versions = connect(store).client.search_model_versions("name = 'few-shot'")
    assert [str(version.version) for version in versions] == [registered.version]
    assert registered.alias == "champion"


def test_model_that_could_not_be_registered_is_registered_by_resuming(train, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mlflow_template.closed_port()}")
    error = train("data", code=1)
    remedy = f"metagmvae train {tmp_path}/runs/a --resume"
    assert f"the run is complete, but its model is not registered: {remedy}" in error
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert train("data", "--resume")["registered"] == "models:/glyphs/1"


def test_registration_that_was_killed_leaves_no_second_model(tmp_path, monkeypatch):
    store, run = mlflow_template.new_store(tmp_path / "store"), mlflow_template.new_run(tmp_path / "run")
    client = connect(store).client

    def killed(*what, **options):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.log_model_artifacts", killed)
        patch.setattr(
            "mlflow.MlflowClient.finalize_logged_model", lambda *what: None
        )  # which a killed process cannot do
        with pytest.raises(SystemExit):
            register(run, store, "few-shot", once=True)
    (experiment,) = {run.info.experiment_id for run in client.search_runs(["0", "1"])}
    assert [model.status for model in client.search_logged_models([experiment])] == ["PENDING"]
    assert register(run, store, "few-shot", once=True).version == "1"
    assert [model.status for model in client.search_logged_models([experiment])] == ["READY"]
