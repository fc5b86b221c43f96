"""Results and figures of a run are stored in its folder and in MLflow."""

import json

import mlflow_template
import pytest
from called_commands import answer_of

from metagmvae.infra.cli import main
from metagmvae.infra.tracking.store import connect
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

SMALL = {"model.channels": 8, "model.width": 32, "train.steps": 2, "train.set_size": 20, "train.samples": 4}

pytestmark = pytest.mark.mlflow


def train(data, out, **changes) -> int:
    settings = SMALL | {"data.uri": data, "run.out": out, "tracking.register_as": "", "validation.every": 2} | changes
    options = [f"--set={key}={value}" for key, value in (settings | {"validation.episodes": 3}).items()]
    return main(["train", "omniglot-5way", *options])


def test_results_and_figures_are_artifacts_and_accuracies_are_metrics(data, tmp_path):
    store = mlflow_template.new_store(tmp_path / "mlflow")
    run = tmp_path / "run"
    assert train(data, run, **{"tracking.store": store.store}) == 0
    request = ["evaluate", str(run), "--data", str(data), "--episodes", "3", "--json"]
    answer = answer_of(*request)
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


def test_unreachable_store_loses_no_result(data, tmp_path, capsys, monkeypatch):
    store = mlflow_template.new_store(tmp_path / "mlflow")
    run = tmp_path / "run"
    assert train(data, run, **{"tracking.store": store.store}) == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    settings = json.loads((run / "settings.json").read_text())
    assert settings["tracking"]["uri"] == ""
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(data), "--episodes", "3"]) == 0
    assert "upload the results later: metagmvae track" in capsys.readouterr().err
    assert (run / "results" / "test-5way-1shot-transductive.json").exists()


def test_a_run_that_cannot_be_written_is_evaluated_all_the_same(data, tmp_path, capsys):
    """The run of another user, or a full disk, loses no result."""
    run = tmp_path / "run"
    assert train(data, run, **{"tracking.enabled": "false", "run.figures": "false"}) == 0
    (run / "results").write_text("no folder can be here")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(data), "--episodes", "3", "--json"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert 0 < answer["accuracy"] <= 1
    assert answer["kept"] == []
    assert "; the results were not stored with the run" in captured.err
    assert not (run / "evaluations.jsonl").exists()


def test_figures_that_cannot_be_drawn_are_reported_and_the_run_is_kept(data, tmp_path, capsys):
    few = tmp_path / "few"
    write_dataset(open_source("glyphs", classes=(12, 6, 6), drawings=1), few)
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
    words = ["evaluate", "models:/glyphs@champion", "--data", str(data), "--episodes", "3", "--json"]
    answer = answer_of(*words)
    assert answer["kept"] == "models:/glyphs/1"
    client = connect(store).client
    version = client.get_model_version("glyphs", "1")
    assert float(version.tags["results.test.5w1s.transductive"]) == pytest.approx(answer["accuracy"], abs=1e-6)
    assert float(version.tags["results.test.5w1s.transductive_ci95"]) == pytest.approx(answer["ci95"], abs=1e-6)
    metrics = client.get_run(version.run_id).data.metrics
    assert metrics["test/5w1s/transductive"] == answer["accuracy"]
    names = {item.path for item in client.list_artifacts(version.run_id, "results")}
    assert names == {f"results/test-5w1s-transductive.{kind}" for kind in ("json", "parquet")}
