"""Tables of the paper with our results: the cells, the document, and `metagmvae table`."""

import json
import statistics
from pathlib import Path

import pytest
from called_commands import answer_of, refusal_of
from recorded_results import best_cell, write

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.paper_tables.match_results import read_result_folder
from metagmvae.evaluation.paper_tables.paper_table import TableDocument, table_document
from metagmvae.evaluation.paper_tables.table_layout import markdown_document
from metagmvae.evaluation.paper_tables.table_rows import table_parts
from metagmvae.infra.cli import main


def test_cell_is_the_longest_training_and_the_mean_over_its_seeds(tmp_path):
    write(tmp_path, "short.json", {"accuracy": 0.99, "trained": {"step": 50}})
    for seed, accuracy in enumerate((0.80, 0.86, 0.83)):
        write(tmp_path, f"{seed}.json", {"accuracy": accuracy}, {"train.seed": seed})
    write(tmp_path, "older.json", {"accuracy": 0.5, "environment": {"time": "2020-01-01"}}, {"train.seed": 1})
    write(tmp_path, "1.json", {"accuracy": 0.86, "environment": {"time": "2026-01-01"}}, {"train.seed": 1})
    document, cell = best_cell(tmp_path)
    assert cell.ours.files == ["0.json", "2.json", "1.json"]
    assert cell.ours.trainings == 3
    assert cell.ours.accuracy == pytest.approx(0.83)
    assert cell.ours.spread == pytest.approx(statistics.stdev([0.80, 0.86, 0.83]))
    assert (cell.ours.pretrain_steps, cell.ours.steps, cell.full_steps) == (8000, 100, 100)
    assert (cell.ours.data_split, cell.ours.seconds) == ("Vinyals split", 30.0)
    line = next(line for line in markdown_document(document).splitlines() if "`omniglot-best`" in line)
    assert "| 83.00 ± 3.00 | not run |" in line
    assert "transductive, Vinyals split, 1,000 episodes, 3 trainings | 8,000 + 100 steps, 30 s |" in line


COSTS = ("train.decode_samples", "method.partitions", "train.precision")


@pytest.mark.parametrize(
    ("key", "preset", "costs", "shown"),
    [
        ("meta-gmvae", "omniglot-5way-paper", (32, 100, "float32"), []),
        ("meta-gmvae", "omniglot-5way-paper", (1, 10, "float32"), ["train.decode_samples=1 instead of 32"]),
        ("scratch", "omniglot-scratch", (7, 10, "float32"), []),
        ("cactus-maml", "omniglot-cactus-acai-maml", (7, 10, "float32"), ["method.partitions=10 instead of 100"]),
        (
            "protonets",
            "omniglot-protonets-oracle",
            (7, 10, "bfloat16"),
            ["train.precision=bfloat16 instead of float32"],
        ),
    ],
)
def test_compute_names_the_costs_that_are_not_those_of_the_row(tmp_path, key, preset, costs, shown):
    """Only those that the method uses: partitions of CACTUs, decoded samples of Meta-GMVAE."""
    tree = json.loads(load_settings(preset, [f"{k}={v}" for k, v in zip(COSTS, costs, strict=True)]).model_dump_json())
    mode = "transductive" if key == "meta-gmvae" else "inductive"
    write(tmp_path, "a.json", {"settings": tree, "mode": mode})
    document = table_document(1, table_parts(1), read_result_folder(tmp_path), tmp_path)
    row = next(row for row in document.parts[0].rows if row.key == key)
    assert row.cells[0].ours.costs == {
        k: v
        for k, v in zip(COSTS, costs, strict=True)
        if k == COSTS[2] or k == (COSTS[0] if key == "meta-gmvae" else COSTS[1] if "cactus" in key else "")
    }
    line = next(line for line in markdown_document(document).splitlines() if f"| `{preset}`" in line)
    (compute,) = line.split("|")[-2:-1]
    assert [note.strip() for note in compute.split(",") if "instead of" in note] == shown


def test_document_counts_every_cell_and_has_its_schema(tmp_path):
    budget = {"budget_s": 60.0, "trained": {"step": 9}, "environment": {"cores": 2, "processor": "X"}}
    write(tmp_path, "a.json", budget | {"ci95": 0.0123})
    (tmp_path / "bench.json").write_text("[]")
    answer = answer_of("table", "1", "--results", tmp_path, "--budget", "1m")
    document = TableDocument.model_validate(answer["document"])
    assert json.loads(document.model_dump_json()) == answer["document"]
    assert (document.cells, document.not_run, document.other_files) == (80, 79, ["bench.json"])
    assert [len(row.cells) for part in document.parts for row in part.rows] == [4] * 20
    assert "90.00 ± 1.23" in answer["table"]
    assert "8,000 + 9 of 100 steps, budget 60 s, 2 cores, X" in answer["table"]
    assert answer["table"].count("not run") == 79 + 1
    assert answer_of("table", "1", "--results", tmp_path, "--budget", "2m")["document"]["not_run"] == 80


def test_only_some_rows_are_shown(tmp_path):
    document = answer_of("table", "1", "--results", tmp_path, "--rows", "maml", "umtra")["document"]
    assert [[row["key"] for row in part["rows"]] for part in document["parts"]] == [["umtra", "maml"]] * 2
    assert len(answer_of("table", "2", "--results", tmp_path, "--rows", "vae")["document"]["parts"]) == 1


def test_cross_way_table_reads_several_ways_from_one_file(tmp_path, capsys):
    """As `metagmvae evaluate --ways 2 5 50 --record` writes them."""
    tree = json.loads(load_settings("omniglot-5way-paper").model_dump_json())
    rows = [
        {"way": way, "shot": 1, "query": 15, "episodes": 1000, "seed": 0, "mode": "transductive"}
        | {"accuracy": 1 - way / 100, "ci95": 0.001}
        for way in (2, 5, 50)
    ]
    content = {"rows": rows, "split": "test", "data_fingerprint": 64 * "1", "settings": tree}
    (tmp_path / "x.json").write_text(json.dumps(content | {"dataset": {"name": "omniglot"}}))
    assert main(["table", "2", "--results", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "| `omniglot-5way-paper` |" in line]
    accuracies = "98.00 ± 0.10 | 95.00 ± 0.10 | not run | not run | not run | not run | not run | 50.00 ± 0.10"
    assert [accuracies in line for line in lines] == [True, True]


def test_recorded_results_of_our_best_settings_are_in_table_1():
    folder = Path(__file__).parents[1] / "evaluation" / "results"
    _, cell = best_cell(folder)
    assert cell.ours is not None
    assert sorted(cell.ours.files) == [f"omniglot-best-seed{seed}-5way-1shot.json" for seed in range(3)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["3"], "table 3: the tables of the paper with results are 1, 2, 10"),
        (["1", "--results", "NONE"], "NONE: no such folder"),
        (["1", "--budget", "soon"], "--budget soon: write a time as 90s, 20m or 1h30m"),
        (["1", "--data", "NONE"], "no dataset.json there"),
        (["1", "--data", "DATA"], "is of glyphs, the table of mini-imagenet and omniglot"),
        (["1", "--rows", "mamel"], "--rows mamel: no such row; did you mean 'maml'?"),
        (["1", "--run"], "name the datasets with --data"),
        (["1", "--dry-run"], "--dry-run: says what --run would do"),
        (["1", "--set", "train.seed=1"], "is for the trainings of --run"),
        (["1", "--seeds", "1"], "--seeds 1: is for the trainings of --run"),
        (["some-model", "--seeds", "1"], "--seeds: is for a table of the paper"),
        (["some-model", "--budget", "5m"], "--budget: is for a table of the paper"),
        (["1", "--results", "BROKEN"], "not valid JSON"),
    ],
)
def test_wrong_request_is_one_error_line(data, tmp_path, capsys, words, message):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.json").write_text("{")
    names = {"NONE": tmp_path / "none", "DATA": data, "BROKEN": tmp_path / "broken"}
    words = [str(names.get(word, word)) for word in words]
    assert message.replace("NONE", str(names["NONE"])) in refusal_of("table", *words)
