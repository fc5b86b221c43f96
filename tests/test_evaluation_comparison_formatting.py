"""Names from data and users in Markdown and text."""

import pytest

from metagmvae.evaluation.comparison.formatting import counted, markdown_code, markdown_table, markdown_text, percent
from metagmvae.infra.commands.parsing import format_answer


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("train.learning_rate", "train.learning_rate"),
        ("cat|dog", r"cat\|dog"),
        ("![x](http://evil/p.png)", r"!\[x\](http://evil/p.png)"),
        ("<img src=x onerror=alert(1)>", r"\<img src=x onerror=alert(1)>"),
        ("**bold** _slanted_ `code`", r"\*\*bold\*\* \_slanted\_ \`code\`"),
        ("$x$ &lt; ~~y~~", r"\$x\$ \&lt; \~\~y\~\~"),
        ("back\\slash", "back\\\\slash"),
        ("a\n| b |\x1b[31m", "a\\\\n\\| b \\|\\\\x1b\\[31m"),
    ],
)
def test_names_format_nothing(name, escaped):
    assert markdown_text(name) == escaped


@pytest.mark.parametrize(
    ("name", "code"), [("a_b", "`a_b`"), ("a|b", r"`a\|b`"), ("a`b``c", "``` a`b``c ```"), ("a\nb", r"`a\nb`")]
)
def test_names_as_code(name, code):
    assert markdown_code(name) == code


def test_a_table_has_as_many_cells_as_its_head():
    assert markdown_table(["x"], [[markdown_text("a|b")]]).splitlines() == ["| x |", "| --- |", r"| a\|b |"]


def test_one_trial_is_no_trials():
    texts = [counted(number, "trial") for number in (0, 1, 2, 2000)]
    assert texts == ["0 trials", "1 trial", "2 trials", "2,000 trials"]


def test_one_episode_has_no_interval():
    assert percent(0.5) == "50.00"
    answer = format_answer({"accuracy": 0.5, "ci95": None, "rows": [{"way": 5, "ci95": None}]})
    assert answer.splitlines() == [
        "accuracy: 0.5000",
        "ci95: no interval",
        "rows:",
        "  way  ci95",
        "  5    no interval",
    ]
