"""`metagmvae table NUMBER --run`: trains and evaluates what is missing within the budget; a second call continues."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlflow_template
import pytest
import torch
from called_commands import answer_of, called, refusal_of
from command_words import set_words
from small_preset import SMALL

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.paper_tables import table_rows
from metagmvae.evaluation.paper_tables.table_rows import table_parts
from metagmvae.evaluation.paper_tables.table_structure import Column, Recipe, TablePart, TableRow, select_columns
from metagmvae.infra.runs import training_speed
from metagmvae.infra.runs.run_folder import read_settings
from metagmvae.infra.runs.training_speed import Speed, measure_speed
from metagmvae.infra.tables import run_job as run_job_module
from metagmvae.infra.tables import table_tracking
from metagmvae.infra.tables.run_job import affordable_episodes, affordable_steps, planned_settings
from metagmvae.infra.tables.table_jobs import TableJob, _new_job
from metagmvae.infra.tracking.store import connect
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer import loop
from metagmvae.training.trainer.checkpoint import load_state

COLUMNS = (Column("glyphs", 5, 1), Column("glyphs", 3, 2))
GENERATIVE = """
[train]
steps = 200
set_size = 30
samples = 2
batch = 1
components = 3
"""
PROTONETS = """
[method]
name = "protonets"
tasks = "labels"
query = 3
[train]
steps = 100
batch = 2
"""
STEP_S = 2.0


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    """Table 1 of two glyph rows, of three trainings, and a fourth row without a preset; a step takes two seconds."""

    def preset(name: str, text: str) -> str:
        (tmp_path / f"{name}.toml").write_text(SMALL.format(name=name) + text)
        return str(tmp_path / f"{name}.toml")

    generative, protonets = preset("small-gmvae", GENERATIVE), preset("small-protonets", PROTONETS)

    def row(key, mode, recipe):
        return TableRow(key, key, mode, {COLUMNS[0]: 50.0}, {}, dict.fromkeys(COLUMNS, recipe))

    identity = Recipe(generative, (), ("adapt.e_step=identity",))
    rows = (
        row("gmvae", "transductive", Recipe(generative)),
        row("gmvae, identity", "transductive", identity),
        row("protonets", "inductive", Recipe(protonets)),
        row("nothing", "inductive", Recipe("no-such-preset")),
    )
    monkeypatch.setattr(table_rows, "paper_tables", lambda: {1: (TablePart("Glyphs", COLUMNS, rows),)})
    monkeypatch.setattr(run_job_module, "measure_speed", lambda settings, dataset: Speed("cpu", STEP_S, STEP_S, 0.0))
    return tmp_path


def words(folder: Path, data: Path, *more: object, budget: str = "48s") -> list[object]:
    places = ["--data", data, "--results", folder / "results", "--out", folder / "runs"]
    untracked = ["--set", "tracking.enabled=false"]
    return ["table", "1", "--run", "--budget", budget, "--episodes", "5", *places, *untracked, *more]


def run_table(folder: Path, data: Path, *more: object, code: int = 1, **options: str) -> dict:
    """The answer of the command, which fails because of the row without a preset."""
    return answer_of(*words(folder, data, *more, **options), code=code)


def trained_steps(folder: Path) -> dict[str, int]:
    runs = sorted((folder / "runs").glob("small-*"))
    return {run.name.split("-48s")[0][:-7]: read_settings(run).train.steps for run in runs}


def test_runs_what_is_missing_and_names_what_fails(table, data):
    first = run_table(table, data)
    # 0.85 of 48 s at two seconds a step; the row with other settings of `adapt` shares its training.
    assert trained_steps(table) == {"small-gmvae": 20, "small-protonets": 20}
    fingerprint = Dataset.open(data).fingerprint[:6]
    stems = [f"small-protonets-{fingerprint}-48s-seed0", f"small-gmvae-{fingerprint}-48s-seed0"]
    assert [row["settings"] for row in first["ran"]] == stems, "the smallest training comes first"
    files = {file for row in first["ran"] for file in row["files"]}
    assert files == {path.name for path in (table / "results").glob("*.json")}
    assert files == {path.with_suffix(".json").name for path in (table / "results").glob("*.parquet")}
    assert len(files) == 6
    (failed,) = first["failed"]
    assert failed == {"system": "nothing", "settings": "no-such-preset", "reason": "there is no such preset"}
    statuses = [[cell["status"] for cell in row["cells"]] for row in first["document"]["parts"][0]["rows"]]
    assert statuses == [["run", "run"]] * 3 + [["not run", "not run"]]
    cell = first["document"]["parts"][0]["rows"][0]["cells"][0]
    assert (cell["ours"]["budget_s"], cell["ours"]["steps"], cell["ours"]["episodes"]) == (48, 20, 5)
    record = json.loads((table / "results" / cell["ours"]["files"][0]).read_text())
    assert record["settings"]["method"]["name"] == "meta-gmvae"
    again = run_table(table, data)
    assert (again["ran"], again["done_before"]) == ([], 6)
    assert again["table"] == first["table"]


@pytest.mark.parametrize(("selection", "calls"), [("last", 1), ("best", 2)])
def test_tasks_of_one_model_are_evaluated_together(table, data, monkeypatch, selection, calls):
    """The images are then encoded once; with train.selection = best each number of shots has a model of its own."""
    evaluated, evaluate = [], run_job_module.evaluate_model

    def counted(loaded, dataset, tasks, **options):
        evaluated.append(options["mode"])
        return evaluate(loaded, dataset, tasks, **options)

    monkeypatch.setattr(run_job_module, "evaluate_model", counted)
    preset = table / "small-gmvae.toml"
    preset.write_text(preset.read_text().replace("steps = 200", f'steps = 200\nselection = "{selection}"'))
    run_table(table, data, "--rows", "gmvae", code=0)
    assert evaluated == ["transductive"] * calls


def test_another_budget_and_another_seed_are_other_trainings(table, data):
    run_table(table, data)
    other = run_table(table, data, "--dry-run", budget="50s")
    assert [row["tasks"] for row in other["would_run"]] == [2, 4]
    seeded = run_table(table, data, "--set", "train.seed=1")
    assert len(seeded["ran"]) == 2
    cell = seeded["document"]["parts"][0]["rows"][0]["cells"][0]["ours"]
    assert cell["trainings"] == 2


def test_stopped_training_continues_and_gives_the_same_weights(table, data, monkeypatch):
    """A signal arrives in step 7 of the first training."""
    record, seen = loop._record, []

    def recorded(stage, hooks, context, window, step):
        if step == 7 and not seen:
            seen.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return record(stage, hooks, context, window, step)

    monkeypatch.setattr(loop, "_record", recorded)
    code, _, said = called(*words(table, data))
    assert code == 130
    assert "the same command continues" in said
    assert list((table / "results").iterdir()) == []
    (run,) = (table / "runs").glob("small-protonets*")
    assert load_state(run / "checkpoint.pt")["step"] < 20

    def speed(settings, dataset):
        assert settings.name == "small-gmvae", "the steps of a training that has begun are not planned again"
        return Speed("cpu", STEP_S, STEP_S, 0.0)

    monkeypatch.setattr(run_job_module, "measure_speed", speed)
    assert len(run_table(table, data)["ran"]) == 2
    stopped = load_state(run / "checkpoint.pt")["model"]
    monkeypatch.setattr(run_job_module, "measure_speed", lambda *_: Speed("cpu", STEP_S, STEP_S, 0.0))
    (table / "other").mkdir()
    run_table(table, data, "--out", table / "other", "--results", table / "other-results")
    (uninterrupted,) = (table / "other").glob("small-protonets*")
    expected = load_state(uninterrupted / "checkpoint.pt")["model"]
    assert all(torch.equal(stopped[key], expected[key]) for key in expected)


def test_stop_between_training_and_evaluation_trains_nothing_again(table, data, monkeypatch):
    evaluate, trainings, stops = run_job_module.evaluate_model, [], []
    train = run_job_module.run_training

    def stopped_once(*arguments, **options):
        if options["name"].startswith("small-gmvae") and not stops:
            stops.append(options["name"])
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    def counted(settings, **options):
        trainings.append(settings.name)
        return train(settings, **options)

    monkeypatch.setattr(run_job_module, "evaluate_model", stopped_once)
    monkeypatch.setattr(run_job_module, "run_training", counted)
    assert called(*words(table, data))[0] == 130
    assert len(list((table / "results").glob("*.json"))) == 2
    answer = run_table(table, data)
    assert trainings == ["small-protonets", "small-gmvae"]
    assert (answer["done_before"], answer["document"]["not_run"]) == (2, 2)


def test_error_of_one_row_loses_no_other(table, data, monkeypatch):
    train = run_job_module.run_training

    def failing(settings, **options):
        if settings.name == "small-protonets":
            raise RuntimeError("out of memory\nsecond line")
        return train(settings, **options)

    monkeypatch.setattr(run_job_module, "run_training", failing)
    answer = run_table(table, data)
    assert len(answer["ran"]) == 1
    reasons = {row["system"]: row["reason"] for row in answer["failed"]}
    assert reasons == {"protonets": "RuntimeError: out of memory", "nothing": "there is no such preset"}
    assert answer["document"]["not_run"] == 4


def test_changed_preset_is_refused_instead_of_continued(table, data):
    run_table(table, data)
    file = table / "small-protonets.toml"
    file.write_text(file.read_text().replace("query = 3", "query = 4"))
    from metagmvae.evaluation.paper_tables import match_results

    match_results.recipe_settings.cache_clear()
    answer = run_table(table, data)
    (reason,) = [row["reason"] for row in answer["failed"] if row["system"] == "protonets"]
    assert reason.endswith("was trained with other settings (method.query); delete it")


def test_cells_are_the_mean_over_the_seeds_of_one_command(table, data, monkeypatch):
    """The budget allows other numbers of steps in each training, as on a shared machine."""
    times = iter((2.0, 2.5, 2.0, 2.5))
    monkeypatch.setattr(run_job_module, "measure_speed", lambda *_: Speed("cpu", 0.0, next(times), 0.0))
    answer = run_table(table, data, "--seeds", "3", "1")
    names = [row["settings"] for row in answer["ran"]]
    assert [name.partition("-seed")[2] for name in names] == ["3", "3", "1", "1"], "a training of each row comes first"
    assert sorted(path.name for path in (table / "runs").iterdir()) == sorted(names)
    assert [read_settings(table / "runs" / name).train.steps for name in names] == [20, 16, 20, 16]
    cell = answer["document"]["parts"][0]["rows"][0]["cells"][0]
    records = [json.loads((table / "results" / file).read_text()) for file in cell["ours"]["files"]]
    assert sorted(record["settings"]["train"]["seed"] for record in records) == [1, 3]
    accuracies = [record["accuracy"] for record in records]
    assert cell["ours"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert cell["ours"]["spread"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    again = run_table(table, data, "--seeds", "1", "3")
    assert (again["ran"], again["done_before"]) == ([], 12)


def test_dry_run_writes_nothing(table, data):
    answer = run_table(table, data, "--dry-run")
    assert [row["tasks"] for row in answer["would_run"]] == [2, 4]
    assert not (table / "results").exists()
    assert not (table / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "model.width=3"], "would change the model of the rows"),
        (["--set", "adapt.samples=3"], "would change the model of the rows"),
        (["--set", "train.steps=3"], "train.steps follows from --budget"),
        (["--set", "run.out=x"], "run.out follows from --budget"),
        (["--workers", "1", "--set", "run.engine=ray"], "with --workers each training is a Ray task already"),
        (["--seeds", "1", "1"], "--seeds 1: give different numbers of 0 or more"),
        (["--seeds", "-1"], "--seeds -1: give different numbers of 0 or more"),
        (["--seeds", "1", "--set", "train.seed=2"], "--set train.seed=2: --seeds gives the seeds already"),
        (["--workers", "-1"], "--workers is -1"),
        (["--episodes", "0"], "--episodes is 0"),
    ],
)
def test_wrong_options_are_refused(table, data, options, message):
    assert message in refusal_of(*words(table, data, *options))


def test_two_datasets_of_the_same_images_are_refused(table, data):
    assert "is the second dataset of images of glyphs" in refusal_of(*words(table, data, "--data", data))


def test_names_of_trainings_with_many_settings_fit_into_file_names_and_differ(data, tmp_path):
    """The row UMTRA on SimCLR's features of Table 10 changes 11 settings of its preset."""
    from metagmvae.infra.tables.table_request import TableRequest

    request = TableRequest(1, (str(data),), tmp_path, tmp_path, 60, 5, ())
    common = tuple(f"pretrain.{key}=8" for key in ("batch", "steps", "shots", "query_views", "clusters", "queue"))
    recipes = [Recipe("omniglot-umtra", (*common, f"pretrain.learning_rate={rate}")) for rate in (0.1, 0.2)]
    settings = load_settings("omniglot-umtra")
    names = {_new_job(recipe, settings, Dataset.open(data), 1, request).name for recipe in recipes}
    assert len(names) == 2
    assert all(len(name) == 150 and name.endswith("-60s-seed0") for name in names)


def job(config: Path | str, data: Path, tmp_path: Path, budget_s: float, *overrides: str) -> TableJob:
    from metagmvae.infra.tables.table_request import TableRequest

    request = TableRequest(1, (str(data),), tmp_path / "results", tmp_path / "runs", budget_s, 5, overrides)
    settings = load_settings(config, overrides)
    return _new_job(Recipe(str(config)), settings, Dataset.open(data), 1, request)


@pytest.mark.parametrize(
    ("budget_s", "pretrain", "meta"),
    [
        (200, 42, 85),  # half of 0.85 of it for each stage, at 2 s and 1 s a step
        (588.2353, 150, 200),  # the second stage is complete after 200 s of its 250 s, so the first one has 300 s
        (10_000, 400, 200),  # never more than the full schedule
        (1, 1, 1),  # never fewer than one
    ],
)
def test_the_budget_is_divided_evenly_between_the_stages(data, tmp_path, monkeypatch, budget_s, pretrain, meta):
    monkeypatch.setattr(run_job_module, "measure_speed", lambda *_: Speed("cpu", 2.0, 1.0, 0.0))
    settings = planned_settings(job("omniglot-cpu", data, tmp_path, budget_s))
    assert (settings.pretrain.steps, settings.train.steps) == (pretrain, meta)
    assert settings.train.checkpoint_every == 30  # a minute of the slower steps
    assert (settings.validation.every, settings.validation.calibration_episodes) == (0, 0)


def test_a_stage_without_steps_leaves_the_budget_to_the_other():
    assert affordable_steps({"pretrain.steps": (0, 0.0), "train.steps": (1000, 0.5)}, 100) == {
        "pretrain.steps": 0,
        "train.steps": 200,
    }


@pytest.mark.parametrize(("episode_s", "episodes"), [(0.001, 1000), (1.0, 300), (60.0, 20)])
def test_slow_evaluations_have_fewer_episodes(data, tmp_path, episode_s, episodes):
    wanted = replace(job("omniglot-cpu", data, tmp_path, 300), episodes=1000)
    assert affordable_episodes(wanted, episode_s) == episodes


def test_fewer_episodes_than_asked_for_are_enough_where_no_more_are_affordable(table, data, monkeypatch):
    monkeypatch.setattr(run_job_module, "affordable_episodes", lambda job, episode_s: 3)
    first = run_table(table, data, "--rows", "protonets", code=0)
    assert [cell["ours"]["episodes"] for cell in first["document"]["parts"][0]["rows"][0]["cells"]] == [3, 3]
    again = run_table(table, data, "--rows", "protonets", code=0)
    assert (again["ran"], again["done_before"]) == ([], 2)


def test_more_episodes_are_evaluated_without_another_training(table, data, monkeypatch):
    run_table(table, data)
    monkeypatch.setattr(run_job_module, "run_training", None)
    more = run_table(table, data, "--episodes", "6")
    cells = [cell for row in more["document"]["parts"][0]["rows"][:3] for cell in row["cells"]]
    assert [cell["ours"]["episodes"] for cell in cells] == [6] * 6
    assert run_table(table, data)["done_before"] == 6


def test_presets_that_choose_a_checkpoint_are_validated_once_at_the_end(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_job_module, "measure_speed", lambda *_: Speed("cpu", 0.0, 1.0, 0.0))
    settings = planned_settings(job("omniglot-5way", data, tmp_path, 100))
    assert (settings.train.selection, settings.train.steps, settings.validation.every) == ("best", 85, 85)


def test_speed_of_each_stage_is_measured(data, monkeypatch):
    monkeypatch.setattr(training_speed, "MEASURED_STEPS", (3, 3))
    small = ["model.channels=4", "model.width=8", "model.heads=2", "model.latent=4", "train.set_size=20"]
    only_meta = measure_speed(load_settings("omniglot-5way", [*small, "train.batch=1"]), Dataset.open(data))
    assert only_meta.pretrain_step_s == only_meta.encode_s == 0
    assert only_meta.meta_step_s > 0
    both = [*small, "train.components=2", "pretrain.batch=16"]
    speed = measure_speed(load_settings("omniglot-cpu", both), Dataset.open(data))
    assert min(speed.pretrain_step_s, speed.meta_step_s) > 0
    tasks = ["method.name=protonets", "method.tasks=clusters", "method.query=3", "pretrain.steps=4"]
    clusters = measure_speed(load_settings("omniglot-cpu", [*both, *tasks]), Dataset.open(data))
    assert min(clusters.pretrain_step_s, clusters.meta_step_s) > 0


@pytest.mark.parametrize(("step_s", "steps"), [(5.0, 4), (20.0, 2)])
def test_slow_steps_are_timed_a_few_times(data, monkeypatch, step_s, steps):
    """Each step takes as long on a clock that stands still otherwise."""
    clock = iter(step_s * step for step in range(1000))
    monkeypatch.setattr(training_speed, "MEASURED_STEPS", (3, 50))
    monkeypatch.setattr(training_speed, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    small = ["model.channels=4", "model.width=8", "model.heads=2", "model.latent=4", "train.set_size=20"]
    speed = measure_speed(load_settings("omniglot-5way", [*small, "train.batch=1"]), Dataset.open(data))
    assert speed.meta_step_s == step_s
    assert next(clock) == step_s * steps


@pytest.mark.mlflow
def test_rows_are_children_of_one_mlflow_run(table, data):
    store = mlflow_template.new_store(table / "mlflow")
    tracked = set_words({"tracking.enabled": "true", "tracking.store": store.store, "tracking.experiment": "tables"})
    run_table(table, data, *tracked)
    run_table(table, data, *tracked, "--set", "train.seed=1")
    client = connect(store).client
    experiment = client.get_experiment_by_name("tables").experiment_id
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if run.data.tags.get("metagmvae.table") == "1"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1 == 4
    assert parent.info.status == "FINISHED"
    assert all(
        "test/5w1s/transductive" in run.data.metrics or "test/5w1s/inductive" in run.data.metrics for run in children
    )


@pytest.mark.mlflow
def test_runs_that_the_store_does_not_know_are_reported_once(tmp_path, monkeypatch, caplog):
    store = mlflow_template.new_store(tmp_path / "mlflow")
    monkeypatch.setattr(table_tracking, "last_entry", lambda folder: {"run_id": folder.name})
    with table_tracking.TableTracker(store, 1, tmp_path) as tracker:
        for name in ("first", "second"):
            tracker.add(tmp_path / name)
    (warning,) = caplog.messages
    assert "Run with id=first not found" in warning
    assert "the table goes on, and its runs have no parent run" in warning


@pytest.mark.ray
def test_rows_run_as_ray_tasks(table, data):
    """The time of a step is measured in the tasks, which are other processes."""
    answer = run_table(table, data, "--workers", "2", budget="1s")
    assert len(answer["ran"]) == 2
    assert answer["document"]["not_run"] == 2


def test_only_the_columns_of_some_numbers_of_classes_and_shots():
    parts = select_columns(table_parts(1), [20])
    assert [column[:3] for part in parts for column in part.columns] == [("omniglot", 20, 1), ("omniglot", 20, 5)]
    assert {column.way for part in parts for row in part.rows for column in row.recipes} == {20}
    few = {("omniglot", 5, 1), ("omniglot", 5, 5), ("mini-imagenet", 5, 1), ("mini-imagenet", 5, 5)}
    parts = select_columns(table_parts(1), [5], [1, 5])
    assert {column[:3] for part in parts for column in part.columns} == few
    assert {column[:3] for part in parts for row in part.rows for column in row.recipes} == few
    assert [column[2] for part in select_columns(table_parts(1), shots=[50]) for column in part.columns] == [50]
    assert select_columns(table_parts(2)) == table_parts(2)
    with pytest.raises(DataError, match="--ways 7: the table has no such column; give 5 or 20"):
        select_columns(table_parts(1), [7])
    with pytest.raises(DataError, match="--shots 2: the table has no such column; give 1 or 5 or 20 or 50"):
        select_columns(table_parts(1), shots=[2])
    with pytest.raises(DataError, match="--ways, --shots: no row has a column of these numbers"):
        select_columns(table_parts(1), [20], [50])
