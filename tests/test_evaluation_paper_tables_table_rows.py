"""The rows of the paper's tables: its numbers, and the settings of each row."""

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.fewshot.baselines import BASELINES
from metagmvae.evaluation.paper_tables.table_rows import paper_tables
from metagmvae.evaluation.paper_tables.table_structure import Column, Recipe

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
    simclr = load_settings("mini-imagenet-simclr-paper")
    for settings in (load_settings(r.preset, r.overrides) for r in recipe.values()):
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


def test_baselines_of_the_rows_are_those_that_evaluate_gives_their_models():
    """A model that does not scale its features has no baselines on unscaled ones."""
    rows = [row for parts in paper_tables().values() for part in parts for row in part.rows]
    recipes = {recipe for row in rows for recipe in row.recipes.values() if recipe.baseline}
    assert recipes
    for recipe in recipes:
        assert load_settings(recipe.preset, recipe.overrides).model.features == "raw"
        assert recipe.baseline in BASELINES
