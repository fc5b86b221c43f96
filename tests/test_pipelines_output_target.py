"""Output files: what lies at their path is replaced only if it is a regular file."""

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from metagmvae.pipelines.files import atomic_file, write_json
from metagmvae.pipelines.records import DataError

LARGE = b"x" * 300_000
"""More than the buffer of a pipe."""


def write(path, content=b"new"):
    with atomic_file(path) as file:
        file.write(content)


def test_a_device_stays_a_device(tmp_path):
    for name in ("/dev/null", tmp_path / "link"):
        if name != "/dev/null":
            name.symlink_to("/dev/null")
        write(name)
        assert stat.S_ISCHR(os.stat(name).st_mode)
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    with pytest.raises(DataError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        write("/dev/full")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_pipe_gets_the_content(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="no program reads from this pipe"):
        write(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    while not received and reader.is_alive():
        try:
            write(pipe, LARGE)
            break
        except DataError:  # the reader has not opened it yet
            continue
    reader.join()
    assert received == [LARGE]
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def _half(path):
    with atomic_file(path) as file:
        file.write(b"half")
        raise KeyError


def test_an_error_while_writing_reaches_no_stream(capfd):
    with pytest.raises(KeyError):
        _half("/dev/stderr")
    write("/dev/stdout", b"whole")
    assert capfd.readouterr() == ("whole", "")


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "file"
    for existing in (True, False):
        target.write_text("old") if existing else target.unlink()
        link = tmp_path / f"link-{existing}"
        link.symlink_to("elsewhere/file")
        write(link)
        assert link.is_symlink()
        assert target.read_bytes() == b"new"
    assert [path.name for path in target.parent.iterdir()] == ["file"]
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(DataError, match="Too many levels of symbolic links"):
        write(loop)
    assert loop.is_symlink()


def test_permissions_of_a_replaced_file_stay(tmp_path):
    private = tmp_path / "private"
    private.write_text("old")
    private.chmod(0o600)
    write(private)
    assert (private.read_bytes(), stat.S_IMODE(private.stat().st_mode)) == (b"new", 0o600)
    write(tmp_path / "fresh")
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o644


def test_folders_and_sockets_are_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder; give the name of a file"):
        write(tmp_path)
    name = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(name))
        with pytest.raises(DataError, match="is a socket"):
            write(name)
        assert stat.S_ISSOCK(os.stat(name).st_mode)
    write(tmp_path / "file")
    with pytest.raises(DataError, match="Not a directory"):
        write_json(tmp_path / "file" / "below", {})


def test_standard_output_that_is_a_file_keeps_what_was_printed(tmp_path):
    out = tmp_path / "out"
    code = (
        "from metagmvae.pipelines.files import write_json; print('before'); write_json('/dev/stdout', [1]); "
        f"write_json({str(out)!r}, [2]); print('after')"
    )
    with out.open("wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True, cwd=Path(__file__).parents[1])
    assert out.read_text().split() == ["before", "[", "1", "]", "[", "2", "]", "after"]
