"""Exit codes and error lines of the command, whatever goes wrong."""

import errno
import json

import pytest
from called_commands import refusal_of

from metagmvae.configs.load import load_settings
from metagmvae.infra import cli
from metagmvae.infra.cli import main
from metagmvae.infra.tracking.mlflow_environment import MissingMlflowError
from metagmvae.pipelines.records import DataError, NoSpaceError, WorkError


@pytest.fixture
def raising(monkeypatch):
    """Makes `verify` raise an error."""

    def install(error):
        def run(arguments):
            raise error

        monkeypatch.setattr(cli.data, "verify", run)

    return install


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("d: no dataset; choose another"), 2, "metagmvae verify: d: no dataset; choose another"),
        (WorkError("the work failed; try again"), 1, "metagmvae verify: the work failed; try again"),
        (NoSpaceError("d: no space; free some"), 1, "metagmvae verify: d: no space; free some"),
        (MissingMlflowError("needs mlflow; install it"), 2, "metagmvae verify: needs mlflow; install it"),
        (KeyError("name"), 1, "metagmvae: unexpected error in verify: KeyError: 'name'; --debug shows the traceback"),
        (AssertionError(), 1, "metagmvae: unexpected error in verify: AssertionError; --debug shows the traceback"),
        (ValueError("a\nb"), 1, "metagmvae: unexpected error in verify: ValueError: a; --debug shows the traceback"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "metagmvae verify: No space left on device; free some space, and run the command again",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            1,
            "metagmvae verify: a/b: Permission denied; change its permissions, or choose another one",
        ),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_every_error_is_one_line_with_its_exit_code(raising, capsys, error, code, line):
    raising(error)
    assert main(["verify", "x"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (f"{line}\n" if line else printed.err)
    assert main(["verify", "x", "--json"]) == code
    answer, again = capsys.readouterr()
    assert again == printed.err
    failure = json.loads(answer)
    assert failure["exit_code"] == code
    assert printed.err.endswith(f": {failure['error']}\n")


@pytest.mark.parametrize("words", [["verify"], ["verify", "x", "--none"], ["bench", "stpe"], ["trian"]])
def test_wrong_options_are_one_json_object_too(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--json"])
    answer, error = capsys.readouterr()
    assert json.loads(answer)["exit_code"] == 2
    assert json.loads(answer)["error"] in error


def test_names_that_are_too_long_are_one_line_wherever_they_stand(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "n" * 300
    for words in (
        ["train", name],
        ["train", "omniglot-cpu", "--set", f"data.uri={data}", "--set", f"run.out={name}"],
        ["evaluate", name, "--data", str(data)],
        ["compare", name, name],
        ["table", "x", "--results", name],
        ["figure", name, "--out", "o"],
    ):
        error = refusal_of(*words)
        assert error.endswith("File name too long; choose a shorter name\n"), error
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(raising):
    raising(KeyError("name"))
    with pytest.raises(KeyError):
        main(["verify", "x", "--debug"])


def test_file_uris_are_paths_for_every_command(data, tmp_path, capsys):
    out = tmp_path / "with space"
    assert main(["prepare", "glyphs", f"--out={out.as_uri()}", "--json"]) == 0
    assert (out / "dataset.json").is_file()
    assert main(["verify", out.as_uri()]) == 0
    assert main(["evaluate", (tmp_path / "none").as_uri(), "--data", out.as_uri()]) == 2
    assert f"{tmp_path / 'none'}: no such model" in capsys.readouterr().err
    for arguments in (["verify", "file://elsewhere/data"], ["prepare", "glyphs", "--out", "file://data"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "not a folder of this machine; write an absolute path, file:///" in capsys.readouterr().err
    settings = load_settings(
        "omniglot-cpu", ["run.out=file:///tmp/a%20run", "tracking.store=file://localhost/tmp/store"]
    )
    assert (settings.run.out, settings.tracking.store) == ("/tmp/a run", "/tmp/store")
    for uri in ("file://elsewhere/run", "s3://bucket/run"):
        assert f"run.out: '{uri}' is a URI" in refusal_of("train", "omniglot-cpu", f"--set=run.out={uri}")


def test_output_that_the_terminal_cannot_show_is_escaped(monkeypatch, capsys):
    monkeypatch.setattr(cli.data, "verify", lambda arguments: {"data": "b\udcffd", "problems": []})
    assert main(["verify", "x"]) == 0
    assert "data: b\\udcffd" in capsys.readouterr().out
