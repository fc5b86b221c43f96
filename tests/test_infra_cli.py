"""Exit codes and error lines of the command, whatever goes wrong."""

import pytest

from metagmvae.configs.load import load_settings
from metagmvae.infra import cli
from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError, WorkError


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
        (KeyError("name"), 1, "metagmvae: unexpected error in verify: KeyError: 'name'; --debug shows the traceback"),
        (AssertionError(), 1, "metagmvae: unexpected error in verify: AssertionError; --debug shows the traceback"),
        (ValueError("a\nb"), 1, "metagmvae: unexpected error in verify: ValueError: a; --debug shows the traceback"),
    ],
)
def test_every_error_is_one_line_with_its_exit_code(raising, capsys, error, code, line):
    raising(error)
    assert main(["verify", "x"]) == code
    assert capsys.readouterr().err == line + "\n"


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
        assert main(["train", "omniglot-cpu", f"--set=run.out={uri}"]) == 2
        assert f"run.out: '{uri}' is a URI" in capsys.readouterr().err


def test_output_that_the_terminal_cannot_show_is_escaped(monkeypatch, capsys):
    monkeypatch.setattr(cli.data, "verify", lambda arguments: {"data": "b\udcffd", "problems": []})
    assert main(["verify", "x"]) == 0
    assert "data: b\\udcffd" in capsys.readouterr().out
