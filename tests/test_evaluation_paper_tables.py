"""Tables of the paper: its numbers, which results belong to a row, and the table with both."""

import json
import statistics
from pathlib import Path

import pytest

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.fewshot.baselines import BASELINES
from metagmvae.evaluation.paper_tables.match_results import differing_keys, read_result_folder, results_of
from metagmvae.evaluation.paper_tables.paper_table import TableDocument, table_document
from metagmvae.evaluation.paper_tables.table_layout import markdown_document
from metagmvae.evaluation.paper_tables.table_rows import paper_tables, table_parts
from metagmvae.evaluation.paper_tables.table_structure import Column, Recipe
from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError

TABLE_1 = """
scratch 52.50 74.78 24.91 47.62 27.59 38.48 51.53 59.63
cactus-maml-bigan 58.18 78.66 35.56 58.62 36.24 51.28 61.33 66.91
cactus-protonets-bigan 54.74 71.69 33.40 50.62 36.62 50.16 59.56 63.27
cactus-maml 68.84 87.78 48.09 73.36 39.90 53.97 63.84 69.64
cactus-protonets 68.12 83.58 47.75 66.27 39.18 53.36 61.54 63.55
umtra 83.80 95.43 74.25 92.12 39.93 50.73 61.11 67.15
meta-gmvae 94.92 97.09 82.21 90.61 42.82 55.73 63.14 68.26
meta-gmvae-best 94.92 97.09 82.21 90.61 42.82 55.73 63.14 68.26
maml 94.46 98.83 84.60 96.29 46.81 62.13 71.03 75.54
protonets 98.35 99.58 95.31 98.81 46.56 62.29 70.05 72.04
"""
TABLE_2_LEFT = """
scratch 24.91 27.59
lr-simclr - 40.11
vae 69.68 -
vae-simclr - 38.40
meta-gmvae-ep 78.64 40.51
meta-gmvae-ep-set 81.65 41.13
meta-gmvae-ep-variance 80.94 40.92
meta-gmvae 82.21 42.82
maml 84.60 46.81
protonets 95.31 46.56
"""
TABLE_2_RIGHT_BY_WAY = """
2 98.26 98.00 98.36 98.23
5 94.92 94.57 93.93 94.01
10 89.87 89.99 89.10 89.30
15 85.11 85.12 85.36 85.33
20 81.38 81.11 82.21 81.98
30 77.80 77.42 78.40 77.24
40 73.76 73.15 74.03 73.56
50 70.92 70.85 69.86 70.02
"""
TABLE_10 = """
lr-simclr 40.11 - - -
vae-simclr 38.40 - - -
cactus-maml-simclr 40.39 52.35 61.09 64.89
umtra-simclr 40.85 51.47 61.03 67.30
meta-gmvae 42.82 55.73 63.14 68.26
"""
"""As in the text of the paper; the keys, the row of our best settings and `-` are ours. Table 10 repeats Table 2."""
RECIPE = Recipe("omniglot-best")
COLUMN = Column("omniglot", 5, 1)


def lines_of(text: str) -> list[tuple[str, list[float | None]]]:
    words = [line.split() for line in text.strip().splitlines()]
    return [(key, [None if value == "-" else float(value) for value in values]) for key, *values in words]


def numbers_of(part) -> list[tuple[str, list[float | None]]]:
    return [(row.key, [row.paper.get(column) for column in part.columns]) for row in part.rows]


def test_numbers_are_those_of_the_paper():
    tables = paper_tables()
    omniglot, mini_imagenet = map(numbers_of, tables[1])
    joined = [(key, [*left, *right]) for (key, left), (_, right) in zip(omniglot, mini_imagenet, strict=True)]
    assert joined == lines_of(TABLE_1)
    left, right = tables[2]
    assert numbers_of(left) == lines_of(TABLE_2_LEFT)
    by_way = lines_of(TABLE_2_RIGHT_BY_WAY)
    assert [column.way for column in right.columns] == [int(way) for way, _ in by_way]
    expected = [list(values) for values in zip(*(values for _, values in by_way), strict=True)]
    assert [values for _, values in numbers_of(right)] == expected
    assert numbers_of(tables[10][0]) == lines_of(TABLE_10)
    intervals = tables[1][0].rows[6].paper_ci95
    assert list(intervals.values()) == [0.42, 0.20, 0.44, 0.19]


def test_every_number_of_the_paper_has_settings_and_both_ways_of_training():
    for parts in paper_tables().values():
        for part in parts:
            assert len({row.key for row in part.rows}) == len(part.rows)
            for row in part.rows:
                assert row.paper.keys() <= row.recipes.keys()
    rows = {row.key: row for row in paper_tables()[1][0].rows}
    five, twenty = Column("omniglot", 5, 1), Column("omniglot", 20, 5)
    assert rows["meta-gmvae"].recipes[five].preset == "omniglot-5way-paper"
    assert rows["meta-gmvae"].recipes[twenty].preset == "omniglot-20way-paper"
    assert rows["umtra"].recipes[five] == Recipe("omniglot-umtra")
    assert rows["umtra"].recipes[twenty].overrides[0] == "method.way=20"
    assert rows["maml"].recipes[five] == rows["maml"].recipes[twenty] == Recipe("omniglot-maml-oracle")
    assert {key: row.mode for key, row in rows.items() if row.mode == "transductive"} == {
        "meta-gmvae": "transductive",
        "meta-gmvae-best": "transductive",
    }


def test_every_row_can_be_trained():
    """Its preset exists, and its changes are valid settings."""
    for parts in paper_tables().values():
        for recipe in {recipe for part in parts for row in part.rows for recipe in row.recipes.values()}:
            load_settings(recipe.preset, [*recipe.overrides, *recipe.adapt])


def test_umtra_of_table_10_is_pretrained_as_the_features_of_the_others():
    recipe = next(row for row in paper_tables()[10][0].rows if row.key == "umtra-simclr").recipes
    (settings,) = {load_settings(r.preset, r.overrides) for r in recipe.values()}
    simclr = load_settings("mini-imagenet-simclr-paper")
    assert settings.pretrain == simclr.pretrain
    assert settings.model == simclr.model


def test_ablations_change_one_component_each():
    """By the settings that result: layers of set attention, covariance in both uses, prior."""
    rows = {row.key: row for row in paper_tables()[2][0].rows}

    def parts(key: str, dataset: str, way: int) -> tuple[bool, bool, bool]:
        recipe = rows[key].recipes[Column(dataset, way, 1)]
        settings = load_settings(recipe.preset, [*recipe.overrides, *recipe.adapt])
        assert settings.adapt.e_step == settings.adapt.final_covariance
        return settings.train.prior == "mixture", settings.model.layers > 0, settings.adapt.e_step == "diagonal"

    for dataset, way in (("omniglot", 20), ("mini-imagenet", 5)):
        assert parts("meta-gmvae-ep", dataset, way) == (True, False, False)
        assert parts("meta-gmvae-ep-set", dataset, way) == (True, True, False)
        assert parts("meta-gmvae-ep-variance", dataset, way) == (True, False, True)
        assert parts("meta-gmvae", dataset, way) == (True, True, True)
    assert parts("vae-simclr", "mini-imagenet", 5) == (False, False, False)


def write(folder: Path, name: str, changes: dict | None = None, settings: dict | None = None) -> None:
    """A result of the recipe; `settings` by dotted name, None: the key is missing, as in an older file."""
    tree = json.loads(load_settings(RECIPE.preset).model_dump_json())
    for dotted, value in (settings or {}).items():
        section, key = dotted.split(".")
        tree[section][key] = value
        if value is None:
            del tree[section][key]
    task = {"way": 5, "shot": 1, "query": 15, "episodes": 1000, "seed": 0, "mode": "transductive"}
    content = {"accuracy": 0.9, "ci95": 0.01, **task, "split": "test", "data_fingerprint": 64 * "1"}
    content |= {"dataset": {"name": "omniglot", "options": {"split": "vinyals"}}}
    content |= {"settings": {key: tree[key] for key in ("model", "adapt", "pretrain", "train")}}
    content |= {"trained": {"stage": "meta", "step": 100, "elapsed_s": 30.0}}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content | (changes or {})))


def found(folder: Path, recipe: Recipe = RECIPE, column: Column = COLUMN, **options) -> list[str]:
    rows = results_of(read_result_folder(folder), recipe, column, "transductive", **options)
    return [item.file for item, _ in rows]


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({}, {"train.steps": 7, "pretrain.steps": 3, "train.seed": 5, "train.precision": "bfloat16"}),
        ({}, {"train.prior": None, "model.normalise": None}),
        ({"trained": {"step": 3}, "budget_s": 60.0}, {}),
    ],
)
def test_result_of_the_settings_of_a_row_is_found_whatever_its_file_is_named(tmp_path, changes, settings):
    write(tmp_path, "anything.json", changes, settings)
    assert found(tmp_path) == ["anything.json"]


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {"model.width": 128}),
        ({}, {"train.prior": "normal"}),
        ({}, {"adapt.temperature": 1.0}),
        ({}, {"pretrain.temperature": 0.5}),
        ({}, {"pretrain.steps": 0}),
        ({"mode": "inductive"}, {}),
        ({"split": "validation"}, {}),
        ({"query": 5}, {}),
        ({"unbalanced": True}, {}),
        ({"dirichlet": 2.0}, {}),
        ({"way": 20}, {}),
        ({"dataset": {"name": "glyphs"}}, {}),
        ({"rows": [{"accuracy": 0.9, "open_classes": 5}]}, {}),
    ],
)
def test_result_of_other_settings_or_tasks_is_not_found(tmp_path, changes, settings):
    write(tmp_path, "omniglot-best-5way-5way-1shot.json", changes, settings)
    assert found(tmp_path) == []


def test_result_that_differs_in_one_setting_is_named(tmp_path):
    write(tmp_path, "one.json", {}, {"model.width": 128})
    write(tmp_path, "two.json", {}, {"model.width": 128, "model.heads": 8})
    write(tmp_path, "right.json")
    write(tmp_path, "other-adaptation.json", {}, {"adapt.samples": 3})
    document, _ = best_cell(tmp_path)
    (line,) = document.near[:1]
    assert line == "one.json is not of omniglot-best: model.width is 128"
    assert {text.split()[0] for text in document.near} == {"one.json"}
    assert "Not shown: one.json is not of omniglot-best: model.width is 128." in markdown_document(document)


def test_results_are_limited_to_data_and_budget(tmp_path):
    write(tmp_path, "a.json", {"budget_s": 60.0})
    (item,) = read_result_folder(tmp_path).results
    assert found(tmp_path, data=[item.result.images], budget_s=60.0) == ["a.json"]
    assert found(tmp_path, budget_s=300.0) == []
    other = item.result.images.model_copy(update={"options": {"split": "1200-100-323"}})
    assert found(tmp_path, data=[other]) == []


def test_training_on_stored_features_counts_with_the_training_of_their_encoder(tmp_path):
    pretrain = json.loads(load_settings(RECIPE.preset).model_dump_json())["pretrain"]
    encoder = {"encoder": {"sha256": "0", "trained": {"by": "a run of its own", "pretrain": pretrain}}}
    write(tmp_path, "a.json", encoder, {"pretrain.steps": 0})
    assert found(tmp_path) == ["a.json"]
    pretrain["temperature"] = 0.5
    write(tmp_path, "a.json", encoder, {"pretrain.steps": 0})
    assert found(tmp_path) == []


def test_baseline_on_the_features_of_a_row(tmp_path):
    task = {"way": 5, "shot": 1, "query": 15, "episodes": 1000, "seed": 0}
    baselines = [
        {"baseline": name, "accuracy": accuracy, "ci95": 0.02, "mode": "inductive", **task}
        for name, accuracy in (("logistic regression", 0.7), ("nearest class mean", 0.6))
    ]
    write(tmp_path, "a.json", {"baselines": baselines})
    recipe = Recipe(RECIPE.preset, baseline="logistic regression")
    ((_, row),) = results_of(read_result_folder(tmp_path), recipe, COLUMN, "inductive")
    assert row.accuracy == 0.7
    assert results_of(read_result_folder(tmp_path), recipe, COLUMN, "transductive") == []


def test_baselines_of_the_rows_are_those_that_evaluate_gives_their_models():
    """A model that does not scale its features has no baselines on unscaled ones."""
    rows = [row for parts in paper_tables().values() for part in parts for row in part.rows]
    recipes = {recipe for row in rows for recipe in row.recipes.values() if recipe.baseline}
    assert recipes
    for recipe in recipes:
        assert load_settings(recipe.preset, recipe.overrides).model.features == "raw"
        assert recipe.baseline in BASELINES


def test_unknown_preset_has_no_results(tmp_path):
    write(tmp_path, "a.json")
    (item,) = read_result_folder(tmp_path).results
    assert differing_keys(Recipe("omniglot-nothing"), item.flat) is None
    assert differing_keys(Recipe(RECIPE.preset, ("model.width=128",)), item.flat) == ["model.width"]
    assert found(tmp_path, Recipe("omniglot-nothing")) == []


def best_cell(folder: Path, **options):
    document = table_document(1, table_parts(1), read_result_folder(folder), folder, **options)
    row = next(row for row in document.parts[0].rows if row.key == "meta-gmvae-best")
    return document, row.cells[0]


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


def test_document_counts_every_cell_and_has_its_schema(tmp_path, capsys):
    budget = {"budget_s": 60.0, "trained": {"step": 9}, "environment": {"cores": 2, "processor": "X"}}
    write(tmp_path, "a.json", budget | {"ci95": 0.0123})
    (tmp_path / "bench.json").write_text("[]")
    assert main(["table", "1", "--results", str(tmp_path), "--budget", "1m", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    document = TableDocument.model_validate(answer["document"])
    assert json.loads(document.model_dump_json()) == answer["document"]
    assert (document.cells, document.not_run, document.other_files) == (80, 79, ["bench.json"])
    assert [len(row.cells) for part in document.parts for row in part.rows] == [4] * 20
    assert "90.00 ± 1.23" in answer["table"]
    assert "8,000 + 9 of 100 steps, budget 60 s, 2 cores, X" in answer["table"]
    assert answer["table"].count("not run") == 79 + 1
    assert main(["table", "1", "--results", str(tmp_path), "--budget", "2m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["document"]["not_run"] == 80


def test_only_some_rows_are_shown(tmp_path, capsys):
    assert main(["table", "1", "--results", str(tmp_path), "--rows", "maml", "umtra", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["document"]
    assert [[row["key"] for row in part["rows"]] for part in document["parts"]] == [["umtra", "maml"]] * 2
    assert main(["table", "2", "--results", str(tmp_path), "--rows", "vae", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["document"]["parts"]) == 1


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
    assert main(["table", *words]) == 2
    error = capsys.readouterr().err
    assert message.replace("NONE", str(names["NONE"])) in error
    assert error.count("\n") == 1


def test_damaged_result_is_named(tmp_path):
    write(tmp_path, "a.json", {"accuracy": 7})
    with pytest.raises(DataError, match=r"a\.json: accuracy = 7"):
        read_result_folder(tmp_path)
