"""The rows of Tables 1, 2 and 10 of the paper: its numbers, and the settings with which each row is trained here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from metagmvae.evaluation.comparison.paper import BY_REF, CROSS_WAYS, TASKS, DatasetName
from metagmvae.evaluation.comparison.result_files import EvalMode
from metagmvae.evaluation.comparison.results_table import TITLES
from metagmvae.evaluation.paper_tables.flip_rows import flip_parts
from metagmvae.evaluation.paper_tables.table_structure import Column, Recipe, TableName, TablePart, TableRow
from metagmvae.pipelines.records import DataError

NO_VARIANCE = ("adapt.e_step=identity", "adapt.final_covariance=identity")
"""EM with identity covariance, also in the final posterior: without the component sigma^2 of Table 2."""
NO_SET = ("model.layers=0",)
"""The posterior of a point does not depend on its set: without the component Set of Table 2."""
NORMAL_PRIOR = ("train.prior=normal",)
"""Without episodes: the component Ep of Table 2."""
UMTRA_20_WAYS = ("method.way=20", "method.inner_rate=0.1", "method.inner_steps=5")
"""As Finn et al. (2017) train MAML for 20-way tasks of Omniglot. The other methods have one training for all tasks."""
PERCEPTRON = ("method.network=mlp", "model.encoder=conv5")
"""A perceptron on features of Conv5. CACTUs reads stored ones; UMTRA encodes views, so it trains the encoder too."""
SIMCLR = (
    "pretrain.steps=30000",
    "pretrain.batch=512",
    "pretrain.crops=torchvision",
    "pretrain.projector=[256, 128]",
    "pretrain.temperature=0.5",
    "pretrain.optimizer=adam",
    "pretrain.weight_decay=0.0",
    "pretrain.learning_rate=1e-4",
    "pretrain.schedule=constant",
)
"""The pre-training of the preset mini-imagenet-simclr-paper."""
LOGISTIC_REGRESSION = "logistic regression"
"""A baseline on the features of mini-imagenet-paper, which the model does not scale."""
EMBEDDING: dict[DatasetName, str] = {"omniglot": "acai", "mini-imagenet": "deepcluster"}
"""The second embedding of CACTUs, beside BiGAN."""
BEST: dict[DatasetName, tuple[str, str]] = {
    "omniglot": ("omniglot-best", "omniglot-best"),
    "mini-imagenet": ("mini-imagenet-cpu", "mini-imagenet-cpu"),
}
"""Our best settings of Meta-GMVAE for 5 and for 20 ways."""
PAPER: dict[DatasetName, tuple[str, str]] = {
    "omniglot": ("omniglot-5way-paper", "omniglot-20way-paper"),
    "mini-imagenet": ("mini-imagenet-paper", "mini-imagenet-paper"),
}
"""The paper's settings of Meta-GMVAE for 5 and for 20 ways."""


def paper_tables() -> dict[TableName, tuple[TablePart, ...]]:
    """Return the parts of each table by its name."""
    return {
        1: (_table_1("omniglot"), _table_1("mini-imagenet")),
        2: (_ablations(), _cross_way()),
        10: (_table_10(),),
        "flips": flip_parts(),
    }


def table_parts(name: TableName) -> tuple[TablePart, ...]:
    """Return the parts of a table.

    Raises:
        DataError: no table of this name has results.
    """
    tables = paper_tables()
    if name not in tables:
        raise DataError(f"table {name}: the tables of the paper with results are {', '.join(map(str, tables))}")
    return tables[name]


def _table_1(dataset: DatasetName) -> TablePart:
    columns = tuple(Column(dataset, *task) for task in TASKS[dataset])
    deep = EMBEDDING[dataset]

    def row(key: str, preset: str, twenty_ways: tuple[str, ...] = ()) -> TableRow:
        return _row(key, columns, {dataset: Recipe(f"{dataset}-{preset}")}, twenty_ways)

    rows = (
        row("scratch", "scratch"),
        row("cactus-maml-bigan", "cactus-bigan-maml"),
        row("cactus-protonets-bigan", "cactus-bigan-protonets"),
        row("cactus-maml", f"cactus-{deep}-maml"),
        row("cactus-protonets", f"cactus-{deep}-protonets"),
        row("umtra", "umtra", UMTRA_20_WAYS),
        _meta_gmvae(columns, PAPER),
        replace(_meta_gmvae(columns, BEST), key="meta-gmvae-best", name="Meta-GMVAE, our best settings"),
        row("maml", "maml-oracle"),
        row("protonets", "protonets-oracle"),
    )
    return TablePart(TITLES[dataset], columns, rows)


def _ablations() -> TablePart:
    columns = (Column("omniglot", 20, 1), Column("mini-imagenet", 5, 1))
    paper = {dataset: Recipe(presets[1]) for dataset, presets in PAPER.items()}

    def changed(key: str, overrides: tuple[str, ...], adapt: tuple[str, ...] = ()) -> TableRow:
        recipes = {name: replace(recipe, overrides=overrides, adapt=adapt) for name, recipe in paper.items()}
        return _row(key, columns, recipes)

    def both(key: str, preset: str) -> TableRow:
        return _row(key, columns, {name: Recipe(f"{name}-{preset}") for name in paper})

    features = "mini-imagenet-paper"
    rows = (
        both("scratch", "scratch"),
        _row("lr-simclr", columns, {"mini-imagenet": Recipe(features, baseline=LOGISTIC_REGRESSION)}),
        _row("vae", columns, {"omniglot": Recipe("omniglot-vae")}),
        _row("vae-simclr", columns, {"mini-imagenet": _vae_on_features()}),
        changed("meta-gmvae-ep", NO_SET, NO_VARIANCE),
        changed("meta-gmvae-ep-set", (), NO_VARIANCE),
        changed("meta-gmvae-ep-variance", NO_SET),
        replace(changed("meta-gmvae", ()), name="Meta-GMVAE: Ep, Set, \N{GREEK SMALL LETTER SIGMA}\N{SUPERSCRIPT TWO}"),
        both("maml", "maml-oracle"),
        both("protonets", "protonets-oracle"),
    )
    return TablePart("Ablation study", columns, rows)


def _cross_way() -> TablePart:
    """Our models are trained for a number of ways only; so the rows for 1 and for 5 shots are one training."""
    columns = tuple(Column("omniglot", way, 1) for way in CROSS_WAYS)
    trained = {"5way": PAPER["omniglot"][0], "20way": PAPER["omniglot"][1]}
    rows = tuple(
        _row(f"meta-gmvae-{way}-{shot}", columns, {"omniglot": Recipe(preset)})
        for way, preset in trained.items()
        for shot in ("1shot", "5shot")
    )
    return TablePart("Cross-way 1-shot classification on Omniglot", columns, rows)


def _table_10() -> TablePart:
    columns = tuple(Column("mini-imagenet", *task) for task in TASKS["mini-imagenet"])
    recipes = {
        "lr-simclr": Recipe("mini-imagenet-paper", baseline=LOGISTIC_REGRESSION),
        "vae-simclr": _vae_on_features(),
        "cactus-maml-simclr": Recipe("mini-imagenet-cactus-deepcluster-maml", (*PERCEPTRON, "pretrain.steps=0")),
        "umtra-simclr": Recipe("mini-imagenet-umtra", (*PERCEPTRON, "model.channels=64", *SIMCLR)),
        "meta-gmvae": Recipe("mini-imagenet-paper"),
    }
    rows = tuple(_row(key, columns, {"mini-imagenet": recipe}) for key, recipe in recipes.items())
    return TablePart("Mini-ImageNet, on SimCLR's features", columns, rows)


def _vae_on_features() -> Recipe:
    return Recipe("mini-imagenet-paper", NORMAL_PRIOR + NO_SET, NO_VARIANCE)


def _meta_gmvae(columns: Sequence[Column], presets: Mapping[DatasetName, tuple[str, str]]) -> TableRow:
    chosen = {name: Recipe(five) for name, (five, _) in presets.items()}
    twenty = {name: Recipe(twenty) for name, (_, twenty) in presets.items()}
    row = _row("meta-gmvae", columns, chosen)
    return replace(row, recipes={c: (twenty if c.way == 20 else chosen)[_name(c)] for c in columns})


def _row(
    key: str, columns: Iterable[Column], recipes: Mapping[DatasetName, Recipe], twenty_ways: tuple[str, ...] = ()
) -> TableRow:
    """Return a row with the numbers of the paper's row of this key.

    `twenty_ways` are changes of the recipes, which are given by dataset, for tasks of 20 ways.
    """
    used = {column: recipes[_name(column)] for column in columns if column.dataset in recipes}
    if twenty_ways:
        used = {c: replace(recipe, overrides=twenty_ways) if c.way == 20 else recipe for c, recipe in used.items()}
    published = [row for row in BY_REF.values() if row.key == key]

    def printed(numbers: str) -> dict[Column, float]:
        return {
            column: getattr(row, numbers)[column.way, column.shot]
            for column in columns
            for row in published
            if row.dataset == column.dataset and (column.way, column.shot) in getattr(row, numbers)
        }

    mode: EvalMode = "transductive" if key.startswith(("meta-gmvae", "vae")) else "inductive"
    return TableRow(key, published[0].name, mode, printed("percent"), printed("ci95"), used)


def _name(column: Column) -> DatasetName:
    return "omniglot" if column.dataset == "omniglot" else "mini-imagenet"
