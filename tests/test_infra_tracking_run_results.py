"""Results and figures of a run are stored in its folder and in MLflow."""

import json

import mlflow_template
import pytest
from called_commands import answer_of, called
from command_words import TINY, set_words
from glyphs_dataset import new_dataset

from metagmvae.infra.cli import main
from metagmvae.infra.tracking.store import connect

SMALL = TINY | {"pretrain.steps": 0, "train.steps": 2, "validation.every": 2, "tracking.enabled": "true"}

pytestmark = pytest.mark.mlflow


def train(data, out, **changes) -> int:
    settings = SMALL | {"data.uri": data, "run.out": out, "tracking.register_as": ""} | changes
    return main(["train", "omniglot-5way", *set_words(settings)])


def test_results_and_figures_are_artifacts_and_accuracies_are_metrics(data, tmp_path):
    store = mlflow_template.new_store(tmp_path / "mlflow")
    run = tmp_path / "run"
    assert train(data, run, **{"tracking.store": store.store}) == 0
    answer = answer_of("evaluate", run, "--data", data, "--episodes", 3)
    client = connect(store).client
    (tracked,) = client.search_runs(["1"])
    assert tracked.data.metrics["test/5w1s/transductive"] == answer["accuracy"]
    assert tracked.data.metrics["test/5w1s/transductive_ci95"] == answer["ci95"]
    (point,) = client.get_metric_history(tracked.info.run_id, "test/5w1s/transductive")
    assert point.step == 2

    def artifact_names(folder: str) -> set[str]:
        return {item.path for item in client.list_artifacts(tracked.info.run_id, folder)}

    assert artifact_names("results") == {f"results/test-5way-1shot-transductive.{kind}" for kind in ("json", "parquet")}
    stems = ("curves", "latents", "modes", "reconstructions")
    assert artifact_names("figures") == {"figures/curves.json", *(f"figures/{stem}.png" for stem in stems)}
    curve = json.loads((run / "figures" / "curves.json").read_text())["validation"]
    assert [point["global_step"] for point in curve] == [2]
    assert {"elapsed_s", "validation/5w1s", "validation/5w1s_ci95"} <= curve[0].keys()


def test_unreachable_store_loses_no_result(data, tmp_path, monkeypatch):
    store = mlflow_template.new_store(tmp_path / "mlflow")
    run = tmp_path / "run"
    assert train(data, run, **{"tracking.store": store.store}) == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    settings = json.loads((run / "settings.json").read_text())
    assert settings["tracking"]["uri"] == ""
    code, _, said = called("evaluate", run, "--data", data, "--episodes", 3)
    assert code == 0
    assert "upload the results later: metagmvae track" in said
    assert (run / "results" / "test-5way-1shot-transductive.json").exists()


def test_a_run_that_cannot_be_written_is_evaluated_all_the_same(data, tmp_path):
    """The run of another user, or a full disk, loses no result."""
    run = tmp_path / "run"
    assert train(data, run, **{"tracking.enabled": "false", "run.figures": "false"}) == 0
    (run / "results").write_text("no folder can be here")
    code, out, said = called("evaluate", run, "--data", data, "--episodes", 3, "--json")
    answer = json.loads(out)
    assert code == 0
    assert 0 < answer["accuracy"] <= 1
    assert answer["kept"] == []
    assert "; the results were not stored with the run" in said
    assert not (run / "evaluations.jsonl").exists()


def test_figures_that_cannot_be_drawn_are_reported_and_the_run_is_kept(data, tmp_path, capsys):
    few = new_dataset(tmp_path / "few", (12, 6, 6), drawings=1)
    assert train(few, tmp_path / "run", **{"tracking.enabled": "false", "validation.every": 0}) == 0
    *_, line = capsys.readouterr().err.splitlines()
    reason = "figures need two classes of validation with 2 images; it has fewer"
    assert line == f"no figures were drawn: {few}: {reason}"
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_results_of_a_registered_version_are_stored_in_its_tags_and_its_run(data, tmp_path, capsys, monkeypatch):
    store = mlflow_template.new_store(tmp_path / "mlflow")
    registered = {"tracking.store": store.store, "tracking.register_as": "glyphs"}
    assert train(data, tmp_path / "run", **registered) == 0
    assert "alias: models:/glyphs@champion\n" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", connect(store).uri)
    answer = answer_of("evaluate", "models:/glyphs@champion", "--data", data, "--episodes", 3)
    assert answer["kept"] == "models:/glyphs/1"
    client = connect(store).client
    version = client.get_model_version("glyphs", "1")
    assert float(version.tags["results.test.5w1s.transductive"]) == pytest.approx(answer["accuracy"], abs=1e-6)
    assert float(version.tags["results.test.5w1s.transductive_ci95"]) == pytest.approx(answer["ci95"], abs=1e-6)
    metrics = client.get_run(version.run_id).data.metrics
    assert metrics["test/5w1s/transductive"] == answer["accuracy"]
    names = {item.path for item in client.list_artifacts(version.run_id, "results")}
    assert names == {f"results/test-5w1s-transductive.{kind}" for kind in ("json", "parquet")}
