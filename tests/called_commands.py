"""Calls of commands in this process: their answers, and the one line of a request that is refused."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

from metagmvae.infra.cli import main


def answer_of(*words: object, code: int = 0) -> Any:
    """The answer of a command with `--json`, whose exit code is `code`."""
    found, out, err = called(*words, "--json")
    assert found == code, err
    return json.loads(out)


def refusal_of(*words: object, code: int = 2) -> str:
    """The line on standard error of a request that is refused; with `--json` the answer says the same."""
    found, out, err = called(*words)
    assert (found, err.count("\n")) == (code, 1), err
    assert json.loads(out)["exit_code"] == code if "--json" in words else out == ""
    return err


def called(*words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # wrong options
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()
