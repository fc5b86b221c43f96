"""Shards written by Ray tasks are those of one process, whatever happens to the workers."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from metagmvae.infra.cli import main
from metagmvae.infra.cluster.connect import cluster
from metagmvae.infra.cluster.tasks import ray_map
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.verify import verify_dataset
from metagmvae.pipelines.shards.writer import write_dataset, write_shard
from metagmvae.pipelines.sources.source import open_source

pytestmark = pytest.mark.ray

SMALL = {"block": 16, "shard_rows": 32}


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    with cluster("", 3):
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield


@pytest.fixture(scope="module")
def glyphs():
    return open_source("glyphs", classes=(12, 4, 4), drawings=10)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for row in range(60):
        (folder / f"class{row % 6}").mkdir(exist_ok=True)
        image = np.random.default_rng(row).integers(0, 256, (40, 30), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"class{row % 6}" / f"{row}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_bytes_for_any_number_of_workers(glyphs, tmp_path, workers):
    write_dataset(glyphs, tmp_path / "here", **SMALL)
    told = []
    with ray_map(workers) as map_tasks:
        write_dataset(glyphs, tmp_path / "ray", map_tasks=map_tasks, on_progress=lambda *at: told.append(at), **SMALL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    shards = len(list((tmp_path / "ray").rglob("*.tar")))
    assert shards > 6
    assert told == [(done, shards) for done in range(1, shards + 1)]


def test_the_command_reads_relative_folders_in_the_workers(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pictures.parent)
    request = ["prepare", "folder", "--source", pictures.name, "--size", "12", "--json"]
    assert main([*request, "--out", "by-ray", "--workers", "2"]) == 0
    assert main([*request, "--out", str(tmp_path / "here")]) == 0
    assert contents(pictures.parent / "by-ray") == contents(tmp_path / "here")
    assert verify_dataset(pictures.parent / "by-ray") == []
    assert main([*request, "--out", str(tmp_path / "none"), "--workers", "-1"]) == 2
    assert "--workers is -1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_broken_pictures_are_found_by_the_workers_too(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("metagmvae.pipelines.sources.image_folder.AT_ONCE", 7)
    there = shutil.copytree(pictures, tmp_path / "pictures")
    files = sorted(path for path in there.rglob("*") if path.is_file())
    for path in (files[3], files[-1]):
        path.write_bytes(b"not a picture")
    request = ["prepare", "folder", "--source", str(there), "--size", "12", "--max-broken", "0.5", "--json"]
    answers = []
    for name, more in (("by-ray", ["--workers", "2"]), ("here", [])):
        assert main([*request, "--out", str(tmp_path / name), *more]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [each["name"] for each in answers[0]["skipped"]] == [
        p.relative_to(there).as_posix() for p in (files[3], files[-1])
    ]
    assert answers[0]["skipped"] == answers[1]["skipped"]
    assert contents(tmp_path / "by-ray") == contents(tmp_path / "here")


def test_a_lost_worker_is_replaced(glyphs, tmp_path):
    mark = tmp_path / "killed"

    def once(source, split, rows, path, block):
        if path.endswith("train/shard-000001.tar") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return write_shard(source, split, rows, path, block)

    with ray_map(2) as map_tasks:
        write_dataset(glyphs, tmp_path / "ray", map_tasks=lambda _, tasks: map_tasks(once, tasks), **SMALL)
    assert mark.exists()
    write_dataset(glyphs, tmp_path / "here", **SMALL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


def test_tasks_beside_one_that_failed_end_and_nothing_is_begun_after_it(tmp_path):
    """Twenty times: what is given up must not be cancelled, which would abort this process now and then."""

    def task(folder, number):
        failing = Path(folder) / "1"
        if number == 1:
            failing.touch()
            raise DataError("the second one failed")
        (Path(folder) / str(number)).touch()
        while not failing.exists():  # its worker may start long after the first
            time.sleep(0.01)
        time.sleep(0.1)
        return number

    with ray_map(3) as map_tasks:
        for attempt in range(20):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            with pytest.raises(DataError, match="the second one failed"):
                list(map_tasks(task, [(str(folder), number) for number in range(50)]))
            begun = {int(path.name) for path in folder.iterdir()}
            assert {0, 1} <= begun
            assert len(begun) < 50
            assert begun == {int(path.name) for path in folder.iterdir()}


def test_an_error_in_a_task_is_ours_again_and_the_rest_can_be_finished_later(glyphs, tmp_path):
    def broken(source, split, rows, path, block):
        if path.endswith("train/shard-000002.tar"):
            raise DataError(f"{path}: no room; make some")
        return write_shard(source, split, rows, path, block)

    with ray_map(1) as map_tasks:
        with pytest.raises(DataError, match=r"^/.*shard-000002\.tar: no room; make some$"):
            write_dataset(glyphs, tmp_path / "ray", map_tasks=lambda _, tasks: map_tasks(broken, tasks), **SMALL)
        assert len(list((tmp_path / "ray").rglob("*.tar"))) == 2
        assert not (tmp_path / "ray" / "dataset.json").exists()
        write_dataset(glyphs, tmp_path / "ray", map_tasks=map_tasks, **SMALL)
    write_dataset(glyphs, tmp_path / "here", **SMALL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
