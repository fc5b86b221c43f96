"""`metagmvae table flips --run` in the size of glyphs: equally long trainings, episodes recorded, resumable."""

from dataclasses import replace
from pathlib import Path

import pytest
from called_commands import answer_of, called
from small_preset import SMALL

from metagmvae.evaluation.paper_tables import table_rows
from metagmvae.evaluation.paper_tables.table_structure import Column, Recipe, TablePart, TableRow
from metagmvae.infra.runs.run_folder import read_settings
from metagmvae.infra.runs.training_speed import Speed
from metagmvae.infra.tables import run_job

COLUMN = Column("glyphs", 3, 1)
TRAIN = """
[train]
steps = 200
set_size = 30
samples = 2
decode_samples = 2
batch = 1
components = 3
"""


@pytest.fixture
def flips(tmp_path, monkeypatch) -> Path:
    """A base row, a row of the same training, one of another training, and one that cannot be trained.

    Each measurement of the time of a step gives another one, as on a shared machine.
    """
    preset = tmp_path / "small.toml"
    preset.write_text(SMALL.format(name="small") + TRAIN)

    def row(key, *overrides, adapt=()):
        return TableRow(key, key, "transductive", {}, {}, {COLUMN: Recipe(str(preset), overrides, adapt)})

    base = row("base")
    rows = (base, row("adapted", adapt=("adapt.e_step=identity",)), row("relu", "model.attention_activation=relu"))
    rows = (*rows, replace(base, key="nothing", name="nothing", recipes={}, reason="of no such data"))
    monkeypatch.setattr(table_rows, "paper_tables", lambda: {"flips": (TablePart("Glyphs", (COLUMN,), rows, base),)})
    times = iter(range(1, 100))

    def measured(settings, dataset):
        return Speed("cpu", 0.0, float(next(times)), 0.0)

    monkeypatch.setattr(run_job, "measure_speed", measured)
    return tmp_path


def words(folder: Path, data: Path, *more: str) -> list[object]:
    places = ["--data", data, "--results", folder / "results", "--out", folder / "runs"]
    budget = ["--budget", "20s", "--episodes", "6", "--set", "tracking.enabled=false"]
    return ["table", "flips", "--run", *budget, *places, *more]


def run_flips(folder: Path, data: Path, *more: str) -> dict:
    return answer_of(*words(folder, data, *more))


def steps_of(folder: Path) -> list[int]:
    return [read_settings(run).train.steps for run in sorted((folder / "runs").iterdir())]


def cells_of(answer: dict) -> dict:
    return {row["key"]: row["cells"][0] for row in answer["document"]["parts"][0]["rows"]}


def test_rows_are_trained_for_equal_steps_and_compared_on_the_same_episodes(flips, data):
    answer = run_flips(flips, data)
    assert len(answer["ran"]) == 2
    assert steps_of(flips) == [17, 17], "0.85 of the budget at a second a step, measured once"
    cells = cells_of(answer)
    assert [cells[key]["status"] for key in cells] == ["run", "run", "run", "no such system"]
    assert cells["base"]["difference"] is None
    for key in ("adapted", "relu"):
        difference = cells[key]["difference"]
        assert difference["episodes"] == 6
        assert difference["difference"] == pytest.approx(
            cells[key]["ours"]["accuracy"] - cells["base"]["ours"]["accuracy"]
        )
    again = run_flips(flips, data)
    assert (again["ran"], again["done_before"]) == ([], 3)


def test_rows_that_are_run_later_have_the_steps_of_the_first(flips, data, monkeypatch):
    run_flips(flips, data, "--rows", "base")
    monkeypatch.setattr(run_job, "measure_speed", None)
    answer = run_flips(flips, data, "--rows", "relu", "--set", "train.seed=0")
    assert steps_of(flips) == [17, 17]
    assert cells_of(answer)["relu"]["difference"] is not None


def test_interrupted_training_decides_the_steps_of_the_others(flips, data, monkeypatch):
    train = run_job.run_training

    def stopped(settings, **options):
        train(settings, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_job, "run_training", stopped)
    assert called(*words(flips, data))[0] == 130
    monkeypatch.setattr(run_job, "run_training", train)
    monkeypatch.setattr(run_job, "measure_speed", None)
    assert len(run_flips(flips, data)["ran"]) == 2
    assert steps_of(flips) == [17, 17]


def test_result_without_its_episodes_is_evaluated_again_and_not_trained_again(flips, data, monkeypatch):
    first = run_flips(flips, data)
    (file,) = cells_of(first)["relu"]["ours"]["files"]
    (flips / "results" / file).with_suffix(".parquet").unlink()
    monkeypatch.setattr(run_job, "run_training", None)
    again = run_flips(flips, data)
    assert [row["files"] for row in again["ran"]] == [[file]]
    assert cells_of(again)["relu"]["difference"] == cells_of(first)["relu"]["difference"]


def test_another_number_of_decoded_samples_is_another_training(flips, data):
    run_flips(flips, data)
    answer = run_flips(flips, data, "--set", "train.decode_samples=1")
    assert [row["settings"].endswith("-seed0-train.decode-samples-1") for row in answer["ran"]] == [True, True]
    assert cells_of(answer)["relu"]["difference"]["episodes"] == 6
    again = run_flips(flips, data, "--set", "train.decode_samples=1")
    assert (again["ran"], again["done_before"]) == ([], 3)


def test_differences_of_several_seeds_are_averaged(flips, data):
    cells = cells_of(run_flips(flips, data, "--seeds", "0", "1"))
    assert steps_of(flips) == [17, 17, 17, 17]
    difference = cells["relu"]["difference"]
    assert (difference["trainings"], cells["relu"]["ours"]["trainings"]) == (2, 2)
    assert difference["difference"] == pytest.approx(
        cells["relu"]["ours"]["accuracy"] - cells["base"]["ours"]["accuracy"]
    )
