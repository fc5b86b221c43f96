"""The program in training/README.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import metagmvae


def test_program_of_the_training_guide(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(metagmvae.__file__).parent / "training" / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    exec(program, {})
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [["pretrain", "2"], ["pretrain", "4"], ["meta", "2"], ["meta", "4"]]


def test_files_named_in_the_training_guide_exist() -> None:
    root = Path(metagmvae.__file__).parent
    guide = (root / "training" / "README.md").read_text()
    named = set(re.findall(r"`((?:objectives|models|augment|device|trainer|methods|pretraining)/\w+\.py)", guide))
    assert named
    assert [name for name in sorted(named) if not (root / "training" / name).exists()] == []
    tests = set(re.findall(r"`(test_\w+\.py)`", guide))
    assert [name for name in sorted(tests) if not (root / "tests" / name).exists()] == []
