"""Which recorded results belong to a row of the paper's tables."""

import json

import pytest
from recorded_results import COLUMN, RECIPE, best_cell, found, write

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.paper_tables.match_results import differing_keys, read_result_folder, results_of
from metagmvae.evaluation.paper_tables.table_layout import markdown_document
from metagmvae.evaluation.paper_tables.table_structure import Recipe
from metagmvae.pipelines.records import DataError


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


def test_unknown_preset_has_no_results(tmp_path):
    write(tmp_path, "a.json")
    (item,) = read_result_folder(tmp_path).results
    assert differing_keys(Recipe("omniglot-nothing"), item.flat) is None
    assert differing_keys(Recipe(RECIPE.preset, ("model.width=128",)), item.flat) == ["model.width"]
    assert found(tmp_path, Recipe("omniglot-nothing")) == []


def test_damaged_result_is_named(tmp_path):
    write(tmp_path, "a.json", {"accuracy": 7})
    with pytest.raises(DataError, match=r"a\.json: accuracy = 7"):
        read_result_folder(tmp_path)
