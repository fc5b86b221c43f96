"""The README's table, made from the result files that `metagmvae evaluate --record` wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

TASKS = ((5, 1), (5, 5), (20, 1), (20, 5))

PUBLISHED = {
    "paper: Meta-GMVAE (transductive)": (94.92, 97.09, 82.21, 90.61),
    "paper: supervised ProtoNets": (98.35, 99.58, 95.31, 98.81),
}
"""Omniglot, Table 1 of Lee et al., ICLR 2021; their own draw of the 1200-100-323 split."""


def results_table(results: Path, name: str) -> str:
    """Markdown: our accuracies with 95% intervals over episodes, the paper's below them, in percent."""
    cells = []
    for way, shot in TASKS:
        result = json.loads((results / f"{name}-{way}way-{shot}shot.json").read_text(encoding="utf-8"))
        cells.append(f"{100 * result['accuracy']:.2f} ± {100 * result['ci95']:.2f}")
    head = [f"({way},{shot})" for way, shot in TASKS]
    rows = [["Omniglot (way,shot)", *head], ["---"] * 5, [f"**`{name}`** (transductive)", *cells]]
    rows += [[label, *(f"{value:.2f}" for value in values)] for label, values in PUBLISHED.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def render_readme(text: str, results: Path) -> str:
    """The README with every table between its markers made afresh."""

    def fresh(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table:{name} -->\n{results_table(results, name)}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\S+) -->.*?<!-- /table -->", fresh, text, flags=re.DOTALL)
