"""`verify_dataset` reports every damaged file with the kind of damage."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metagmvae.pipelines.files import sha256_file
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.unfinished import PLAN
from metagmvae.pipelines.shards.verify import Problem, verify_dataset
from metagmvae.pipelines.shards.writer import write_dataset
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


def replace_index(data, change) -> None:
    """Write a changed index of the training split, with its sha256 in the manifest."""
    path = data / "train" / "index.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    edit(data, lambda manifest: manifest["splits"]["train"].update(index_sha256=sha256_file(path)))


def changed_column(name, change):
    """A function that changes the values of one column of an index."""

    def apply(table):
        position, field = table.schema.get_field_index(name), table.schema.field(name)
        values = pa.array([change(value) for value in table[name].to_pylist()], field.type)
        return table.set_column(position, field, values)

    return apply


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.slice(1), "index of 59 rows, but 60 in the manifest"),
        (changed_column("offset", lambda offset: offset + 1), "its columns offset do not fit the shards"),
        (changed_column("row", lambda row: 59 - row), "its columns row do not fit"),
        (changed_column("class_id", lambda class_id: class_id + 1), "not 0 to 5 as in the manifest"),
        (changed_column("class_id", lambda class_id: max(class_id, 1)), "class_id has 5 values"),
        (changed_column("class_name", lambda name: "same"), "several classes one name"),
        (changed_column("key", lambda key: None), "empty cells"),
        (changed_column("key", lambda key: "k" * 100_000), "bytes in 60 rows"),
        (lambda table: table.drop_columns(["row"]), "not an index of this program"),
    ],
)
def test_a_wrong_index_whose_sha256_is_in_the_manifest(data, change, reason):
    replace_index(data, change)
    (problem,) = verify_dataset(data)
    assert (problem.kind, problem.path) == ("inconsistent", "train/index.parquet")
    assert reason in problem.detail


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
        (lambda m: m["splits"]["train"]["shards"].append(7), "= 7: a table of keys and values is needed"),
        (lambda m: m["splits"]["train"]["shards"][0].update(sha256="x"), 'shards.0.sha256 = "x"'),
        (lambda m: m["splits"]["train"]["shards"][0].pop("bytes"), "shards.0.bytes is missing"),
    ],
)
def test_a_damaged_or_hostile_manifest_is_refused(data, change, reason):
    edit(data, change)
    with pytest.raises(DataError, match=reason) as caught:
        verify_dataset(data)
    assert "\n" not in str(caught.value)
