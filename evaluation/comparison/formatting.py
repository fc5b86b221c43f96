"""Tasks, accuracies, differences and p-values as text, the same in every table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from metagmvae.pipelines.records import printable

Task = tuple[int, int]
"""(way, shot)."""
UNKNOWN = "\N{EN DASH}"
"""Text for a value that is not recorded."""


def task_name(task: Task) -> str:
    """Format a task: `(5,1)` for 5-way 1-shot."""
    return f"({task[0]},{task[1]})"


def parse_task(name: str) -> Task | None:
    """Return (way, shot) of a name such as `5w1s`; None for any other text."""
    match = re.fullmatch(r"(\d+)w(\d+)s", name)
    return (int(match[1]), int(match[2])) if match else None


def task_title(name: str) -> str:
    """`(5,1)` for `5w1s`; another name escaped for Markdown."""
    task = parse_task(name)
    return markdown_text(name) if task is None else task_name(task)


def percent(accuracy: float, ci95: float | None = None) -> str:
    """Format an accuracy in [0, 1] in percent: `97.72 ± 0.12`."""
    return f"{100 * accuracy:.2f}" + ("" if ci95 is None else f" ± {100 * ci95:.2f}")


def points(difference: float, ci95: float) -> str:
    """Format a difference of accuracies in percentage points with its sign: `+0.30 ± 0.09`."""
    return f"{100 * difference:+.2f} ± {100 * ci95:.2f}".replace("-", "\N{MINUS SIGN}")


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: `1 trial`, `2,000 trials`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def p_value(p: float) -> str:
    """Format a p-value."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def format_value(value: object) -> str:
    """Format a value in few characters; a dash if it is not known."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 10 else f"{value:.4g}"
    return format_setting(value)


def format_setting(value: object) -> str:
    """Format a setting without rounding; a dash if it is not recorded."""
    return UNKNOWN if value is None else short(str(value))


def short(text: str) -> str:
    """Return the first 8 digits of a SHA-256 digest, and any other text unchanged."""
    return text[:8] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def markdown_text(text: str) -> str:
    """Escape a name from data or users (class, model, setting, reason): it formats, links and embeds nothing."""
    return re.sub(r"([\\`*|<\[\]&~$]|(?<!\w)_|_(?!\w))", r"\\\1", printable(text))


def markdown_code(text: str) -> str:
    """A name from data or users as code, also in a table."""
    shown = printable(text).replace("|", r"\|")
    ticks = max((len(run) for run in re.findall("`+", shown)), default=0)
    return f"`{shown}`" if not ticks else f"{'`' * (ticks + 1)} {shown} {'`' * (ticks + 1)}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
