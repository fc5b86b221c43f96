"""Caches of Mini-ImageNet: all protocols are read; no code is run, and nothing hangs or exhausts memory."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mini_imagenet_files import assert_refused, by_caches, put

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.mini_imagenet_pickle import read_cache


class Hostile:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((os.system, ("touch {mark}",)), "system"),
        ((eval, ("open('{mark}', 'w')",)), "eval"),
        ((os.mkdir, ("{mark}",)), "mkdir"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_code_of_a_pickle_is_run(call, name, protocol, tmp_path):
    mark = tmp_path / "ran"
    function, (argument,) = call
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(pickle.dumps(Hostile((function, (argument.format(mark=mark),))), protocol=protocol))
    with pytest.raises(DataError, match=rf"refused .*{name}, which is not allowed"):
        read_cache(str(path))
    assert not mark.exists()


def test_only_arrays_strings_and_numbers_are_read(tmp_path):
    path = tmp_path / "x.pkl"

    def error(content) -> str:
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
        read_cache.cache_clear()
        with pytest.raises(DataError) as caught:
            read_cache(str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert "which is not allowed" in error(Path("x"))
    assert "arrays of type 'O8' are refused" in error({"image_data": np.array([object], dtype=object)})
    assert "image_data is not a uint8 array" in error({"image_data": images[0], "class_dict": {}})
    assert "image_data is not a uint8 array" in error([1, 2])
    assert "class_dict is not a dict" in error({"image_data": images, "class_dict": [1]})
    assert "rows of class n01 are not integers below 2" in error({"image_data": images, "class_dict": {"n01": [2]}})
    assert "is not a class name" in error({"image_data": images, "class_dict": {"../n01": [0]}})
    complete = pickle.dumps({"image_data": images, "class_dict": {"n01": [0, 1]}}, protocol=2)
    for length in range(0, len(complete), 7):
        error(complete[:length])
    assert "no such file" in error(b"").lower() or "refused or not readable" in error(b"")
    array, u1 = b"cnumpy.core.multiarray\n_reconstruct\n(tR", b"cnumpy\ndtype\n(S'u1'\ntR"
    states = {
        "an array without content": b"",
        "with a wrong type or content": b"(K\x01(K\x01K\x01K\x01K\x03tK\x05\x89U\x03xxxtb",
        "wrong type or content": b"(K\x01(K\x01K\x01K\x01K\x03t" + u1 + b"\x89K\x03tb",
        "ordinal not in range": b"(K\x01(K\x01K\x01K\x01K\x03t" + u1 + b"\x89X\x03\x00\x00\x00\xe4\xb8\xadtb",
        "of shape (-1, -2, 1, 3)": b"(K\x01(J\xff\xff\xff\xffJ\xfe\xff\xff\xffK\x01K\x03t" + u1 + b"\x89U\x06xxxxxxtb",
    }
    for text, state in states.items():
        message = error(b"\x80\x02}(U\nimage_data" + array + state + b"U\nclass_dict}u.")
        assert text in message
        assert message.startswith(f"{path}: image_data is ")
    # Hashing nested tuples has no bound of depth or time.
    deep = b")" + b"\x85" * 200_000
    wide = b")" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(100))
    for key in (deep, wide):
        assert "a key has type tuple" in error(b"\x80\x02}" + key + b"K\x01s.")
        assert "a key has type tuple" in error(b"\x80\x02}(" + key + b"K\x01u.")
        assert "not allowed" in error(b"\x80\x02(" + key + b"K\x01d.")
        assert "not allowed" in error(b"\x80\x04(" + key + b"\x91.")
        assert "arrays of type no name" in error(b"\x80\x02cnumpy\ndtype\n(" + key + b"tR.")
    assert "state of something that is not an array" in error(b"\x80\x02c_codecs\nencode\n}U\x01aK\x01sb.")
    for lengths in (b"\xff" * 8, b"\xff" * 6 + b"\x00\x00"):
        assert "refused or not readable" in error(b"\x80\x04\x8e" + lengths + b".")


def test_a_wrong_shape_allocates_no_memory(tmp_path):
    path = tmp_path / "x.pkl"
    images = np.zeros((2, 4, 4, 3), np.uint8)
    content = pickle.dumps({"image_data": images, "class_dict": {"n01": [0]}}, protocol=2)
    assert content.count(b"K\x02K\x04K\x04K\x03t") == 1
    path.write_bytes(content.replace(b"K\x02K\x04K\x04K\x03t", b"J\xff\xff\xff\x7fK\x04K\x04K\x03t"))
    read_cache.cache_clear()
    with pytest.raises(DataError, match=r"an array of shape \(2147483647, 4, 4, 3\) with 96 bytes"):
        read_cache(str(path))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("rows", [list, np.array, lambda rows: [np.int64(row) for row in rows]])
def test_caches_of_all_protocols_are_read(tmp_path, protocol, rows):
    path = tmp_path / "x.pkl"
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    content = {"image_data": images, "class_dict": {"n01": rows([3, 0]), "n02": rows([1])}}
    path.write_bytes(pickle.dumps(content, protocol))
    cache = read_cache(str(path))
    assert np.array_equal(cache.images, images)
    assert cache.classes == {"n01": [3, 0], "n02": [1]}


LIMITED = """
import resource, sys
from metagmvae.pipelines.sources.mini_imagenet_pickle import read_cache
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
for path in sys.argv[1:]:
    try:
        read_cache(path)
        print(f"{path}: read")
    except ValueError as error:
        print(error)
"""


def test_no_cache_hangs_or_exhausts_memory(tmp_path):
    array, u1 = b"cnumpy.core.multiarray\n_reconstruct\n(tR", b"cnumpy\ndtype\n(S'u1'\ntR"
    # A tuple of 2**60 elements in 300 bytes: formatting, comparing or hashing it never ends.
    wide = b")" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(60))
    deep = b")" + b"\x85" * 200_000
    images, rows = np.zeros((4, 4, 4, 3), np.uint8), [0] * 9

    def image_data(state: bytes) -> bytes:
        return b"\x80\x02}(U\nimage_data" + array + state + b"U\nclass_dict}u."

    hostile = {
        "shape": image_data(b"(K\x01" + wide + u1 + b"\x89U\x03xxxtb"),
        "shape of tuples": image_data(b"(K\x01(" + wide + b"h\x05t" + u1 + b"\x89U\x03xxxtb"),
        "shape of many": image_data(b"(K\x01(" + b"K\x01" * 2000 + b"t" + u1 + b"\x89U\x03xxxtb"),
        "deep shape": image_data(b"(K\x01" + deep + u1 + b"\x89U\x03xxxtb"),
        "order": image_data(b"(K\x01(K\x01K\x01K\x01K\x03t" + u1 + wide + b"U\x03xxxtb"),
        "content": image_data(b"(K\x01(K\x01K\x01K\x01K\x03t" + u1 + b"\x89" + wide + b"tb"),
        "encoding": b"\x80\x02c_codecs\nencode\n(U\x01a" + wide + b"h\x05\x86tR.",
        "encoding alone": b"\x80\x02c_codecs\nencode\n(U\x01a(" + wide + b"ttR.",
        "scalar": b"\x80\x02cnumpy.core.multiarray\nscalar\n(" + u1 + b"(" + wide + b"ttR.",
        "dtype": b"\x80\x02cnumpy\ndtype\n((" + wide + b"ttR.",
        "buffer": b"\x80\x05cnumpy.core.numeric\n_frombuffer\n(U\x03xxx" + u1 + b"(" + wide + b"tU\x01CtR.",
        "long byte array": b"\x80\x05\x96" + (10**12).to_bytes(8, "little") + b".",
        "long bytes": b"\x80\x05\x8e" + (10**12).to_bytes(8, "little") + b".",
        "long text": b"\x80\x05\x8d" + (10**12).to_bytes(8, "little") + b".",
        "long frame": b"\x80\x05\x95" + (10**12).to_bytes(8, "little") + b".",
        "long integer": b"I" + b"9" * 100_000 + b"\n.",
        "many lists": b"\x80\x04" + b"]" * 6_000_000 + b".",
        "rows": pickle.dumps({"image_data": images, "class_dict": {f"n{n}": rows for n in range(1000)}}),
        "rows of no images": pickle.dumps({"image_data": images[:0], "class_dict": {"n01": []}}),
    }
    paths = [tmp_path / f"{number}.pkl" for number in range(len(hostile))]
    for path, data in zip(paths, hostile.values(), strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-c", LIMITED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == len(hostile)
    for name, path, line in zip(hostile, paths, lines, strict=True):
        assert line.startswith(f"{path}: "), name
        assert not line.endswith(": read"), name
        assert len(line) < 1000, name


def test_a_web_page_in_place_of_a_cache_is_called_one(tmp_path):
    root = by_caches(tmp_path / "data")
    put(root / "mini-imagenet-cache-val.pkl", b"<!DOCTYPE html><html>Google Drive - Virus scan warning")
    assert_refused("mini-imagenet-cache-val.pkl: is a web page, not the file", root)


def test_rows_are_checked(tmp_path):
    images = np.zeros((4, 4, 4, 3), np.uint8)
    for classes, words in (
        ({"n01": [0, 1, 2], "n02": [3, 0]}, "more than 4 rows"),
        ({"n01": [0, 0]}, "a row of class n01 is there twice"),
        ({"n01": [True]}, "not integers below 4"),
    ):
        path = tmp_path / "x.pkl"
        path.write_bytes(pickle.dumps({"image_data": images, "class_dict": classes}))
        read_cache.cache_clear()
        with pytest.raises(DataError, match=words):
            read_cache(str(path))
