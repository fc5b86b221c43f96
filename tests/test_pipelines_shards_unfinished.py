"""Writers of one folder exclude each other; a start finishes or undoes what a killed one left."""

import subprocess
import sys
import time

import pytest
from folder_contents import contents

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.unfinished import LOCK, PLAN
from metagmvae.pipelines.shards.verify import verify_dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

WRITE = """
import os, pathlib, sys, time
from metagmvae.pipelines.shards import writer
from metagmvae.pipelines.sources.source import open_source

folder, change, name = sys.argv[1:]
def die_before(function):
    def call(*arguments, **options):
        if pathlib.Path(arguments[-1]).name == name:
            os._exit(9)
        return function(*arguments, **options)
    return call
def wait_before(function):
    def call(*arguments, **options):
        open(name, "w").close()
        while os.path.exists(name):
            time.sleep(0.01)
        return function(*arguments, **options)
    return call
if change == "replace":
    os.replace = die_before(os.replace)
elif change == "unlink":
    pathlib.Path.unlink = die_before(pathlib.Path.unlink)
else:
    writer.write_shard = wait_before(writer.write_shard)
writer.write_dataset(open_source("glyphs", classes=(4, 3, 3), drawings=4), folder, block=4, shard_rows=8)
"""


def write(folder):
    return write_dataset(open_source("glyphs", classes=(4, 3, 3), drawings=4), folder, block=4, shard_rows=8)


def start(folder, change, name):
    return subprocess.Popen([sys.executable, "-c", WRITE, str(folder), change, str(name)])


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected") / "data"
    write(folder)
    return contents(folder)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("replace", PLAN),
        ("replace", "shard-000001.tar"),
        ("replace", "index.parquet"),
        ("replace", "dataset.json"),
        ("unlink", PLAN),
        ("unlink", LOCK),
    ],
)
def test_a_killed_writer_is_finished_by_the_next_one(tmp_path, expected, change, name):
    folder = tmp_path / "data"
    assert start(folder, change, name).wait(60) == 9
    assert contents(folder) != expected
    write(folder)
    assert contents(folder) == expected
    assert verify_dataset(folder) == []


def test_what_a_killed_writer_left_beside_a_finished_dataset_is_named(tmp_path):
    start(tmp_path / "data", "unlink", PLAN).wait(60)
    assert Dataset.open(tmp_path / "data").splits == ["train", "validation", "test"]
    problems = verify_dataset(tmp_path / "data")
    assert {(problem.kind, problem.path) for problem in problems} == {("foreign", PLAN), ("foreign", LOCK)}
    assert all("left by a stopped `metagmvae prepare`; run it again" in problem.detail for problem in problems)


def test_two_writers_of_one_folder_exclude_each_other(tmp_path, expected):
    folder, waiting = tmp_path / "data", tmp_path / "waiting"
    first = start(folder, "wait", waiting)
    while not waiting.exists():
        assert first.poll() is None
        time.sleep(0.01)
    with pytest.raises(DataError, match=r"data: another process writes this dataset; wait for it"):
        write(folder)
    while first.poll() is None:
        waiting.unlink(missing_ok=True)
        time.sleep(0.01)
    assert first.returncode == 0
    assert contents(folder) == expected


def test_no_lock_is_left_in_a_folder_of_something_else(tmp_path):
    (tmp_path / ".writing.jsonx").write_text("mine")
    with pytest.raises(DataError, match="not empty and not a dataset"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".writing.jsonx"]


def test_names_that_are_not_utf8_are_refused_before_anything_is_written(tmp_path):
    source = open_source("glyphs", classes=(4, 3, 3), drawings=4)
    record = source.splits["train"][0]
    object.__setattr__(record, "class_name", "caf\udce9")
    with pytest.raises(DataError, match=r"the name 'caf\\udce9' is not UTF-8; rename it"):
        write_dataset(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()
