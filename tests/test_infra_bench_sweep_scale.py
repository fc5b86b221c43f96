"""The benchmark of a large sweep: small, with real stores."""

import json

import mlflow_template
import pytest

from metagmvae.evaluation.sweeps import importance
from metagmvae.infra.bench import sweep_scale
from metagmvae.infra.bench.sweep_scale import bench_store, checkpoint_traffic, limits
from metagmvae.infra.cli import main
from metagmvae.infra.tracking.store import connect


def test_a_store_gets_the_same_trials_in_each_manner_and_is_tidied_up(tmp_path):
    tracking = mlflow_template.new_store(tmp_path / "store")
    row = bench_store(tracking, 4, 1)
    assert (row["store"], row["trials"], row["points_a_trial"]) == ("SQLite", 4, 36)
    assert all(row[key] > 0 for key in ("batched_per_s", "value_by_value_per_s", "together_per_s", "list_s_per_1000"))
    client = connect(tracking).client
    assert [found.name for found in client.search_experiments()] == ["Default"]
    (deleted,) = client.search_experiments(view_type=2)
    runs = client.search_runs([deleted.experiment_id], run_view_type=2)
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) == 1 + len(children) == 1 + 4 + 2 + 2 + 4  # parent; in batches, singly, a warm-up, together
    for run in children:
        history = client.get_metric_history(run.info.run_id, "validation/5w1s")
        assert [point.step for point in history] == list(range(100, 1000, 100))
        assert run.info.status == "FINISHED"
        assert "train.learning_rate" in run.data.params


def test_what_gives_out_first_comes_first():
    files = {"trials": 1000, "suggest_cpu_ms": 50.0, "append_ms": 1.0}
    store = STORE | {"value_by_value_per_s": 2.0, "batched_per_s": 10.0, "together_per_s": 4.0}
    rows = limits(files, [store], needed=4.0)
    assert [row["trials_per_s"] for row in rows] == [2.0, 4.0, 10.0, 20.0, 1000.0]
    assert rows[0] == {"part": "MLflow, value by value: SQLite", "trials_per_s": 2.0, "times_needed": 0.5}
    assert "TPE's suggestion after 1,000 trials" in rows[3]["part"]


def test_checkpoints_are_those_of_the_papers_model_with_adam():
    from metagmvae.configs.schema import ModelSettings
    from metagmvae.training.trainer.builders import build_model

    model = build_model(ModelSettings(), (1, 28, 28), 0)
    traffic = checkpoint_traffic()
    assert traffic["mb"] == pytest.approx(12e-6 * sum(weight.numel() for weight in model.parameters()))
    assert traffic["shared_mb_per_s"] == pytest.approx(traffic["mb"] * 800 * 9 / 300)


def test_the_command_measures_files_and_refuses_stores_that_it_cannot_use(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importance, "SHUFFLES", 1)
    monkeypatch.setattr(sweep_scale, "bench_store", lambda tracking, runs, writers: STORE)
    record = tmp_path / "bench.json"
    request = ["bench", "sweep-scale", "--trials", "130", "--runs", "2", "--record", str(record), "--json"]
    assert main(request) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["trials"] for row in answer["files"]] == [100, 130]
    assert all(row["suggest_cpu_ms"] > 0 and row["report_cpu_s"] > 0 for row in answer["files"])
    assert answer["trials_per_s_needed"] == pytest.approx(800 / 300)
    assert json.loads(record.read_text())["environment"]["cores"]
    assert main([*request[:2], "--stores", "http://127.0.0.1:9"]) == 1
    assert "not reachable (Connection refused)" in capsys.readouterr().err
    assert main([*request[:2], "--stores", "postgresql://me:secret@127.0.0.1/x"]) == 2
    error = capsys.readouterr().err
    assert "set PGUSER and PGPASSWORD" in error
    assert "secret" not in error
    assert main([*request[:2], "--trials", "0"]) == 2
    assert "--trials is 0; give 1 or more" in capsys.readouterr().err


STORE = {"store": "SQLite", "writers": 4, "value_by_value_per_s": 1.0, "batched_per_s": 3.0, "together_per_s": 2.0}
"""Of a store that another test measures."""
