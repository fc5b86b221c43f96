"""`metagmvae compare`: reading items, evaluating models, reusing stored results, refusing wrong requests."""

import csv
import json
from functools import partialmethod
from pathlib import Path

import mlflow_template
import pytest
from called_commands import answer_of, refusal_of
from known_sweep import write_sweep

from metagmvae.evaluation.sweeps.trials import CurvePoint, Trial
from metagmvae.infra.cli import main
from metagmvae.infra.registry.register import register
from metagmvae.infra.tracking.store import connect
from metagmvae.infra.workflows import compare_versions
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.checkpoint import load_state, save_state

SETTINGS = {"data": {"validation_split": "validation"}, "train": {"steps": 20}}


def evaluate(model: object, data: Path, *options: str) -> None:
    assert main(["evaluate", str(model), "--data", str(data), "--episodes", "6", *options]) == 0


def sweep(folder: Path, **changes: object) -> Path:
    """A sweep folder with three trials, one of which failed."""

    def curve(*accuracies: float) -> tuple[CurvePoint, ...]:
        return tuple(
            CurvePoint(step=10 * i, accuracy=a, ci95=0.01, seconds=2.0 * i) for i, a in enumerate(accuracies, 1)
        )

    trials = [
        Trial(number=0, settings={"train.em_iterations": 5}, status="stopped", curve=curve(0.5)),
        Trial(number=1, settings={"train.em_iterations": 10}, status="finished", curve=curve(0.4, 0.7)),
        Trial(number=2, settings={"train.em_iterations": 20}, status="failed", reason="out of memory"),
    ]
    about = {"name": "first", "base": SETTINGS, "data_fingerprint": "d" * 64}
    return write_sweep(folder, trials, {}, **about | changes)


def test_models_are_evaluated_on_the_same_episodes_and_stored_results_are_reused(data, tmp_path):
    one, other = (mlflow_template.new_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other")))
    arguments = [one, other, "--data", data, "--episodes", 6, "--shot", 1, 5, "--csv", tmp_path / "rows.csv"]
    fresh = answer_of("compare", *arguments)
    assert [row["name"] for row in fresh["rows"]] == ["one", "other"]
    assert [row["mark"] for row in fresh["rows"]] == ["", ""]
    assert fresh["settings"] == [{"setting": "train.seed", "values": {"one": 0, "other": 1}}]
    assert [(pair["name"], pair["against"], pair["shot"]) for pair in fresh["paired"]] == [
        ("other", "one", 1),
        ("other", "one", 5),
    ]
    assert len(fresh["calibration"]) == 4
    accuracy = {(row["name"], r["shot"]): r["accuracy"] for row in fresh["rows"] for r in row["results"]}
    for pair in fresh["paired"]:
        difference = accuracy["other", pair["shot"]] - accuracy["one", pair["shot"]]
        assert pair["difference"] == pytest.approx(difference)
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(line["name"], int(line["shot"])): float(line["accuracy"]) for line in lines} == accuracy
    # `evaluate` gives the same results; they are stored, so that `compare` evaluates nothing, with --data or without.
    for run in (one, other):
        for shot in ("1", "5"):
            evaluate(run, data, "--shot", shot)
    stored = answer_of("compare", *arguments)
    assert "calibration" not in stored
    without_data = answer_of("compare", one, other)
    for answer in (stored, without_data):
        assert answer["paired"] == fresh["paired"]
        assert [row["results"] for row in answer["rows"]] == [row["results"] for row in fresh["rows"]]
    # Results of an earlier training step are not reused.
    state = load_state(one / "checkpoint.pt")
    save_state(one / "checkpoint.pt", state | {"step": 2})
    assert {row["name"] for row in answer_of("compare", *arguments)["calibration"]} == {"one"}


def test_sweeps_result_files_and_the_paper_are_marked_in_one_table(data, tmp_path):
    run = mlflow_template.new_run(tmp_path / "run")
    record = tmp_path / "kept-5way-1shot.json"
    evaluate(run, data, "--record", str(record), "--results", str(record.with_suffix(".parquet")))
    evaluate(run, data, "--mode", "inductive")
    answer = answer_of("compare", record, run, sweep(tmp_path / "sweep"), "paper:omniglot/umtra", "--top", 2)
    rows = answer["rows"]
    names = ["kept", "run", "run", "first, trial 1", "first, trial 0", "paper: UMTRA"]
    assert [row["name"] for row in rows] == names
    assert sorted(row["mark"] for row in rows[:3]) == ["", "", "a"]
    assert [row["mark"] for row in rows[3:]] == ["b", "b", "c"]
    assert "split validation, not test" in answer["marks"]["b"]
    assert rows[3]["results"] == [{"way": 5, "shot": 1, "accuracy": 0.7, "ci95": 0.01}]
    assert (rows[3]["steps"], rows[3]["seconds"], rows[3]["mode"]) == (20, 4.0, "transductive")
    assert rows[5]["results"][0] == {"way": 5, "shot": 1, "accuracy": pytest.approx(0.838), "ci95": None}
    (em,) = [row for row in answer["settings"] if row["setting"] == "train.em_iterations"]
    assert (em["values"]["first, trial 1"], em["values"]["first, trial 0"]) == (10, 5)
    # The result file and the run hold the same model on the same episodes.
    (pair,) = answer["paired"]
    assert (pair["difference"], pair["verdict"]) == (0.0, "undecided")
    assert main(["compare", str(record), "paper:omniglot", "--strict"]) == 0
    assert "mode inductive, not transductive" in refusal_of("compare", record, run, "--strict")


@pytest.mark.mlflow
def test_registered_versions_show_their_results(data, tmp_path, capsys, monkeypatch):
    store = mlflow_template.new_store(tmp_path / "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", connect(store).uri)
    for seed in range(2):
        register(mlflow_template.new_run(tmp_path / f"run{seed}", seed=seed), store, "glyphs", alias="champion")
        evaluate(f"models:/glyphs/{seed + 1}", data)
    client = connect(store).client
    answer = answer_of("compare", "models:/glyphs")
    assert [row["name"] for row in answer["rows"]] == ["glyphs v1", "glyphs v2 (champion)"]
    assert [row["mark"] for row in answer["rows"]] == ["", ""]
    assert answer["rows"][1]["episodes"] == 6
    (pair,) = answer["paired"]
    again = answer_of("compare", "models:/glyphs/1", "models:/glyphs@champion", "--data", data, "--episodes", 6)
    assert again["paired"][0]["difference"] == pytest.approx(pair["difference"])
    # Tags do not record queries, episodes and data, so the row is marked.
    third = register(mlflow_template.new_run(tmp_path / "run2", seed=2), store, "glyphs", alias="")
    assert answer_of("compare", "models:/glyphs")["notes"] == [
        "models:/glyphs/3: left out, because it has no result yet"
    ]
    assert "models:/glyphs/3: no result yet" in refusal_of("compare", "models:/glyphs/1", "models:/glyphs/3")
    client.set_model_version_tag("glyphs", third.version, "results.test.5w1s.transductive", "0.5")
    answer = answer_of("compare", "models:/glyphs")
    assert answer["rows"][2]["mark"] == "a"
    assert answer["marks"]["a"].endswith("query unrecorded, not 15; episodes unrecorded, not 6; seed unrecorded, not 0")
    assert main(["compare", "models:/glyphs/2", "models:/glyphs@champion"]) == 2
    assert "models:/glyphs@champion: the same as models:/glyphs/2" in capsys.readouterr().err
    assert "no registered model of that name" in refusal_of("compare", "models:/nobody")


@pytest.mark.mlflow
def test_every_page_of_versions_and_models_is_read(tmp_path, monkeypatch):
    tracking = mlflow_template.new_store(tmp_path / "mlflow")
    client = connect(tracking).client
    monkeypatch.setenv("MLFLOW_TRACKING_URI", connect(tracking).uri)
    for name in ("a", "b", "c"):
        client.create_registered_model(name)
    for _ in range(5):
        client.create_model_version("a", source=str(tmp_path))
    for method in ("search_model_versions", "search_registered_models"):
        search = getattr(type(client), method)
        monkeypatch.setattr(type(client), method, partialmethod(search, max_results=2))
    monkeypatch.setattr(compare_versions, "_item", lambda store, version, ref: version.version)
    assert compare_versions.version_items("models:/a") == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"known: a, b, c$"):
        compare_versions.version_items("models:/nobody")


@pytest.mark.mlflow
def test_without_results_the_validation_during_training_is_shown(tmp_path, monkeypatch):
    store = mlflow_template.new_store(tmp_path / "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", connect(store).uri)
    run = mlflow_template.new_run(tmp_path / "run")
    line = {"stage": "meta", "step": 1, "global_step": 1, "elapsed_s": 1.5, "loss": 2.0}
    line |= {"validation/5w1s": 0.25, "validation/5w1s_ci95": 0.02, "validation/neighbours": 0.9}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "figures").mkdir()
    (run / "figures" / "curves.json").write_text(json.dumps({"name": "run", "validation": [line]}))
    register(run, store, "glyphs", alias="champion")
    rows = answer_of("compare", "models:/glyphs", run)["rows"]
    assert [row["name"] for row in rows] == ["glyphs v1 (champion)", "run"]
    for row in rows:
        assert row["results"] == [{"way": 5, "shot": 1, "accuracy": 0.25, "ci95": 0.02}]
        assert (row["split"], row["episodes"], row["seed"], row["steps"]) == ("validation", 200, 1, 1)
    # Without run.json the data is unknown, so the row is marked.
    assert [(row["data"], row["mark"]) for row in rows] == [("d" * 64, ""), (None, "a")]
    # A validation of another step than the registered one is not used.
    (run / "figures" / "curves.json").write_text(json.dumps({"name": "run", "validation": [line | {"global_step": 9}]}))
    register(run, store, "later", alias="")
    assert "models:/later/1: no result yet" in refusal_of("compare", "models:/later")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (["nowhere"], "not found or cannot be compared; give run folders"),
        (["RUN"], "no result yet; evaluate it with --data URI"),
        (["RUN", "RUN/"], "give each one once"),
        (["paper:omniglot", "--data", "DATA"], "none of the compared items is a model"),
        (["RUN", "--data", "DATA", "--episodes", "1"], "a confidence interval needs at least 2"),
        (["RUN", "--data", "DATA", "--way", "9"], "way 9 exceeds the 6 classes"),
        (["RUN", "--data", "DATA", "--split", "x"], "no split 'x'"),
        (["SWEEP", "--top", "0"], "--top 0: must be at least 1"),
        (["BAD.json"], "bad.json: accuracy = 97.0: input should be less than or equal to 1; so it is not a result"),
        (["BROKEN"], "task is 'five'"),
    ],
)
def test_wrong_requests_give_one_error_line(data, tmp_path, request_, reason):
    paths = {"DATA": data, "RUN": mlflow_template.new_run(tmp_path / "run"), "SWEEP": sweep(tmp_path / "sweep")}
    paths["BROKEN"] = sweep(tmp_path / "broken", task="five")
    paths["BAD.json"] = tmp_path / "bad.json"
    task = {"ci95": 0.1, "way": 5, "shot": 1, "query": 15, "episodes": 6, "seed": 0, "mode": "transductive"}
    content = task | {"accuracy": 97.0, "split": "test", "data_fingerprint": "d"}
    (tmp_path / "bad.json").write_text(json.dumps(content))
    arguments = [str(paths.get(word.rstrip("/"), word)) + ("/" if word.endswith("/") else "") for word in request_]
    assert reason in refusal_of("compare", *arguments, "--html", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_episode_accuracies_of_another_evaluation_are_refused(data, tmp_path):
    run = mlflow_template.new_run(tmp_path / "run")
    evaluate(run, data)
    results = run / "results"
    kept = (results / "test-5way-1shot-transductive.parquet").read_bytes()
    evaluate(run, data, "--seed", "1")
    (results / "test-5way-1shot-transductive.parquet").write_bytes(kept)
    assert "its episodes are not those of" in refusal_of("compare", run)
    (results / "test-5way-1shot-transductive.parquet").write_bytes(kept[:100])
    assert "not a file of episode accuracies" in refusal_of("compare", run)
