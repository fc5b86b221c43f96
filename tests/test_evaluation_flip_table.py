"""The flip table: each difference between paper and published code alone, with paired differences to the base row."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.paper_tables.flip_rows import BASE, FLIPS
from metagmvae.evaluation.paper_tables.match_results import FREE_SETTINGS, matched_settings, read_result_folder
from metagmvae.evaluation.paper_tables.page_table import page_table
from metagmvae.evaluation.paper_tables.paper_table import TableDocument, table_document
from metagmvae.evaluation.paper_tables.table_layout import markdown_document
from metagmvae.evaluation.paper_tables.table_rows import table_parts
from metagmvae.evaluation.paper_tables.table_structure import select_rows
from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError

RELU = ("model.attention_activation=relu",)


def settings_of(*changes: str, preset: str = BASE.preset) -> dict:
    return matched_settings(json.loads(load_settings(preset, changes).model_dump_json()))


def changed(*changes: str) -> dict:
    """Compared settings that differ from the base row, with their new values."""
    base, other = settings_of(), settings_of(*changes)
    return {key: other[key] for key in other if other[key] != base[key]}


@pytest.mark.parametrize("number", [number for number, flip in FLIPS.items() if not flip.reason])
def test_row_changes_one_setting_to_the_value_of_the_published_code(number):
    flip = FLIPS[number]
    ((key, value),) = changed(*flip.overrides, *flip.adapt).items()
    published = settings_of(preset="omniglot-5way-published-code")
    assert value == ("isotropic" if number == 12 else published[key])
    assert key not in FREE_SETTINGS, "a result of the base row would belong to this row too"


def test_all_rows_together_are_the_published_code():
    """Row 12 is of the text of the paper; row 13, the choice of the checkpoint, is no row that a budget can measure."""
    flips = [flip for number, flip in FLIPS.items() if number != 12]
    changes = [change for flip in flips for change in (*flip.overrides, *flip.adapt)]
    assert settings_of(*changes, "train.selection=best") == settings_of(preset="omniglot-5way-published-code")


def test_every_difference_has_a_row_and_those_without_a_setting_their_reason(tmp_path, capsys):
    assert main(["table", "flips", "--results", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    document = TableDocument.model_validate(answer["document"])
    (part,) = document.parts
    assert (document.table, part.base) == ("flips", "base")
    assert [row.key for row in part.rows] == ["base", *(f"row-{number}" for number in range(1, 19))]
    assert {row.key for row in part.rows if row.reason} == {f"row-{n}" for n in (5, 6, 7, 9, 10, *range(13, 19))}
    assert (document.cells, document.not_run) == (16, 16)
    lines = {line.split("|")[1].strip(): line for line in answer["table"].splitlines() if line.startswith("| **")}
    assert lines["**row 5: latent size**"].split("|")[2].strip() == "differs for Mini-ImageNet only"
    assert lines["**row 11: objective: mean over the points of a set, not sum**"].count("not run") == 2
    assert "| **paper's settings** | paper | 94.92 ± 0.42 |  | 97.09 ± 0.20 |  |" in answer["table"]
    assert answer["table"].startswith("**Differences between the paper and its published code")


def write(
    folder: Path,
    changes: tuple[str, ...],
    accuracies: list[float],
    *,
    seed: int = 0,
    episodes_file: bool = True,
    **more,
) -> None:
    """A result of the base row with some changes, and the accuracy of each episode beside it."""
    folder.mkdir(exist_ok=True)
    settings = load_settings(BASE.preset, [*changes, f"train.seed={seed}"])
    result = EpisodeResults(5, 1, 15, 0, "transductive", np.array(accuracies), 1.0)
    content = result.summary() | {"split": "test", "data_fingerprint": 64 * "1", "dataset": {"name": "omniglot"}}
    content |= {"settings": settings.model_dump(mode="json"), "trained": {"step": 20}, "budget_s": 60.0} | more
    stem = folder / "-".join([*changes, f"seed{seed}", *more])
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(content))
    if episodes_file:
        result.write_parquet(f"{stem}.parquet")


def cell_of(folder: Path, key: str):
    document = table_document("flips", table_parts("flips"), read_result_folder(folder), folder)
    return next(row for row in document.parts[0].rows if row.key == key).cells[0], markdown_document(document)


BASES = ([0.2, 0.4, 0.6, 0.4], [0.4, 0.4, 0.4, 0.2], [0.2, 0.2, 0.4, 0.6])
FLIPPED = ([0.4, 0.4, 0.8, 0.6], [0.4, 0.6, 0.4, 0.6], [0.2, 0.4, 0.6, 0.8])


def test_difference_is_the_mean_over_the_same_episodes(tmp_path):
    """By plain loops: mean, and 1.96 standard deviations over the square root of the number of episodes."""
    write(tmp_path, (), BASES[0])
    write(tmp_path, RELU, FLIPPED[0])
    differences = [ours - base for ours, base in zip(FLIPPED[0], BASES[0], strict=True)]
    mean = sum(differences) / 4
    half_width = 1.96 * math.sqrt(sum((each - mean) ** 2 for each in differences) / 3) / math.sqrt(4)
    cell, text = cell_of(tmp_path, "row-4")
    assert cell.difference.difference == pytest.approx(mean)
    assert cell.difference.ci95 == pytest.approx(half_width)
    assert (cell.difference.trainings, cell.difference.episodes) == (1, 4)
    line = next(line for line in text.splitlines() if line.startswith("| **row 4"))
    assert f"| {100 * sum(FLIPPED[0]) / 4:.2f} ± " in line
    assert f"| {100 * mean:+.2f} ± {100 * half_width:.2f} | not run |  |" in line
    assert cell_of(tmp_path, "base")[0].difference is None
    assert cell_of(tmp_path, "row-3")[0].status == "not run"


def test_difference_over_trainings_pairs_equal_seeds(tmp_path):
    for seed in (0, 1, 2):
        write(tmp_path, (), BASES[seed], seed=seed)
        write(tmp_path, RELU, FLIPPED[seed], seed=seed)
    differences = [sum(ours) / 4 - sum(base) / 4 for ours, base in zip(FLIPPED, BASES, strict=True)]
    mean = sum(differences) / 3
    error = math.sqrt(sum((each - mean) ** 2 for each in differences) / 2) / math.sqrt(3)
    cell, text = cell_of(tmp_path, "row-4")
    assert cell.ours.trainings == cell.difference.trainings == 3
    assert cell.difference.difference == pytest.approx(mean)
    assert cell.difference.ci95 == pytest.approx(stats.t.ppf(0.975, 2) * error)
    assert cell.ours.spread == pytest.approx(np.std([sum(ours) / 4 for ours in FLIPPED], ddof=1))
    assert "3 trainings" in next(line for line in text.splitlines() if line.startswith("| **row 4"))


def test_the_longest_training_counts(tmp_path):
    write(tmp_path, RELU, FLIPPED[0], budget_s=None, trained={"step": 20})
    write(tmp_path, RELU, BASES[0], budget_s=None, trained={"step": 10}, shorter=True)
    ours = cell_of(tmp_path, "row-4")[0].ours
    assert (ours.steps, ours.trainings) == (20, 1)
    assert ours.accuracy == pytest.approx(sum(FLIPPED[0]) / 4)


def test_of_equally_long_trainings_those_with_the_most_seeds_count(tmp_path):
    for seed in (0, 1):
        write(tmp_path, RELU, FLIPPED[seed], seed=seed, environment={"time": "2026-01-01"})
    other = {"name": "omniglot", "options": {"split": "vinyals"}}
    write(tmp_path, RELU, FLIPPED[2], dataset=other, environment={"time": "2026-02-01"})
    ours = cell_of(tmp_path, "row-4")[0].ours
    assert (ours.trainings, ours.accuracy) == (2, pytest.approx(sum(FLIPPED[0] + FLIPPED[1]) / 8))


def test_fewest_episodes_of_several_trainings_are_named(tmp_path):
    write(tmp_path, RELU, FLIPPED[0], most_episodes=4)
    write(tmp_path, RELU, FLIPPED[1][:3], seed=1, most_episodes=4)
    ours = cell_of(tmp_path, "row-4")[0].ours
    assert (ours.trainings, ours.episodes) == (2, 3)


def test_seeds_that_the_base_row_lacks_are_not_paired_with_others(tmp_path):
    write(tmp_path, (), BASES[1], seed=1)
    for seed in (0, 1):
        write(tmp_path, RELU, FLIPPED[seed], seed=seed)
    cell, text = cell_of(tmp_path, "row-4")
    assert cell.difference.difference == pytest.approx(sum(FLIPPED[1]) / 4 - sum(BASES[1]) / 4)
    assert (cell.ours.trainings, cell.difference.trainings) == (2, 1)
    assert "(1 of 2 trainings)" in text


OTHER = "no training of the base row is equally long, with the same seed and episodes"


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (None, "the base row is not run"),
        ({"trained": {"step": 21}}, OTHER),
        ({"seed": 1}, OTHER),
        ({"changes": ("train.decode_samples=1",)}, OTHER),
        ({"data_fingerprint": 64 * "2"}, OTHER),
        ({"accuracies": [0.2, 0.4, 0.6]}, OTHER),
        ({"episodes_file": False}, "the accuracies of the episodes are not recorded"),
    ],
)
def test_reason_stands_in_the_place_of_a_difference(tmp_path, base, reason):
    write(tmp_path, RELU, FLIPPED[0])
    if base is not None:
        write(tmp_path, **({"changes": (), "accuracies": BASES[0]} | base))
    cell, text = cell_of(tmp_path, "row-4")
    assert cell.difference is None
    assert cell.no_difference == reason
    assert f"| {reason} |" in text


def test_row_is_compared_with_the_base_row_even_if_that_is_not_shown(tmp_path):
    write(tmp_path, (), BASES[0])
    write(tmp_path, RELU, FLIPPED[0])
    parts = select_rows(table_parts("flips"), ["row-4"])
    (row,) = table_document("flips", parts, read_result_folder(tmp_path), tmp_path).parts[0].rows
    assert row.cells[0].difference is not None


def test_page_shows_rows_with_results_and_reasons_and_counts_the_others(tmp_path):
    write(tmp_path, (), BASES[0])
    write(tmp_path, RELU, FLIPPED[0])
    lines = page_table(tmp_path, "flips,budget=60").splitlines()
    shown = [line.split("|")[1].strip("* ").split(":")[0] for line in lines if line.startswith("| **")]
    assert shown == ["paper's settings", "row 4", *(f"row {n}" for n in (5, 6, 7, 9, 10, *range(13, 19)))]
    assert "6 of 19 rows have no result yet." in lines
    assert any(line.startswith("Differences: percentage points above the base row") for line in lines)
    with pytest.raises(DataError, match="no row has a result"):
        page_table(tmp_path, "flips,budget=61")


def test_results_of_another_table_are_not_reported_as_near_to_a_row(tmp_path):
    write(tmp_path, RELU, FLIPPED[0])
    write(tmp_path, ("model.width=128",), FLIPPED[0])
    near = table_document(1, table_parts(1), read_result_folder(tmp_path), tmp_path).near
    assert near == ["model.width=128-seed0.json is not of omniglot-5way-paper: model.width is 128"]
