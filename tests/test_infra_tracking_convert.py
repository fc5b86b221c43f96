"""Conversion of the files of a run folder to MLflow parameters, tags and points; choice of the store."""

from mlflow_template import ended_run, line

from metagmvae.configs.credentials import redact
from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.tracking.convert import flatten, tags, unsent_chunks
from metagmvae.infra.tracking.store import store_uri


def test_growing_file_is_read_by_complete_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2) + line(3)[:10])
    (chunk,) = unsent_chunks(path, {}, 0, 1000)
    assert [point.step for point in chunk.points] == [1] * 4 + [2] * 4
    assert list(unsent_chunks(path, chunk.position, 0, 1000)) == []
    path.write_text(line(1) + line(2) + line(3))
    (rest,) = unsent_chunks(path, chunk.position, 0, 1000)
    assert {point.step for point in rest.points} == {3}
    path.write_text(line(1) + line(2, steps=99) + line(3))  # a resumed run has deleted lines and written them again
    (again,) = unsent_chunks(path, rest.position, 0, 1000)
    assert {point.step for point in again.points} == {1, 2, 3}


def test_chunks_hold_complete_lines_up_to_the_limit(tmp_path):
    run = ended_run(tmp_path / "run")
    chunks = list(unsent_chunks(run / "metrics.jsonl", {}, 0, 10))
    assert [len(chunk.points) for chunk in chunks] == [8] * 100
    assert [chunk.position["lines"] for chunk in chunks] == list(range(2, 201, 2))
    assert chunks[-1].position["bytes"] == (run / "metrics.jsonl").stat().st_size


def test_pretraining_has_its_own_metric_keys(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, stage="pretrain") + line(2))
    (chunk,) = unsent_chunks(path, {}, 0, 1000)
    keys = {point.key for point in chunk.points}
    assert {"pretrain/loss", "loss"} <= keys


def test_flatten_and_redaction_of_passwords():
    assert flatten({"a": {"b": [1, 2], "c": "x"}, "d": None, "e": True}) == {
        "a.b": "[1, 2]",
        "a.c": "x",
        "e": "true",
    }
    assert redact("http://me:secret@host:5000") == "http://host:5000"
    record = {"command": "metagmvae train x --set tracking.uri=http://me:secret@host"}
    assert tags({}, record)["command"].endswith("tracking.uri=http://host")


def test_relative_store_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store_uri(TrackingSettings()) == f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db"
    assert store_uri(TrackingSettings(uri="sqlite:///x.db")) == f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-outside:5000")
    assert store_uri(TrackingSettings()) == "http://from-outside:5000"
    assert store_uri(TrackingSettings(uri="http://set:5000")) == "http://set:5000"
