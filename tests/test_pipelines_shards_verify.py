"""`verify_dataset` reports every damaged file with the kind of damage."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metagmvae.pipelines.files import sha256_file
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.verify import Problem, verify_dataset
from metagmvae.pipelines.shards.writer import PLAN, write_dataset
from metagmvae.pipelines.sources.source import open_source


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "data"
    write_dataset(open_source("glyphs", classes=(6, 3, 3), drawings=10), folder, block=8, shard_rows=16)
    return folder


@pytest.fixture
def data(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "data")


def problems(root) -> set[tuple[str, str]]:
    return {(problem.kind, problem.path) for problem in verify_dataset(root)}


def edit(root, change) -> None:
    manifest = json.loads((root / "dataset.json").read_text())
    change(manifest)
    (root / "dataset.json").write_text(json.dumps(manifest))


def test_an_intact_dataset_has_no_problems_and_all_files_are_compared(data):
    progress = []
    assert verify_dataset(data, lambda done, total: progress.append((done, total))) == []
    files = len(list(data.rglob("*.tar"))) + len(list(data.rglob("*.parquet")))
    assert progress == [(done, files) for done in range(1, files + 1)]


def test_all_damaged_files_are_reported_at_once(data):
    shards = sorted((data / "train").glob("*.tar"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-512])
    flipped = bytearray(shards[2].read_bytes())
    flipped[700] ^= 1
    shards[2].write_bytes(flipped)
    (data / "test" / "index.parquet").unlink()
    (data / "validation" / "notes.txt").write_text("mine")
    (data / "train" / "shard-000099.tar").write_bytes(b"")
    (data / "extra").mkdir()
    assert problems(data) == {
        ("missing", f"train/{shards[0].name}"),
        ("truncated", f"train/{shards[1].name}"),
        ("altered", f"train/{shards[2].name}"),
        ("missing", "test/index.parquet"),
        ("foreign", "validation/notes.txt"),
        ("foreign", "train/shard-000099.tar"),
        ("foreign", "extra"),
    }


def test_a_wrong_index_whose_sha256_is_in_the_manifest(data):
    path = data / "train" / "index.parquet"
    table = pq.read_table(path)
    moved = table.set_column(2, "offset", pa.array([o + 1 for o in table["offset"].to_pylist()], pa.int64()))
    pq.write_table(moved.slice(1), path)
    edit(data, lambda manifest: manifest["splits"]["train"].update(index_sha256=sha256_file(path), classes=99))
    details = [problem.detail for problem in verify_dataset(data)]
    assert len(details) == 3
    assert "its shards or offsets are wrong" in details[0]
    assert "59 rows, but 60 in the manifest" in details[1]
    assert "6 classes, but 99 in the manifest" in details[2]


def test_an_unfinished_dataset(data):
    (data / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"no dataset\.json"):
        verify_dataset(data)
    (data / PLAN).write_text("{}")
    (problem,) = verify_dataset(data)
    assert isinstance(problem, Problem)
    assert problem.kind == "unfinished"
    assert "metagmvae prepare" in problem.detail


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(schema_version=99), "schema version 1"),
        (lambda m: m.update(splits=[]), r"splits = \[\]"),
        (lambda m: m["splits"].update({"../train": {}}), r'= "../train": string should match pattern'),
        (
            lambda m: m["splits"]["train"].update(samples="60"),
            'splits.train.samples = "60": input should be a valid integer',
        ),
        (lambda m: m["splits"]["train"]["shards"][0].update(name="../../secret"), r'shards.0.name = "../../secret"'),
        (lambda m: m["splits"]["train"]["shards"][0].update(name="/etc/passwd"), 'shards.0.name = "/etc/passwd"'),
        (lambda m: m["splits"]["train"]["shards"].append(7), "= 7: input should be"),
        (lambda m: m["splits"]["train"]["shards"][0].update(sha256="x"), 'shards.0.sha256 = "x"'),
        (lambda m: m["splits"]["train"]["shards"][0].pop("bytes"), "shards.0.bytes is missing"),
    ],
)
def test_a_damaged_or_hostile_manifest_is_refused(data, change, reason):
    edit(data, change)
    with pytest.raises(DataError, match=reason) as caught:
        verify_dataset(data)
    assert "\n" not in str(caught.value)
