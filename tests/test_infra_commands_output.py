"""Standard streams that are full, closed or ASCII-only, and the log of a command."""

import json
import os
import subprocess
import sys

import pytest
from called_commands import refusal_of

from metagmvae.infra.cli import build_parser, main
from metagmvae.infra.commands.check import _check_lines
from metagmvae.infra.commands.output import answer_text
from metagmvae.infra.commands.parsing import format_answer, progress_bar

COMMANDS = sorted(next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict)))
PYTHON = f"{sys.executable} -m metagmvae"


def shell(command, folder, **environment):
    """Run a shell command that uses $RUN for the program; return (exit code, stdout, stderr)."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        env={**os.environ, "RUN": PYTHON, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "out", "code", "error"),
    [
        (
            "verify {data}",
            ">/dev/full",
            1,
            "metagmvae verify: the answer cannot be written to standard output (No space",
        ),
        ("verify {data} --json", ">/dev/full", 1, "the answer cannot be written to standard output (No space left"),
        ("--help", ">/dev/full", 1, ""),
        ("verify --help", ">/dev/full", 1, ""),
        ("--version", ">/dev/full", 1, ""),
        ("verify {data}", ">&-", 0, ""),
        ("verify {data} --json", "| true", 0, ""),
        ("verify {data}", "| head -1", 0, ""),
        ("--help", "| head -1", 0, ""),
        ("verify none", "2>/dev/full", 2, ""),
        ("verify none", "2>&-", 2, ""),
        ("nothing", "2>/dev/full", 2, ""),
        ("nothing", ">&- 2>&-", 2, ""),
        ("verify {data}", "<&- >&- 2>&-", 0, ""),
    ],
)
def test_streams_that_cannot_be_written(data, tmp_path, words, out, code, error):
    exit_code, printed, errors = shell(f"$RUN {words.format(data=data)} {out}", tmp_path)
    assert exit_code == code
    assert "Traceback" not in errors + printed
    assert "Exception ignored" not in errors
    assert error in errors
    assert errors.count("\n") == (1 if error else 0)


def test_a_closed_error_stream_does_not_move_errors_to_the_answer(tmp_path):
    code, printed, _ = shell("$RUN verify none 2>&-; $RUN verify none --json 2>&-", tmp_path)
    assert code == 2
    (line,) = printed.splitlines()
    assert json.loads(line).keys() == {"error", "exit_code"}


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
)
def test_names_that_an_ascii_stream_cannot_show_are_escaped(tmp_path, environment):
    (tmp_path / "größe").mkdir()
    code, printed, errors = shell("$RUN verify größe; echo $?; $RUN verify größe --json", tmp_path, **environment)
    assert code == 2
    assert "Traceback" not in errors
    code_of_first, failure = printed.splitlines()
    assert code_of_first == "2"
    assert "no dataset.json there" in json.loads(failure)["error"]
    assert errors.count("no dataset.json there") == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_all_commands(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for option in ("--json", "--debug", "-v, --verbose", "-q, --quiet", "--log-file FILE"):
        assert option in shown


def test_log_file_has_times_and_tracebacks_and_no_credentials(data, tmp_path, capsys):
    log = tmp_path / "log"
    assert main(["verify", str(data), "--log-file", str(log)]) == 0
    assert main(["verify", "s3://KEY:S3CRET@nowhere/x?endpoint_override=127.0.0.1:9", f"--log-file={log}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    text = log.read_text()
    assert f"DEBUG metagmvae verify {data}" in text
    assert "ERROR metagmvae verify: s3://nowhere/x" in text
    assert "Traceback" in text
    assert "S3CRET" not in text
    assert f"{tmp_path}: is a folder" in refusal_of("verify", data, "--log-file", tmp_path)
    assert main(["verify", str(data), "--log-file", "/dev/full"]) == 0
    assert main(["verify", "none", "-v"]) == 2
    assert capsys.readouterr().err.count("metagmvae verify") == 2


def test_long_work_without_a_terminal_is_logged(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("metagmvae.infra.commands.output.time.monotonic", lambda: now[0])
    with caplog.at_level("INFO", "metagmvae"), progress_bar("shards", quiet=True) as on_progress:
        for done in range(1, 101):
            now[0] += 1
            on_progress(done, 100)
    assert caplog.messages == [
        "shards: 30 of 100, about 70 s left",
        "shards: 60 of 100, about 40 s left",
        "shards: 90 of 100, about 10 s left",
    ]


def test_small_numbers_are_shown():
    assert format_answer({"learning_rate": 3e-5, "zero": 0.0, "loss": -0.00123, "rate": 0.25, "speed": 12345.6}) == (
        "learning_rate: 3e-05\nzero: 0.0000\nloss: -0.0012\nrate: 0.2500\nspeed: 12,346"
    )


def test_numbers_that_are_not_finite_become_null():
    assert answer_text({"a": [float("nan"), 1.5], "b": {"c": float("inf")}}) == '{"a": [null, 1.5], "b": {"c": null}}'


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["trian"], "metagmvae: 'trian' is no command; did you mean 'train'?"),
        (["bench", "stpe"], "argument name: invalid choice: 'stpe'; did you mean 'step'?"),
        (["evaluate", "m", "--data", "d", "--mode", "x"], "invalid choice: 'x'; known: transductive, inductive"),
        (["eval"], "'eval' is no command; did you mean 'evaluate'?"),
        (["evaluate", "m", "--data", "d", "--epsiodes", "3"], "unrecognized arguments: --epsiodes 3; did you mean"),
        (["train", "x", "--resmue"], "metagmvae train: unrecognized arguments: --resmue; did you mean '--resume'?"),
        (["verify", "d", "s3://KEY:SECRET@b"], "unrecognized arguments: s3://b; see"),
        (["evaluate", "m", "--data", "d", "--record", "/"], "argument --record: /: is a folder"),
        (["compare", "m", "--html", f"{__file__}/x/y"], "cannot be written (Not a directory)"),
        (["bench", "step", "--record", __file__ + "/x"], "cannot be written (Not a directory)"),
        (["classify", "m", "--support", "s", "--query", "q", "--figure", "."], "argument --figure: .: is a folder"),
    ],
)
def test_wrong_options_are_one_line(words, error, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    line = capsys.readouterr().err
    assert error in line
    assert line.count("\n") == 1
    assert "SECRET" not in line


def test_version_is_one_line(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    words = capsys.readouterr().out
    assert words.count("\n") == 1
    assert words.startswith("metagmvae ")
    assert f"Python {sys.version.split()[0]}, torch " in words


@pytest.mark.parametrize(
    ("command", "words", "kept"),
    [
        ("evaluate", ["m", "--data", "d"], "nothing was changed"),
        ("prepare", ["glyphs", "--out", "d"], "the same command continues with the shards that are finished"),
        ("track", ["run"], "what was uploaded is not sent again"),
    ],
)
def test_ctrl_c_says_what_is_true_for_the_command(command, words, kept, monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    parser = build_parser()
    choices = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    choices[command].set_defaults(run=interrupt)
    monkeypatch.setattr("metagmvae.infra.cli.build_parser", lambda: parser)
    assert main([command, *words]) == 130
    line = capsys.readouterr().err
    assert line.startswith(f"metagmvae {command}: stopped by Ctrl-C: ")
    assert kept in line
    assert "--resume" not in line


def test_doctor_fits_100_columns():
    long = {"check": "temporary folder", "state": "wrong", "found": "word " * 60, "remedy": "do " * 60}
    lines = _check_lines(long)
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("wrong temporary folder  word")
    assert " ".join(" ".join(lines).split()).count("do") == 60
    assert _check_lines(long | {"found": "x", "remedy": ""}) == ["wrong temporary folder  x"]


@pytest.mark.parametrize(
    ("line", "completions"),
    [("metagmvae tr", {"train", "track"}), ("metagmvae train omniglot-cp", {"omniglot-cpu"})],
)
def test_the_shell_completes_commands_and_presets(line, completions, tmp_path):
    pytest.importorskip("argcomplete")
    request = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    out = tmp_path / "out"
    shell("$RUN", tmp_path, **request, COMP_TYPE="9", _ARGCOMPLETE_STDOUT_FILENAME=str(out))
    assert set(out.read_text().split()) == completions
