"""Folders and archives give the same files; unsafe archives are refused with one line."""

import errno
import io
import os
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib

import pytest

from metagmvae.pipelines.archives import entries
from metagmvae.pipelines.archives.reader import Entry, list_entries, list_files, read_entry
from metagmvae.pipelines.records import DataError

FILES = {"b/2.png": b"two", "b/10.PNG": b"ten", "a.png": b"one", "notes.txt": b"-", ".hidden/1.png": b"-"}


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return str(path)


def assert_refused(call, *words):
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_a_folder_and_its_zip_file_give_the_same_files(tmp_path):
    for name, data in FILES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    zipped = make_zip(tmp_path / "files.zip", [*FILES.items(), ("__MACOSX/b/2.png", b"-"), ("empty/", b"")])
    entries = list_entries(tmp_path / "folder", (".png",))
    assert entries == [Entry(name, zlib.crc32(FILES[name]), 3) for name in ("a.png", "b/10.PNG", "b/2.png")]
    assert list_entries(zipped, (".png",)) == entries
    for entry in entries:
        assert read_entry(zipped, entry.name) == read_entry(str(tmp_path / "folder"), entry.name) == FILES[entry.name]


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/etc/out.png", "C:/out.png", "..\\out.png"])
def test_names_that_point_outside_are_refused(tmp_path, name):
    path = make_zip(tmp_path / "x.zip", [("good.png", b"1"), (name, b"1")])
    assert_refused(lambda: list_entries(path, (".png",)), "x.zip", "points outside the archive")
    assert_refused(lambda: read_entry(path, name), "points outside the archive")


def test_backslashes_in_names_are_refused(tmp_path):
    path = make_zip(tmp_path / "x.zip", [("cat\\1.png", b"1")])
    assert_refused(lambda: list_entries(path, (".png",)), "backslashes")


def test_a_link_is_refused(tmp_path):
    info = zipfile.ZipInfo("link.png")
    info.external_attr = 0o120777 << 16
    path = make_zip(tmp_path / "x.zip", [(info, b"/etc/passwd")])
    assert_refused(lambda: list_entries(path, (".png",)), "'link.png' is a link")


def test_an_encrypted_member_is_refused(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, [("a.png", b"12345")])
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    data[6] |= 1
    path.write_bytes(data)
    assert_refused(lambda: list_entries(path, (".png",)), "encrypted")


def test_duplicate_names_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = make_zip(tmp_path / "x.zip", [("a.png", b"1"), ("a.png", b"2")])
    assert_refused(lambda: list_entries(path, (".png",)), "two members are named 'a.png'")
    path = make_zip(tmp_path / "y.zip", [("a.png", b"1"), ("./a.png", b"2")])
    assert_refused(lambda: list_entries(path, (".png",)), "two members are named")


def test_extremely_compressed_members_are_refused(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "one.zip", [("a.png", bytes(4 * 2**20))])
    assert_refused(lambda: list_entries(path, (".png",)), "unpacks to 4194304 bytes from")
    assert_refused(lambda: read_entry(path, "a.png"), "unpacks to 4194304 bytes from")
    path = make_zip(tmp_path / "many.zip", [(f"{number}.png", bytes(2**20)) for number in range(300)])
    assert_refused(lambda: list_entries(path, (".png",)), "bytes unpack to 314572800 bytes")
    monkeypatch.setattr(entries, "MAX_MEMBER_BYTES", 10)
    path = make_zip(tmp_path / "large.zip", [("a.png", b"0123456789a")])
    assert_refused(lambda: list_entries(path, (".png",)), "unpacks to 11 bytes")


def test_a_full_disk_is_not_reported_as_a_damaged_tar_file(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 9000
        tar.addfile(info, io.BytesIO(b"x" * 9000))

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    assert_refused(
        lambda: list_entries(tmp_path / "x.tar.gz", (".png",)),
        "No space left on device",
        "free some space",
    )


def test_a_member_is_not_unpacked_beyond_its_stated_size(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, [("a.png", bytes(64 * 2**20))])
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 22, 100)
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 100)
    path.write_bytes(data)
    assert list_entries(path, (".png",))[0].size == 100
    tracemalloc.start()
    assert_refused(lambda: read_entry(path, "a.png"), "a.png cannot be read")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_truncated_zip_file_is_refused_at_every_length(tmp_path):
    complete = make_zip(tmp_path / "whole.zip", [("a.png", os.urandom(200)), ("b.png", os.urandom(200))])
    with open(complete, "rb") as file:
        data = file.read()
    path = tmp_path / "cut.zip"
    for length in range(0, len(data) - 1, 7):
        path.write_bytes(data[:length])
        assert_refused(lambda: list_entries(path, (".png",)), "cut.zip: not a complete zip file")


def test_the_error_names_a_damaged_member(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, [("a.png", b"a" * 50), ("b.png", os.urandom(300))])
    data = bytearray(path.read_bytes())
    data[data.index(b"b.png") + 100] ^= 255
    path.write_bytes(data)
    assert read_entry(path, "a.png") == b"a" * 50
    assert_refused(lambda: read_entry(path, "b.png"), "b.png", "download the file again")
    assert_refused(lambda: read_entry(path, "c.png"), "no member c.png")


def test_missing_and_special_files_are_refused(tmp_path):
    assert_refused(lambda: list_entries(tmp_path / "none", (".png",)), "no such file or folder; check the path")
    assert_refused(lambda: read_entry(tmp_path / "none", "a.png"), "a.png cannot be read")
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert_refused(lambda: list_entries(tmp_path, (".png",)), "a.png", "not a regular file")
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    assert_refused(lambda: list_entries(tmp_path, (".png",)), "not a regular file")


def test_links_to_folders_are_followed_and_cycles_are_refused(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "1.png").write_bytes(b"1")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "near").symlink_to(tmp_path / "far")
    assert [entry.name for entry in list_entries(tmp_path / "root", (".png",))] == ["near/1.png"]
    (tmp_path / "far" / "back").symlink_to(tmp_path / "root")
    assert_refused(lambda: list_entries(tmp_path / "root", (".png",)), "has been read already")


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"two\nlines.png"])
def test_names_that_are_not_text_are_refused(tmp_path, name):
    try:
        (tmp_path / os.fsdecode(name)).write_bytes(b"1")
    except OSError:
        pytest.skip("this file system refuses the name itself")
    assert_refused(lambda: list_entries(tmp_path, (".png",)), "not one line of UTF-8")


def test_all_files_are_accounted_for(tmp_path):
    for name, data in {**FILES, "bare": b"image", "other": b"-", "__MACOSX/._a": b"-"}.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    (tmp_path / "folder" / "empty").mkdir()
    (tmp_path / "folder" / "shortcut").symlink_to("a.png")
    listing = list_files(tmp_path / "folder", (".png",), lambda file: file.read() == b"image")
    assert [entry.name for entry in listing.entries] == ["a.png", "b/10.PNG", "b/2.png", "bare"]
    assert [(file.name, file.reason) for file in listing.left_out] == [
        (".hidden", "hidden"),
        ("__MACOSX", "hidden"),
        ("notes.txt", "suffix .txt"),
        ("other", "no suffix"),
        ("shortcut", "link"),
    ]
    assert sorted(listing.folders) == ["b", "empty"]


def test_colons_in_names_are_allowed(tmp_path):
    path = make_zip(tmp_path / "x.zip", [("GO:0001/1.png", b"1"), ("12:30/1.png", b"2"), ("a/b:c.png", b"3")])
    assert [entry.name for entry in list_entries(path, (".png",))] == ["12:30/1.png", "GO:0001/1.png", "a/b:c.png"]


def test_zip_names_in_utf8_without_the_flag_are_read(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, [("caf\u00e9/1.png", b"1"), ("\u732b/1.png", b"2")])
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = data.find(signature)
        while position >= 0:
            data[position + offset + 1] &= ~8
            position = data.find(signature, position + 1)
    path.write_bytes(data)
    assert zipfile.ZipFile(path).namelist()[0] != "caf\u00e9/1.png"
    assert [entry.name for entry in list_entries(path, (".png",))] == ["caf\u00e9/1.png", "\u732b/1.png"]
    assert read_entry(path, "\u732b/1.png") == b"2"


def test_a_link_of_another_kind_in_a_zip_file_is_left_out(tmp_path):
    info = zipfile.ZipInfo("README")
    info.external_attr = 0o120777 << 16
    path = make_zip(tmp_path / "x.zip", [(info, b"a.png"), ("a.png", b"1")])
    listing = list_files(path, (".png",), lambda file: True)
    assert [entry.name for entry in listing.entries] == ["a.png"]
    assert [(file.name, file.reason) for file in listing.left_out] == [("README", "link")]


def test_the_link_to_a_folder_that_is_also_there_is_named(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.png").write_bytes(b"1")
    for link in ("a_link", "z_link"):  # before and after the folder in the order of the names
        (tmp_path / link).symlink_to("real")
        words = (f"{tmp_path / link}: links to", f"({tmp_path / 'real'})", f"remove the link {tmp_path / link}")
        assert_refused(lambda: list_entries(tmp_path, (".png",)), *words)
        (tmp_path / link).unlink()


def test_an_lzma_member_with_a_huge_dictionary_is_refused(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", b"12345")
    assert read_entry(path, "a.png") == b"12345"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 30 + len("a.png") + 5, 2**32 - 1)
    path.write_bytes(data)
    assert_refused(lambda: read_entry(path, "a.png"), "needs 4294967295 bytes of memory", "pack it with deflate")


def test_an_unknown_compression_method_is_named(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, [("a.png", b"1" * 100)])
    data = bytearray(path.read_bytes())
    data[8] = data[data.index(b"PK\x01\x02") + 10] = 9
    path.write_bytes(data)
    assert_refused(lambda: list_entries(path, (".png",)), "compressed by deflate64", "pack the archive again")


def test_a_web_page_named_zip_is_called_one(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"<!DOCTYPE html><html><title>Sign in</title></html>")
    assert_refused(lambda: list_entries(tmp_path / "x.zip", (".png",)), "is a web page, not an archive")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n")
    assert_refused(lambda: list_entries(tmp_path / "x.png", (".png",)), "not a folder, zip file or tar file")
