"""Ray tasks write the same shards as one process, also when a worker is lost or a task fails."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from called_commands import answer_of, refusal_of
from folder_contents import contents
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
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for row in range(60):
        (folder / f"class{row % 6}").mkdir(exist_ok=True)
        image = np.random.default_rng(row).integers(0, 256, (40, 30), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"class{row % 6}" / f"{row}.png")
    return folder


@pytest.mark.parametrize("workers", [1, 3])
def test_shards_do_not_depend_on_the_number_of_workers(glyphs, tmp_path, workers):
    write_dataset(glyphs, tmp_path / "here", **SMALL)
    progress = []
    with ray_map(workers) as map_tasks:
        options = {"map_tasks": map_tasks, "on_progress": lambda *counts: progress.append(counts)}
        write_dataset(glyphs, tmp_path / "ray", **options, **SMALL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    shards = len(list((tmp_path / "ray").rglob("*.tar")))
    assert shards > 6
    assert progress == [(done, shards) for done in range(1, shards + 1)]


def test_workers_read_relative_folders(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(image_folder.parent)
    request = ["prepare", "folder", "--source", image_folder.name, "--size", "12"]
    assert main([*request, "--out", "by-ray", "--workers", "2"]) == 0
    assert main([*request, "--out", str(tmp_path / "here")]) == 0
    assert contents(image_folder.parent / "by-ray") == contents(tmp_path / "here")
    assert verify_dataset(image_folder.parent / "by-ray") == []
    assert "--workers is -1" in refusal_of(*request, "--out", tmp_path / "none", "--workers", "-1")
    assert not (tmp_path / "none").exists()


def test_workers_report_unreadable_images(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("metagmvae.pipelines.sources.image_scan.IMAGES_PER_TASK", 7)
    copy = shutil.copytree(image_folder, tmp_path / "images")
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    for path in (files[3], files[-1]):
        path.write_bytes(b"not an image")
    request = ["prepare", "folder", "--source", str(copy), "--size", "12", "--max-broken", "0.5"]
    answers = []
    for name, more in (("by-ray", ["--workers", "2"]), ("here", [])):
        answers.append(answer_of(*request, "--out", tmp_path / name, *more))
    broken = [path.relative_to(copy).as_posix() for path in (files[3], files[-1])]
    assert [skipped["name"] for skipped in answers[0]["skipped"]] == broken
    assert answers[0]["skipped"] == answers[1]["skipped"]
    assert contents(tmp_path / "by-ray") == contents(tmp_path / "here")


def test_task_of_a_lost_worker_is_run_again(glyphs, tmp_path):
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


def test_after_a_failed_task_running_tasks_end_and_no_new_task_starts(tmp_path):
    """Repeated 20 times, because cancelling the running tasks would sometimes abort this process."""

    def task(folder, number):
        failing = Path(folder) / "1"
        if number == 1:
            failing.touch()
            raise DataError("the second one failed")
        (Path(folder) / str(number)).touch()
        while not failing.exists():  # its worker may start much later than the first
            time.sleep(0.01)
        time.sleep(0.1)
        return number

    with ray_map(3) as map_tasks:
        for attempt in range(20):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            with pytest.raises(DataError, match="the second one failed"):
                list(map_tasks(task, [(str(folder), number) for number in range(50)]))
            started = {int(path.name) for path in folder.iterdir()}
            assert {0, 1} <= started
            assert len(started) < 50
            assert started == {int(path.name) for path in folder.iterdir()}


def test_error_of_a_task_is_raised_unchanged_and_the_dataset_can_be_finished_later(glyphs, tmp_path):
    def broken(source, split, rows, path, block):
        if path.endswith("train/shard-000002.tar"):
            raise DataError(f"{path}: no space; make some")
        return write_shard(source, split, rows, path, block)

    with ray_map(1) as map_tasks:
        with pytest.raises(DataError, match=r"^/.*shard-000002\.tar: no space; make some$"):
            write_dataset(glyphs, tmp_path / "ray", map_tasks=lambda _, tasks: map_tasks(broken, tasks), **SMALL)
        assert len(list((tmp_path / "ray").rglob("*.tar"))) == 2
        assert not (tmp_path / "ray" / "dataset.json").exists()
        write_dataset(glyphs, tmp_path / "ray", map_tasks=map_tasks, **SMALL)
    write_dataset(glyphs, tmp_path / "here", **SMALL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
