"""Datasets in an object store, on a real S3 server."""

import contextlib
import itertools
import json
import shutil

import numpy as np
import pytest
from object_store import s3_server
from photographs import SIDE, write_pictures

from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.shards import object_store
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.object_store import RemotePrefix, publish
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(autouse=True)
def _environment(server, monkeypatch, tmp_path):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("METAGMVAE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "data"
    write_dataset(open_source("glyphs", classes=(6, 3, 3), drawings=10), folder, block=8, shard_rows=16)
    return folder


@pytest.fixture
def uri(local, request):
    address = f"s3://data/{request.node.name}"
    publish(local, address)
    return address


def cached(tmp_path) -> set[str]:
    (root,) = (tmp_path / "cache" / "datasets").iterdir()
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_a_remote_dataset_equals_the_local_one_and_only_requested_splits_are_copied(local, uri, tmp_path):
    original, remote = Dataset.open(local), Dataset.open(uri)
    assert remote.fingerprint == original.fingerprint
    assert cached(tmp_path) == {"dataset.json"}
    np.testing.assert_array_equal(remote.images("test"), original.images("test"))
    np.testing.assert_array_equal(remote.labels("test"), original.labels("test"))
    assert {name.split("/")[0] for name in cached(tmp_path)} == {"dataset.json", "test"}
    np.testing.assert_array_equal(remote.images("train", "mmap")[:], original.images("train"))


def test_a_remote_dataset_of_encoded_images_equals_the_local_one(tmp_path):
    source = open_source("folder", str(write_pictures(tmp_path / "pictures", 2)), size=SIDE, validation_classes=0)
    write_dataset(source, tmp_path / "data", store="encoded", shard_rows=8)
    publish(tmp_path / "data", "s3://data/encoded")
    original, remote = Dataset.open(tmp_path / "data"), Dataset.open("s3://data/encoded")
    for reader in ("memory", "mmap"):
        np.testing.assert_array_equal(remote.images("train", reader)[:], original.images("train"))
    streams = [StreamedImages(dataset, "train", 4).rows(0, 0, 1, 0) for dataset in (original, remote)]
    for _, one, other in zip(range(30), *streams, strict=False):
        np.testing.assert_array_equal(one, other)
    assert main(["verify", "s3://data/encoded"]) == 0


def test_a_complete_copy_is_not_downloaded_again(uri, tmp_path, monkeypatch):
    Dataset.open(uri).images("train")
    fetched = []
    real = RemotePrefix.fetch
    monkeypatch.setattr(
        RemotePrefix, "fetch", lambda self, name, *rest: (fetched.append(name), real(self, name, *rest))
    )
    Dataset.open(uri).images("train")
    assert fetched == ["dataset.json"]


def test_an_altered_shard_is_refused_and_not_kept(local, uri, tmp_path):
    shard = sorted((local / "train").glob("*.tar"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[700] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    RemotePrefix(uri).put(tmp_path / "damaged", f"train/{shard.name}")
    with pytest.raises(DataError, match=rf"train/{shard.name} was altered after writing"):
        Dataset.open(uri).images("train")
    with pytest.raises(DataError, match=rf"train/{shard.name} was altered after writing"):
        list(itertools.islice(StreamedImages(Dataset.open(uri), "train", 4).rows(0, 0, 1, 0), 60))
    assert cached(tmp_path) == {"dataset.json"}
    assert main(["verify", uri]) == 1
    (tmp_path / "damaged").write_bytes(bytes(10**6))
    RemotePrefix(uri).put(tmp_path / "damaged", f"train/{shard.name}")
    with pytest.raises(DataError, match=rf"train/{shard.name} has more than \d+,\d+ bytes"):
        Dataset.open(uri).images("train")


def test_a_remote_dataset_is_streamed_without_a_copy(local, uri, tmp_path):
    rows = itertools.islice(StreamedImages(Dataset.open(uri), "train", 4).rows(0, 0, 1, 0), 60)
    expected = itertools.islice(StreamedImages(Dataset.open(local), "train", 4).rows(0, 0, 1, 0), 60)
    np.testing.assert_array_equal(list(rows), list(expected))
    assert cached(tmp_path) == {"dataset.json"}


def test_publish_continues_an_interrupted_upload_and_refuses_another_dataset(local, uri, tmp_path, monkeypatch):
    sent = []
    real = RemotePrefix.put
    monkeypatch.setattr(RemotePrefix, "put", lambda self, path, name: (sent.append(name), real(self, path, name)))
    half = uri + "-half"
    RemotePrefix(half).put(local / "train" / "index.parquet", "train/index.parquet")
    sent.clear()
    publish(local, half)
    files = {p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()}
    assert set(sent) == files - {"train/index.parquet"}
    assert sent[-1] == "dataset.json"
    sent.clear()
    publish(local, uri)
    assert sent == []
    other = tmp_path / "other"
    write_dataset(open_source("glyphs", classes=(3, 3, 3), drawings=10), other)
    with pytest.raises(DataError, match="contains another dataset"):
        publish(other, uri)


def test_publish_keeps_no_shard_of_another_dataset_whose_upload_was_interrupted(local, tmp_path, request):
    """The shards of both datasets have the same names and sizes."""
    other, uri = tmp_path / "other", f"s3://data/{request.node.name}"
    write_dataset(open_source("glyphs", classes=(6, 3, 3), drawings=10), other, block=8, shard_rows=16, seed=1)
    shard = "train/shard-000000.tar"
    assert (other / shard).stat().st_size == (local / shard).stat().st_size
    assert (other / shard).read_bytes() != (local / shard).read_bytes()
    RemotePrefix(uri).put(other / shard, shard)
    publish(local, uri)
    np.testing.assert_array_equal(Dataset.open(uri).images("train"), Dataset.open(local).images("train"))


@pytest.mark.parametrize("name", ["with space", "données-图", "a+b&c=d%20e", "#1"])
def test_keys_with_spaces_and_other_letters(local, name):
    uri = f"s3://data/{name}"
    publish(local, uri)
    np.testing.assert_array_equal(Dataset.open(uri).images("test"), Dataset.open(local).images("test"))
    stored = RemotePrefix("s3://data").sizes()
    assert f"{name.replace('%20', ' ')}/dataset.json" in stored  # a URI may have its spaces quoted


def test_prepare_train_and_verify_by_uri(tmp_path, capsys):
    uri = "s3://data/by-command"
    assert main(["prepare", "glyphs", "--out", uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == uri
    assert not list((tmp_path / "cache" / "writing").iterdir())
    assert main(["verify", uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    small = {"model.channels": 8, "model.width": 32, "train.steps": 2, "train.set_size": 10, "train.samples": 4}
    off = {"validation.every": 0, "tracking.enabled": "false", "run.figures": "false", "run.out": tmp_path / "run"}
    options = [f"--set={key}={value}" for key, value in (small | off | {"data.uri": uri}).items()]
    assert main(["train", "omniglot-5way", *options]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"] == uri


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("s3://nobody/here", r"dataset\.json does not exist|bucket"),
        ("s3://data/nothing", r"dataset\.json does not exist"),
        ("nonsense://x/y", r"not an address of an object store"),
    ],
)
def test_addresses_without_a_dataset(address, reason, tmp_path):
    with pytest.raises(DataError, match=reason) as caught:
        Dataset.open(address)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_the_error_names_wrong_credentials(uri, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match="check region, endpoint and credentials"):
        Dataset.open(uri)


def test_a_shard_name_that_points_outside_the_cache_is_refused(local, tmp_path):
    evil = shutil.copytree(local, tmp_path / "evil")
    manifest = json.loads((evil / "dataset.json").read_text())
    manifest["splits"]["train"]["shards"][0]["name"] = "../../../escaped.tar"
    (evil / "dataset.json").write_text(json.dumps(manifest))
    RemotePrefix("s3://data/evil").put(evil / "dataset.json", "dataset.json")
    with pytest.raises(DataError, match=r"shards\.0\.name = .*escaped\.tar"):
        Dataset.open("s3://data/evil")


class StopsServer:
    """A stream of a remote file whose server stops after the first read."""

    def __init__(self, source, server):
        self.source, self.server, self.reads = source, server, 0

    def read(self, size):
        if self.reads:
            self.server.stop()
        self.reads += 1
        return self.source.read(size)


def test_a_store_that_stops_during_a_download_is_the_reported_cause(local, tmp_path, monkeypatch):
    shard = sorted((local / "train").glob("*.tar"))[0]
    with s3_server(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        remote = RemotePrefix("s3://data/stopping")
        remote.put(shard, shard.name)
        original_open = remote.open

        @contextlib.contextmanager
        def open_until_stopped(name):
            with original_open(name) as source:
                yield StopsServer(source, server)

        monkeypatch.setattr(remote, "open", open_until_stopped)
        monkeypatch.setattr(object_store, "CHUNK", 1024)
        target = tmp_path / "target" / shard.name
        with pytest.raises(
            DataError, match=rf"^s3://data/stopping \({shard.name}\): .*; check region, endpoint and credentials"
        ) as error:
            remote.fetch(shard.name, target)
    assert "cannot be written" not in str(error.value)
    assert list(target.parent.iterdir()) == []
