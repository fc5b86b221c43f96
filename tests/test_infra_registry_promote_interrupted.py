"""A promotion whose store goes away, or whose process is killed, is completed by the same command."""

import mlflow_template
import pytest
from called_commands import answer_of
from mlflow_template import untrained_run

from metagmvae.infra.registry.alias_change import change_alias
from metagmvae.infra.registry.alias_history import alias_state, alias_version, read_history
from metagmvae.infra.registry.register import register
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.tracking.store import connect

pytestmark = pytest.mark.mlflow
MAYBE = "models:/few-shot/2 is registered, and models:/few-shot@champion may have moved to it"


@pytest.fixture
def goes_away(monkeypatch):
    """Lets the store answer no request from a given one on, as often as the name of the request has been used."""
    mlflow = import_mlflow()
    plain = mlflow.MlflowClient.__getattribute__

    def goes_away(name: str, after: int) -> None:
        seen, gone = [], []

        def attribute(self, key):
            value = plain(self, key)
            if key.startswith("_") or not callable(value):
                return value

            def request(*arguments, **options):
                if key == name:
                    seen.append(key)
                if gone or len(seen) > after:
                    gone.append(key)
                    raise mlflow.MlflowException("the store has gone")
                return value(*arguments, **options)

            return request

        monkeypatch.setattr(mlflow.MlflowClient, "__getattribute__", attribute)

    return goes_away


@pytest.mark.parametrize(
    ("request_name", "after", "state"),
    [
        ("finalize_logged_model", 0, "no alias has moved"),
        ("create_model_version", 0, "no alias has moved"),
        ("log_artifacts", 0, "models:/few-shot/2 is registered, and no alias has moved"),
        ("create_experiment", 0, MAYBE),
        ("delete_experiment", 0, MAYBE),
        ("set_registered_model_tag", 0, MAYBE),
        ("set_model_version_tag", 0, "models:/few-shot@champion is version 2, whose tags are not complete"),
        ("set_model_version_tag", 7, "models:/few-shot@champion is version 2, whose tags are not complete"),
    ],
)
def test_the_same_command_completes_it(data, tmp_path, monkeypatch, goes_away, request_name, after, state):
    tracking = mlflow_template.new_store(tmp_path / "store")
    store = connect(tracking)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    register(untrained_run(tmp_path / "constant", data, constant=True), tracking, "few-shot")
    run = untrained_run(tmp_path / "better", data)

    def promote(code: int) -> dict:
        words = ["promote", run, "--name", "few-shot", "--data", data, "--episodes", 40, "--query", 5]
        return answer_of(*words, code=code)

    goes_away(request_name, after)
    error = promote(1)["error"]
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert "the store has gone; " in error
    assert error.endswith(f"{state}; run the command again, which does what is missing")

    answer = promote(0)
    assert (answer["decision"], answer["challenger"]) == ("promoted", "models:/few-shot/2")
    assert answer["tasks"][0]["verdict"] == "better"
    assert alias_version(store, "few-shot", "champion") == "2"
    last = read_history(store, "few-shot")[-1]
    assert (last.number, last.action, last.former, last.version) == (2, "promoted", "1", "2")
    assert last.evidence == answer["evidence"]
    versions = store.client.search_model_versions("name = 'few-shot'")
    assert sorted(str(version.version) for version in versions) == ["1", "2"]
    tags = next(version.tags for version in versions if str(version.version) == "2")
    assert tags["promotion.evidence"] == last.evidence
    assert tags["promotion.decision"] == "promoted"
    assert float(tags["promotion.5w1s.difference"]) == pytest.approx(answer["tasks"][0]["difference"], abs=1e-6)
    assert {"promotion.by", "promotion.time", "promotion.package", "promotion.data_fingerprint"} <= tags.keys()
    experiments = [experiment.experiment_id for experiment in store.client.search_experiments()]
    models = store.client.search_logged_models(experiments)
    assert [model.status for model in models] == ["READY", "READY"]
    assert {model.artifact_location for model in models} == {version.source for version in versions}
    assert "is already champion of few-shot, as version 2" in promote(2)["error"]


@pytest.mark.parametrize("request_name", ["set_registered_model_tag", "set_model_version_tag"])
def test_an_interrupted_rollback_does_not_invite_to_another_one(tmp_path, monkeypatch, goes_away, request_name):
    tracking = mlflow_template.new_store(tmp_path / "store")
    store = connect(tracking)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    run = mlflow_template.new_run(tmp_path / "run")
    for _ in range(2):
        register(run, tracking, "few-shot")
    state = alias_state(store, "few-shot", "champion", read_history(store, "few-shot"))
    assert change_alias(store, "few-shot", "promoted", state, "2")
    goes_away(request_name, 0)
    error = answer_of("promote", "models:/few-shot@champion", "--rollback", code=1)["error"]
    assert "models:/few-shot@champion may have moved to version 1: see `metagmvae models few-shot` before" in error
    monkeypatch.undo()
    assert alias_version(store, "few-shot", "champion") == "1"
