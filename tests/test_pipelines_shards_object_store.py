"""Data sets in an object store, against a real S3 server."""

import json
import shutil

import numpy as np
import object_store
import pytest

from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.object_store import RemotePrefix, publish
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with object_store.running(tmp_path_factory.mktemp("weed")) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _environment(endpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
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


def test_a_remote_data_set_reads_like_a_local_one_and_only_what_is_asked_for(local, uri, tmp_path):
    here, there = Dataset.open(local), Dataset.open(uri)
    assert there.fingerprint == here.fingerprint
    assert cached(tmp_path) == {"dataset.json"}
    np.testing.assert_array_equal(there.images("test"), here.images("test"))
    np.testing.assert_array_equal(there.labels("test"), here.labels("test"))
    assert {name.split("/")[0] for name in cached(tmp_path)} == {"dataset.json", "test"}
    np.testing.assert_array_equal(there.images("train", "mmap")[:], here.images("train"))


def test_a_whole_copy_is_not_fetched_again(uri, tmp_path, monkeypatch):
    Dataset.open(uri).images("train")
    fetched = []
    real = RemotePrefix.fetch
    monkeypatch.setattr(
        RemotePrefix, "fetch", lambda self, name, *rest: (fetched.append(name), real(self, name, *rest))
    )
    Dataset.open(uri).images("train")
    assert fetched == ["dataset.json"]


def test_an_altered_shard_is_refused_and_leaves_nothing(local, uri, tmp_path):
    shard = sorted((local / "train").glob("*.tar"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[700] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    RemotePrefix(uri).put(tmp_path / "damaged", f"train/{shard.name}")
    with pytest.raises(DataError, match=rf"train/{shard.name} was altered after it was written"):
        Dataset.open(uri).images("train")
    assert cached(tmp_path) == {"dataset.json"}
    assert main(["verify", uri]) == 1


def test_publishing_goes_on_where_it_stopped_and_refuses_another_data_set(local, uri, tmp_path, monkeypatch):
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
    with pytest.raises(DataError, match="holds another data set"):
        publish(other, uri)


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
        ("s3://nobody/here", r"no dataset\.json there|does not exist"),
        ("s3://data/nothing", r"no dataset\.json there"),
        ("nonsense://x/y", r"not an address of an object store"),
    ],
)
def test_addresses_that_hold_nothing(address, reason, tmp_path):
    with pytest.raises(DataError, match=reason) as caught:
        Dataset.open(address)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_wrong_credentials_are_named_as_the_reason(uri, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match="look at credentials"):
        Dataset.open(uri)


def test_a_manifest_that_leads_out_of_the_cache_is_refused(local, tmp_path):
    evil = shutil.copytree(local, tmp_path / "evil")
    manifest = json.loads((evil / "dataset.json").read_text())
    manifest["splits"]["train"]["shards"][0]["name"] = "../../../escaped.tar"
    (evil / "dataset.json").write_text(json.dumps(manifest))
    RemotePrefix("s3://data/evil").put(evil / "dataset.json", "dataset.json")
    with pytest.raises(DataError, match="is not the name of a shard"):
        Dataset.open("s3://data/evil")
