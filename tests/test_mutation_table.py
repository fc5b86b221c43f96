"""The table of mutations fits the code: `mutation.py`, which is run by hand, can try every entry."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.what}")
def test_old_text_occurs_once_and_new_text_is_python(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    count = text.count(mutation.old)
    assert count == 1, f"{mutation.file} changed: correct the entry {mutation.what!r} of tests/mutations.toml"
    ast.parse(text.replace(mutation.old, mutation.new))
    assert all((ROOT / "tests" / test).is_file() for test in mutation.tests)
