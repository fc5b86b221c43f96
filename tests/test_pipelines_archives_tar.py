"""Tar files: a damaged, cut or hostile one is refused in one line, and nothing is lost or hangs."""

import bz2
import gzip
import io
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import zlib

import pytest

from metagmvae.pipelines.archives.reader import list_entries, list_files, read_entry
from metagmvae.pipelines.records import DataError

CLASSES = ("cat", "dog", "ox")
MEMBER_BYTES = 512 + 1024
COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
LIMITED = """
import resource, sys
from metagmvae.pipelines.archives.reader import list_entries
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
for path in sys.argv[1:]:
    try:
        list_entries(path, (".png",))
        print(f"{path}: read")
    except ValueError as error:
        print(error)
"""


def content(number):
    return bytes([number]) * 700


def tar_bytes(form=tarfile.PAX_FORMAT, prefix=""):
    """Nine files in three folders; 9 x 1,536 bytes, then zeros up to 20,480."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number, name in enumerate(CLASSES):
            for index in range(3):
                info = tarfile.TarInfo(f"{name}/{prefix}{index}.png")
                info.size = 700
                tar.addfile(info, io.BytesIO(content(3 * number + index)))
    return buffer.getvalue()


def refusal(path):
    with pytest.raises(DataError) as caught:
        list_entries(path, (".png",))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tar_file_cut_at_any_length_is_refused(tmp_path):
    data, path = tar_bytes(), tmp_path / "cut.tar"
    end = 9 * MEMBER_BYTES
    for length in {*range(0, len(data), 101), *range(0, end + 1024, 512), end + 1, len(data) - 1}:
        path.write_bytes(data[:length])
        assert "not a complete tar file" in refusal(path)
    for length in (end + 1024, end + 2048, len(data)):  # with a complete end mark
        path.write_bytes(data[:length])
        assert len(list_entries(path, (".png",))) == 9


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_a_compressed_tar_file_cut_at_any_length_is_refused(tmp_path, kind):
    data, path = COMPRESSORS[kind](tar_bytes()), tmp_path / f"cut.tar.{kind}"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert "not a complete tar file" in refusal(path)
    path.write_bytes(COMPRESSORS[kind](tar_bytes()[: 4 * MEMBER_BYTES]))
    assert "not a complete tar file" in refusal(path)
    path.write_bytes(data + bytes(3))  # padding
    assert len(list_entries(path, (".png",))) == 9
    path.write_bytes(COMPRESSORS[kind](tar_bytes()[:2000]) + COMPRESSORS[kind](tar_bytes()[2000:]))
    assert [read_entry(path, f"cat/{index}.png") for index in range(3)] == [content(0), content(1), content(2)]


def test_a_flipped_bit_in_any_header_is_refused(tmp_path):
    data, path = tar_bytes(), tmp_path / "flipped.tar"
    for member in range(9):
        for offset in range(0, 345, 23):
            flipped = bytearray(data)
            flipped[member * MEMBER_BYTES + offset] ^= 1
            path.write_bytes(flipped)
            assert "not a complete tar file" in refusal(path)
    path.with_suffix(".tar.gz").write_bytes(gzip.compress(flipped))
    assert "damaged header" in refusal(path.with_suffix(".tar.gz"))
    path.write_bytes(data + data)
    assert "another archive behind the end mark" in refusal(path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_all_formats(tmp_path, form):
    (tmp_path / "long.tar").write_bytes(tar_bytes(form, prefix="n" * 150))
    entries = list_entries(tmp_path / "long.tar", (".png",))
    assert [entry.name for entry in entries][::4] == [f"{name}/{'n' * 150}{i}.png" for i, name in enumerate(CLASSES)]


def test_the_content_decides_and_not_the_name(tmp_path):
    data = tar_bytes()
    files = {"packed.tar": gzip.compress(data), "plain.tar.gz": data, "xz.tgz": lzma.compress(data), "none": data}
    for name, content_of_file in files.items():
        (tmp_path / name).write_bytes(content_of_file)
        assert len(list_entries(tmp_path / name, (".png",))) == 9


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"Rar!\x1a\x07\x01\x00", "is a RAR archive, which cannot be read; unpack it"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive"),
        (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard"),
        (b"\n<!DOCTYPE html><html>Virus scan warning", "is a web page"),
        (b"something else", "not a complete tar file"),
    ],
)
def test_other_content_is_named(tmp_path, head, words):
    (tmp_path / "x.tar.gz").write_bytes(head + bytes(600))
    assert words in refusal(tmp_path / "x.tar.gz")


def test_hard_links_are_the_file_and_other_links_are_left_out(tmp_path):
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "0.png").write_bytes(b"zero")
    os.link(folder / "a" / "0.png", folder / "a" / "1.png")
    (folder / "README").symlink_to("a/0.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(folder, ".")
    listing = list_files(tmp_path / "x.tar", (".png",))
    assert [entry.name for entry in listing.entries] == ["a/0.png", "a/1.png"]
    assert listing.entries == list_entries(folder, (".png",))
    assert read_entry(tmp_path / "x.tar", "a/1.png") == b"zero"
    assert [(file.name, file.reason) for file in listing.left_out] == [("README", "link")]
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        tar.add(folder / "a" / "0.png", "b/0.png")
        (folder / "a" / "2.png").symlink_to("0.png")
        tar.add(folder / "a" / "2.png", "b/2.png")
    assert "'b/2.png' is a link; pack the archive again with the files themselves" in refusal(tmp_path / "y.tar")
    with tarfile.open(tmp_path / "z.tar", "w") as tar:
        info = tarfile.TarInfo("b/1.png")
        info.type, info.linkname = tarfile.LNKTYPE, "../outside.png"
        tar.addfile(info)
    assert "hard link to '../outside.png', which is not in the archive" in refusal(tmp_path / "z.tar")


def header(size_field, kind=b"0"):
    """A header with any content of the size field, and the right checksum."""
    block = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157], block[148:156] = size_field, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(keywords, member=b""):
    info = tarfile.TarInfo("p")
    info.type, info.size = tarfile.XHDTYPE, len(keywords)
    return info.tobuf(tarfile.USTAR_FORMAT) + keywords + bytes(-len(keywords) % 512) + member


def xz_with_dictionary_of_4_gb(data):
    packed = bytearray(lzma.compress(data))
    packed[packed.index(b"\x21\x01") + 2] = 40
    end = 12 + 4 * (packed[12] + 1)
    packed[end - 4 : end] = struct.pack("<I", zlib.crc32(packed[12 : end - 4]))
    return bytes(packed)


def test_no_size_hangs_or_exhausts_memory(tmp_path):
    sizes = {"negative": b"\xff" * 10 + b"\xfe\x00", "huge": b"\x80\0\0\0\x7f" + b"\xff" * 7, "text": b"77777777777\0"}
    hostile = {
        f"{name}-{kind.decode()}.tar": header(field, kind) + bytes(4096)
        for name, field in sizes.items()
        for kind in (b"0", b"1", b"5", b"9", b"L", b"S", b"x", b"g")
        # The size of a folder or a link means nothing.
        if name != "text" or kind not in b"15"
    }
    member = tar_bytes()
    hostile |= {
        "pax-negative.tar": pax(b"13 size=-512\n", member),
        "pax-huge.tar": pax(b"24 size=999999999999999\n", member),
        "pax-digits.tar": pax(b"1" * 900_000, member),
        "pax-nested.tar": pax(b"10 a=bcde\n") * 5000 + member,
        "sparse.tar": pax(b"30 GNU.sparse.map=0,9999999999\n", member),
        "dictionary.tar.xz": xz_with_dictionary_of_4_gb(member),
        "bomb.tar.gz": gzip.compress(bytes(300 * 2**20)),
        "streams.tar.gz": gzip.compress(b"") * 50_000,
    }
    for name, data in hostile.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", LIMITED, *(str(tmp_path / name) for name in hostile)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == len(hostile)
    for name, line in zip(hostile, lines, strict=True):
        assert line.startswith(f"{tmp_path / name}: "), name
        assert not line.endswith(": read"), name
