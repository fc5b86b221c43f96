"""The differences between the paper and its published code, each flipped alone from the paper's settings for Omniglot.

The guide of `training` lists the settings of both (Paper and published code).
"""

from __future__ import annotations

from dataclasses import dataclass

from metagmvae.evaluation.comparison.paper import BY_REF
from metagmvae.evaluation.paper_tables.table_structure import Column, Recipe, TablePart, TableRow

COLUMNS = (Column("omniglot", 5, 1), Column("omniglot", 5, 5))
BASE = Recipe("omniglot-5way-paper")
ONLY_MINI_IMAGENET = "differs for Mini-ImageNet only"


@dataclass(frozen=True)
class _Flip:
    """A difference, and the changes that give the base row this difference; without changes, the reason for that."""

    words: str
    overrides: tuple[str, ...] = ()
    adapt: tuple[str, ...] = ()
    reason: str = ""


FLIPS = {
    1: _Flip("identity covariance in the E-steps of a task", adapt=("adapt.e_step=identity",)),
    2: _Flip("attention scale 1/\N{SQUARE ROOT}width, not of a head", ("model.attention_scale=model",)),
    3: _Flip("set attention block, not a transformer layer", ("model.attention_block=set-attention",)),
    4: _Flip("ReLU in the attention block, not ELU", ("model.attention_activation=relu",)),
    5: _Flip("latent size", reason=ONLY_MINI_IMAGENET),
    6: _Flip("decoder variance", reason=ONLY_MINI_IMAGENET),
    7: _Flip("learning rate of SimCLR", reason=f"{ONLY_MINI_IMAGENET}: Omniglot has no pre-training"),
    8: _Flip("weight decay 1e-6, not 0", ("train.weight_decay=1e-6",)),
    9: _Flip("iterations", reason=ONLY_MINI_IMAGENET),
    10: _Flip("sizes for 50 shots", reason=ONLY_MINI_IMAGENET),
    11: _Flip("objective: mean over the points of a set, not sum", ("train.objective_scale=mean",)),
    12: _Flip("one variance for each point, as the text of the paper says", ("model.posterior=isotropic",)),
    13: _Flip(
        "checkpoint chosen with validation labels, not the last (train.selection)",
        reason="under a budget there is one validation, at the end, so that the best checkpoint is the last",
    ),
    14: _Flip("seeds", reason="neither has one; --seeds trains each row with several"),
    15: _Flip("cross-way", reason="impossible in the published code: its weights of EM have the size K; see Table 2"),
    16: _Flip("ablations, Figures 3 and 4, SimCLR with logistic regression", reason="no setting of a training"),
    17: _Flip(
        "guards of EM for empty classes and a variance of 0",
        reason="the published code has none: without them EM gives NaN where they act, and the same elsewhere",
    ),
    18: _Flip("input of SimCLR's network", reason=f"{ONLY_MINI_IMAGENET}: Omniglot has no pre-training"),
}
"""By the number of the difference. Rows 1 to 11 take the value of the published code, row 12 that of the text."""


def flip_parts() -> tuple[TablePart, ...]:
    """Return the rows: the paper's settings, and each difference alone."""
    published = BY_REF["paper:omniglot/meta-gmvae"]
    percent, ci95 = (
        {column: numbers[column[1:]] for column in COLUMNS} for numbers in (published.percent, published.ci95)
    )
    base = TableRow("base", "paper's settings", "transductive", percent, ci95, dict.fromkeys(COLUMNS, BASE))
    flips = tuple(
        TableRow(
            f"row-{number}",
            f"row {number}: {flip.words}",
            "transductive",
            {},
            {},
            {} if flip.reason else dict.fromkeys(COLUMNS, Recipe(BASE.preset, flip.overrides, flip.adapt)),
            flip.reason,
        )
        for number, flip in FLIPS.items()
    )
    title = "Differences between the paper and its published code, each alone, on Omniglot"
    return (TablePart(title, COLUMNS, (base, *flips), base),)
