"""Tables of result files: the recorded dataset decides the table, and rows say how their results came about."""

import json
from pathlib import Path

import pytest

from metagmvae.evaluation.comparison.record_tables import (
    ablation_table,
    bench_table,
    curve_table,
    promotion_table,
    sweep_table,
)
from metagmvae.evaluation.comparison.results_table import calibration_table, paired_table, results_table
from metagmvae.evaluation.provenance import KNOWN_DATASETS, dataset_origin, known_dataset
from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError

RESULTS = Path(__file__).parents[1] / "evaluation" / "results"
OWN, VINYALS = "b3ccb69f" + "5b50" + 52 * "0", "e2d747e8" + "398e" + 52 * "0"
PAIR = {"baseline": "soft k-means", "baseline_mode": "transductive", "way": 5, "shot": 1, "difference": -0.0013}


def write(folder: Path, name: str, **changes: object) -> None:
    task = {"way": 5, "shot": 1, "query": 15, "episodes": 100, "seed": 0, "mode": "transductive"}
    result = {"accuracy": 0.9, "ci95": 0.01, **task, "split": "test", "data_fingerprint": 64 * "1"} | changes
    (folder / f"{name}-{result['way']}way-{result['shot']}shot.json").write_text(json.dumps(result))


def row(table: str, start: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(f"| {start}"))


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"dataset": {"name": "glyphs"}}, "glyphs"),
        ({"dataset": {"name": "folder"}}, "folder"),
        ({}, "dataset 11111111"),
    ],
)
def test_other_datasets_are_no_omniglot_whatever_the_result_is_named(tmp_path, changes, title):
    write(tmp_path, "omniglot-cpu", **changes)
    write(tmp_path, "omniglot-cpu", way=3, **changes)
    assert results_table(tmp_path, ["omniglot-cpu"]).splitlines() == [
        f"| {title} (way,shot) | (3,1) | (5,1) |",
        "| --- | --- | --- |",
        "| **`omniglot-cpu`** (transductive) | 90.00 ± 1.00 | 90.00 ± 1.00 |",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": {"name": "omniglot", "options": {"split": "vinyals"}}}, "(transductive, Vinyals split)"),
        ({"dataset": {"name": "omniglot", "options": {"split": "1200-100-323"}}}, "(transductive, own split)"),
        ({"data_fingerprint": OWN}, "(transductive, own split)"),
        ({"data_fingerprint": VINYALS}, "(transductive, Vinyals split)"),
        (
            {"data_fingerprint": OWN, "trained": {"selected_by": "validation/5w1s"}},
            "(transductive, own split, checkpoint chosen with validation labels)",
        ),
    ],
)
def test_row_names_the_split_and_a_choice_by_labels(tmp_path, changes, words):
    write(tmp_path, "mine", **changes)
    table = results_table(tmp_path, ["mine"])
    assert row(table, "**`mine`**") == f"| **`mine`** {words} | 90.00 ± 1.00 |  |  |  |"
    assert row(table, "Omniglot")
    assert row(table, "paper: Meta-GMVAE").endswith("| 94.92 | 97.09 | 82.21 | 90.61 |")


def test_row_of_files_of_different_trainings_says_so(tmp_path):
    for way in (3, 5):
        write(tmp_path, "mine", way=way, settings_fingerprint=f"{way}")
    assert row(results_table(tmp_path, ["mine"]), "**`mine`**").startswith(
        "| **`mine`** (transductive, columns of different trainings)"
    )


def test_results_of_two_datasets_make_no_table(tmp_path, capsys):
    write(tmp_path, "omniglot-a", dataset={"name": "omniglot"})
    write(tmp_path, "omniglot-b", dataset={"name": "glyphs"})
    assert main(["table", "omniglot-a", "omniglot-b", "--results", str(tmp_path)]) == 2
    assert "omniglot-a is of omniglot, omniglot-b is of glyphs: name the results of one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "contains [], but a table of keys and values is needed"),
        ("{}", "accuracy is missing"),
        ('{"accuracy": "high"}', 'accuracy = "high": input should be a valid number'),
        ("7", "contains 7, but a table of keys and values is needed"),
        ('{"rows": [7]}', "rows.0 = 7: a table of keys and values is needed"),
        ('{"rows": 7}', "rows = 7: input should be a valid list"),
        ('{"rows": []}', "rows = []: list should have at least 1 item"),
        ('{"rows": [{"way": []}]}', "accuracy is missing"),
    ],
)
def test_file_that_is_no_result_is_one_line(tmp_path, content, reason):
    (tmp_path / "a-5way-1shot.json").write_text(content)
    with pytest.raises(DataError) as error:
        results_table(tmp_path, ["a"])
    line = str(error.value)
    assert line.startswith(f"{tmp_path}/a-5way-1shot.json: {reason}")
    assert line.endswith("so it is not a result of `metagmvae evaluate --record`")


@pytest.mark.parametrize(
    ("table", "file", "good"),
    [
        (ablation_table, "ablation-x.json", {"rows": [{"name": "a", "results": [{"way": 5}]}]}),
        (curve_table, "x-curve.json", {"validation": [{"global_step": 1}]}),
        (promotion_table, "promotion-x.json", {"tasks": [{"task": "5w1s"}]}),
        (sweep_table, "sweep-x.json", {"importance": {"settings": [{"names": []}]}}),
        (lambda results, name: bench_table(results, "step"), "bench-step.json", {"rows": [7]}),
    ],
)
def test_a_record_of_the_wrong_type_is_one_line(tmp_path, table, file, good):
    for content in ([], 7, None, {}, {"rows": 7, "tasks": 7, "validation": 7, "importance": 7, "profile": 7}, good):
        (tmp_path / file).write_text(json.dumps(content))
        with pytest.raises(DataError, match=f"{file}: .*so it is not a record of this kind") as error:
            table(tmp_path, "x")
        assert "\n" not in str(error.value)


def test_file_of_another_task_than_its_name_says_is_refused(tmp_path):
    write(tmp_path, "a", way=3)
    (tmp_path / "a-3way-1shot.json").rename(tmp_path / "a-5way-1shot.json")
    with pytest.raises(
        DataError, match=r"a-5way-1shot.json: its result is of \(3,1\), not as its name says; rename it"
    ):
        results_table(tmp_path, ["a"])


def test_one_file_may_hold_several_tasks_and_trainings_a_file_each(tmp_path):
    write(tmp_path, "a-seed0", shot=1, accuracy=0.8)
    write(tmp_path, "a-seed0", shot=5, accuracy=0.9)
    result = json.loads((tmp_path / "a-seed0-5way-1shot.json").read_text())
    rows = [result | {"shot": 1, "accuracy": 0.82}, result | {"shot": 5, "accuracy": 0.96}]
    (tmp_path / "a-seed1.json").write_text(json.dumps(result | {"rows": rows}))
    table = results_table(tmp_path, ["a"])
    assert row(table, "**`a`**") == "| **`a`** (transductive, 2 trainings) | 81.00 ± 1.41 | 93.00 ± 4.24 |"
    write(tmp_path, "a-seed1", shot=5, accuracy=0.9)
    with pytest.raises(DataError, match=r"a-seed1.json: another file has a result of \(5,5\) too; remove one of them"):
        results_table(tmp_path, ["a"])


def test_baselines_with_default_settings_are_marked(tmp_path):
    common = {"accuracy": 0.8, "ci95": 0.02, "shot": 1, "query": 15, "episodes": 100, "seed": 0, "mode": "inductive"}
    baselines = [
        {"baseline": "A", "way": 5, **common},
        {"baseline": "B", "way": 5, "settings": {"strength": 10.0}, "validation_accuracy": 0.7, **common},
    ]
    write(tmp_path, "a", baselines=baselines)
    lines = results_table(tmp_path, ["a+"]).splitlines()
    assert lines[3:] == ["| A (inductive, untuned) | 80.00 ± 2.00 |", "| B (inductive) | 80.00 ± 2.00 |"]


def test_paired_table_shows_differences_and_the_settings_of_the_baselines(tmp_path):
    task = {"way": 5, "shot": 1, "query": 15, "episodes": 100, "seed": 0, "mode": "transductive"}
    settings = {"temperature": 24.0, "features": "scaled"}
    baseline = {"baseline": "soft k-means", "accuracy": 0.8, "ci95": 0.02, **task, "settings": settings}
    write(tmp_path, "a", baselines=[baseline], paired=[PAIR | {"ci95": 0.0004}])
    assert paired_table(tmp_path, "a").splitlines() == [
        "| model minus baseline | (5,1) | (5,1): settings |",
        "| --- | --- | --- |",
        "| soft k-means (transductive) | \N{MINUS SIGN}0.13 ± 0.04 | temperature 24, scaled |",
    ]
    write(tmp_path, "b")
    with pytest.raises(DataError, match="hold no differences; evaluate with --baselines"):
        paired_table(tmp_path, "b")


def test_calibration_table_shows_the_map_and_older_files_without_a_uniform_part(tmp_path):
    fitted = {"ece": 0.0123, "ece_uncalibrated": 0.2, "temperature": 0.5}
    write(tmp_path, "new", **fitted, uniform=0.034)
    write(tmp_path, "old", **fitted)
    new, old = calibration_table(tmp_path, "new,old").splitlines()[2:]
    assert new.endswith("| 20.00 | 1.23 | 0.50 | 3.40 |")
    assert old.endswith("| 20.00 | 1.23 | 0.50 | 0.00 |")


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*way-*shot.json")), ids=lambda file: file.stem)
def test_every_recorded_result_has_a_known_dataset(file):
    content = json.loads(file.read_text())
    dataset = content.get("dataset") or known_dataset(content["data_fingerprint"], content["source_fingerprint"])
    assert dataset["name"] in ("omniglot", "mini-imagenet")
    assert ("vinyals" in file.stem) == (dataset.get("options", {}).get("split") == "vinyals")


def test_origin_of_a_dataset_is_recorded_or_known_by_its_fingerprint():
    options = {"split": "vinyals", "size": 28}
    images = {"name": "omniglot", "source_fingerprint": 64 * "2", "options": options}
    assert dataset_origin(images, 64 * "3") == {"name": "omniglot", "options": options}
    features = {"name": "omniglot features", "source_fingerprint": 64 * "4", "images": images}
    assert dataset_origin(features, 64 * "3") == {"name": "omniglot", "options": options}
    source = next(iter(KNOWN_DATASETS)) + 52 * "0"
    assert dataset_origin({"name": "omniglot", "source_fingerprint": source}, 64 * "3") == known_dataset(source)
    assert dataset_origin({"name": "glyphs", "source_fingerprint": 64 * "5"}, 64 * "3") == {"name": "glyphs"}
