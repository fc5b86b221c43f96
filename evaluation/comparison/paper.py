"""Accuracies printed in Lee et al. (ICLR 2021), with the evaluation protocol as far as the paper states it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from metagmvae.configs.suggestions import suggestion
from metagmvae.evaluation.comparison.formatting import Task
from metagmvae.pipelines.records import DataError

DatasetName = Literal["omniglot", "mini-imagenet"]

TASKS: dict[DatasetName, tuple[Task, ...]] = {
    "omniglot": ((5, 1), (5, 5), (20, 1), (20, 5)),
    "mini-imagenet": ((5, 1), (5, 5), (5, 20), (5, 50)),
}
"""Columns of Table 1."""
DATA: dict[DatasetName, str] = {
    "omniglot": "Omniglot, the authors' own 1200-100-323 split",
    "mini-imagenet": "Mini-ImageNet, split of Ravi & Larochelle",
}


@dataclass(frozen=True)
class PublishedResult:
    """One row of a table of the paper."""

    dataset: DatasetName
    key: str
    """The reference of the row is `paper:DATASET/KEY`."""
    name: str
    where: str
    percent: dict[Task, float]
    ci95: dict[Task, float]
    """Half widths of 95% confidence intervals over 1,000 episodes in percent; only Table 5 prints them."""
    mode: Literal["transductive"] | None
    """None: the paper does not state it for the methods that it compares with."""
    query: int | None
    """Queries per class; None: not stated."""

    @property
    def ref(self) -> str:
        """Reference on the command line: `paper:DATASET/KEY`."""
        return f"paper:{self.dataset}/{self.key}"

    def values(self, tasks: Sequence[Task]) -> tuple[float, ...]:
        """Return the accuracies in percent, one for each task."""
        return tuple(self.percent[task] for task in tasks)


_TABLE_1 = {
    "meta-gmvae": ("Meta-GMVAE", (94.92, 97.09, 82.21, 90.61), (42.82, 55.73, 63.14, 68.26)),
    "umtra": ("UMTRA", (83.80, 95.43, 74.25, 92.12), (39.93, 50.73, 61.11, 67.15)),
    "cactus-maml": ("CACTUs-MAML, ACAI/DC", (68.84, 87.78, 48.09, 73.36), (39.90, 53.97, 63.84, 69.64)),
    "cactus-protonets": ("CACTUs-ProtoNets, ACAI/DC", (68.12, 83.58, 47.75, 66.27), (39.18, 53.36, 61.54, 63.55)),
    "cactus-maml-bigan": ("CACTUs-MAML, BiGAN", (58.18, 78.66, 35.56, 58.62), (36.24, 51.28, 61.33, 66.91)),
    "cactus-protonets-bigan": ("CACTUs-ProtoNets, BiGAN", (54.74, 71.69, 33.40, 50.62), (36.62, 50.16, 59.56, 63.27)),
    "scratch": ("Training from scratch", (52.50, 74.78, 24.91, 47.62), (27.59, 38.48, 51.53, 59.63)),
    "maml": ("supervised MAML", (94.46, 98.83, 84.60, 96.29), (46.81, 62.13, 71.03, 75.54)),
    "protonets": ("supervised ProtoNets", (98.35, 99.58, 95.31, 98.81), (46.56, 62.29, 70.05, 72.04)),
}
_TABLE_5 = (0.42, 0.20, 0.44, 0.19)
_TABLE_10 = {
    "cactus-maml-simclr": ("CACTUs-MAML on SimCLR's features", (40.39, 52.35, 61.09, 64.89)),
    "umtra-simclr": ("UMTRA on SimCLR's features", (40.85, 51.47, 61.03, 67.30)),
}
CROSS_WAYS = (2, 5, 10, 15, 20, 30, 40, 50)
"""Ways of the test tasks in the right half of Table 2."""
_TABLE_2 = {
    "5way-1shot": (98.26, 94.92, 89.87, 85.11, 81.38, 77.80, 73.76, 70.92),
    "5way-5shot": (98.00, 94.57, 89.99, 85.12, 81.11, 77.42, 73.15, 70.85),
    "20way-1shot": (98.36, 93.93, 89.10, 85.36, 82.21, 78.40, 74.03, 69.86),
    "20way-5shot": (98.23, 94.01, 89.30, 85.33, 81.98, 77.24, 73.56, 70.02),
}
"""Right half of Table 2: models trained for the setting in their name, evaluated on 1-shot tasks of other ways."""
_ABLATION_TASKS: dict[DatasetName, Task] = {"omniglot": (20, 1), "mini-imagenet": (5, 1)}
_ABLATION: dict[str, tuple[str, float | None, float | None]] = {
    "lr-simclr": ("logistic regression on SimCLR's features", None, 40.11),
    "vae": ("vanilla VAE", 69.68, None),
    "vae-simclr": ("vanilla VAE on SimCLR's features", None, 38.40),
    "meta-gmvae-ep": ("Meta-GMVAE: Ep", 78.64, 40.51),
    "meta-gmvae-ep-set": ("Meta-GMVAE: Ep, Set", 81.65, 41.13),
    "meta-gmvae-ep-variance": ("Meta-GMVAE: Ep, \N{GREEK SMALL LETTER SIGMA}\N{SUPERSCRIPT TWO}", 80.94, 40.92),
}
"""Left half of Table 2, without its rows that are also in Table 1: name, Omniglot, Mini-ImageNet. The text version of
the paper has the numbers in this order and has lost the check marks of the rows `meta-gmvae-ep-…`: that `Set` comes
before the variance is the order of the columns of the table."""


def _row(
    dataset: DatasetName, key: str, name: str, where: str, tasks: Sequence[Task], percent: Sequence[float]
) -> PublishedResult:
    ours = key.startswith("meta-gmvae")
    intervals = dict(zip(tasks, _TABLE_5, strict=True)) if (dataset, key) == ("omniglot", "meta-gmvae") else {}
    accuracies = dict(zip(tasks, percent, strict=True))
    return PublishedResult(
        dataset, key, name, where, accuracies, intervals, "transductive" if ours else None, 15 if ours else None
    )


def _rows() -> list[PublishedResult]:
    rows = []
    for key, (name, omniglot, mini_imagenet) in _TABLE_1.items():
        rows.append(_row("omniglot", key, name, "Table 1", TASKS["omniglot"], omniglot))
        rows.append(_row("mini-imagenet", key, name, "Table 1", TASKS["mini-imagenet"], mini_imagenet))
    for key, (name, percent) in _TABLE_10.items():
        rows.append(_row("mini-imagenet", key, name, "Table 10", TASKS["mini-imagenet"], percent))
    ways = [(way, 1) for way in CROSS_WAYS]
    for trained, by_way in _TABLE_2.items():
        name = f"Meta-GMVAE trained for {trained.replace('-', ' ')}"
        rows.append(_row("omniglot", f"meta-gmvae-{trained}", name, "Table 2", ways, by_way))
    for key, (name, *accuracies) in _ABLATION.items():
        for (dataset, task), value in zip(_ABLATION_TASKS.items(), accuracies, strict=True):
            if value is not None:
                rows.append(_row(dataset, key, name, "Table 2", [task], [value]))
    return rows


PUBLISHED = _rows()
"""Rows of Tables 1, 2 and 10. Table 9 is missing: the text version of the paper that these numbers come from does not
preserve it."""
BY_REF = {row.ref: row for row in PUBLISHED}


def published_rows(ref: str) -> list[PublishedResult]:
    """Return the rows of `paper:DATASET` (Tables 1 and 10) or the row `paper:DATASET/KEY`.

    Raises:
        DataError: unknown reference; the message suggests the closest one or lists all.
    """
    rows = [row for row in PUBLISHED if ref == row.ref or (ref == f"paper:{row.dataset}" and row.where != "Table 2")]
    if not rows:
        known = [*(f"paper:{name}" for name in DATA), *BY_REF]
        raise DataError(f"{ref}: no such row of the paper{suggestion(ref, known)}")
    return rows
