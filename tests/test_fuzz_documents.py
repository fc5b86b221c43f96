"""Readers of documents on any bytes: they return a valid object or raise an error of this project, in bounded memory.

The suite tries few examples, the same every time. METAGMVAE_FUZZ=5000 tries that many new ones. Inputs that were once
answered wrongly stay here as explicit examples.
"""

import copy
import io
import json
import os
import pickle
import resource
import shutil
import zipfile
from datetime import timedelta
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from metagmvae.configs.load import SettingsError, load_settings, to_toml
from metagmvae.configs.schema import ModelSettings, Settings
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.blocks import shard_blocks
from metagmvae.pipelines.shards.index import read_index
from metagmvae.pipelines.shards.manifest import MANIFEST, read_manifest
from metagmvae.pipelines.sources.mini_imagenet_pickle import read_cache
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.checkpoint import CheckpointError, load_state, random_state, save_state
from metagmvae.training.trainer.package import CARD, LoadedModel, load_model, load_package, save_package

MOST_MB = 400
"""Growth of the memory of the process in one test."""
EXAMPLES = int(os.environ.get("METAGMVAE_FUZZ", "40"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize="METAGMVAE_FUZZ" not in os.environ,
    database=None,
    deadline=timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
)
SMALL = Settings(model=ModelSettings(latent=4, channels=4, width=8, heads=2, layers=1))
SHAPE = (1, 12, 12)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**9, 10**4000])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../x", "/etc/passwd", "train", "a" * 10_000, "\x1b[31m", "\udcff"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
kinds = st.sampled_from(["set", "insert", "cut", "end"])
edits = st.lists(st.tuples(st.integers(0, 2**20), kinds, st.binary(max_size=9)), max_size=8)
"""Changes of bytes: position, kind, new bytes."""
replacements = st.lists(st.tuples(st.integers(0, 2**16), st.booleans(), values), min_size=1, max_size=3)
"""Changes of a tree: number of the place, whether it is deleted, new value."""


@pytest.fixture(autouse=True)
def _memory_is_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MB * 1024


def edit_bytes(content, changes):
    def apply(content, change):
        position, kind, new = change
        position %= len(content) + 1
        after = {"set": position + len(new), "insert": position, "cut": position + 64, "end": len(content)}[kind]
        return content[:position] + new + content[after:]

    return reduce(apply, changes, content)


def edit_tree(tree, changes):
    """Replace or delete values of a nested document."""
    tree = copy.deepcopy(tree)
    for number, delete, value in changes:
        places = list(_places(tree))
        if places:
            parent, key = places[number % len(places)]
            if delete:
                del parent[key]
            else:
                parent[key] = value
    return tree


def _places(tree):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def answers(read, *errors):
    """Call a reader, which may raise these errors with one line."""
    try:
        return read()
    except errors as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000
    return None


@pytest.fixture(scope="module")
def valid(data, tmp_path_factory):
    """Folder with one valid document of each kind."""
    folder = tmp_path_factory.mktemp("valid")
    for name in (MANIFEST, "test/index.parquet", "test/shard-000000.tar"):
        shutil.copy(data / name, folder / Path(name).name)
    model = build_model(SMALL.model, SHAPE, seed=0)
    save_package(folder / "package", LoadedModel(model, SMALL, SHAPE, {"step": 3}))
    state = {
        "kind": "meta-gmvae",
        "settings": SMALL.model_dump_json(),
        "image_shape": list(SHAPE),
        "data_fingerprint": "f" * 64,
        "stage": "meta",
        "step": 3,
        "elapsed": 1.5,
        "model": model.state_dict(),
        "projector": {},
        "optimizer": torch.optim.Adam(model.parameters()).state_dict(),
        "schedule": {"last_epoch": 3},
        "best": {"5w1s": {"accuracy": 0.5, "step": 2, "model": model.state_dict()}},
        "rng": random_state(),
    }
    save_state(folder / "checkpoint.pt", state)
    images = np.zeros((6, 4, 4, 3), np.uint8)
    (folder / "cache.pkl").write_bytes(pickle.dumps({"image_data": images, "class_dict": {"n01": [0, 1, 2]}}, 2))
    (folder / "settings.toml").write_text(to_toml(SMALL))
    return folder


@fuzz
@given(changes=replacements)
@example(changes=[(3, False, {"a": {"b": 10**4000}})])
@example(changes=[(72, False, 10**4000)])
def test_manifest(valid, tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / MANIFEST
    tree = edit_tree(json.loads((valid / MANIFEST).read_bytes()), changes)
    path.write_bytes(json.dumps(tree).encode("utf-8", "surrogatepass"))
    manifest = answers(lambda: read_manifest(path), DataError)
    assert manifest is None or sum(part["samples"] for part in manifest["splits"].values()) < 10**4


@fuzz
@given(content=st.binary(max_size=200) | st.integers(1, 10**5).map(lambda depth: b"[" * depth))
@example(content=b"9" * 5000)
@example(content=b'{"a":' * 20_000)
@example(content=b"\xff")
def test_json_documents(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / MANIFEST
    path.write_bytes(content)
    assert answers(lambda: read_manifest(path), DataError) is None


@fuzz
@given(changes=edits)
@example(changes=[(0, "cut", b"")])
@example(changes=[(219, "set", b"\xd4")])  # an entry beyond a dictionary
def test_index(valid, tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "index.parquet"
    content = (valid / "index.parquet").read_bytes()
    path.write_bytes(edit_bytes(content, changes))
    table = answers(lambda: read_index(path, rows=120, classes=6), DataError)
    assert table is None or table.num_rows == 120


@fuzz
@given(changes=edits)
def test_shard(valid, changes):
    content = edit_bytes((valid / "shard-000000.tar").read_bytes(), changes)
    blocks = answers(lambda: shard_blocks(io.BytesIO(content), "shard"), DataError)
    for block in blocks or []:
        assert block.offset + np.prod(block.shape) * np.dtype(block.dtype).itemsize <= len(content)


def rezip(path, change):
    """The members of a zip file with the pickle changed, and correct CRCs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(buffer, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            changed.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return buffer.getvalue()


def nested_tuples(depth):
    """A pickle of a dictionary whose key contains 2 ** depth values, in which only `depth` are stored."""
    steps = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) + b"0" for n in range(depth))
    return b"\x80\x02K\x01q\x000" + steps + b"}h" + bytes([depth]) + b"K\x01s."


@fuzz
@given(changes=edits, in_pickle=st.booleans())
@example(changes=[], in_pickle=nested_tuples(60))
def test_checkpoint(valid, tmp_path_factory, changes, in_pickle):
    path = tmp_path_factory.getbasetemp() / "checkpoint.pt"
    if isinstance(in_pickle, bytes):
        path.write_bytes(rezip(valid / "checkpoint.pt", lambda content: in_pickle))
    elif in_pickle:
        path.write_bytes(rezip(valid / "checkpoint.pt", lambda content: edit_bytes(content, changes)))
    else:
        path.write_bytes(edit_bytes((valid / "checkpoint.pt").read_bytes(), changes))
    answers(lambda: load_state(path), CheckpointError)
    answers(lambda: load_model(path), CheckpointError, DataError)


@fuzz
@given(changes=replacements)
def test_edited_checkpoint(valid, tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "checkpoint.pt"
    save_state(path, edit_tree(dict(load_state(valid / "checkpoint.pt")), changes))
    answers(lambda: load_model(path), CheckpointError, DataError)


@fuzz
@given(changes=replacements)
@example(changes=[(0, False, 2)])
def test_package(valid, tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "package"
    shutil.copytree(valid / "package", folder, dirs_exist_ok=True)
    card = edit_tree(json.loads((valid / "package" / CARD).read_bytes()), changes)
    (folder / CARD).write_bytes(json.dumps(card).encode("utf-8", "surrogatepass"))
    answers(lambda: load_package(folder), DataError)


@pytest.mark.parametrize("key", ["latent", "channels", "width", "layers", "heads"])
def test_package_that_states_a_huge_model(valid, tmp_path, key):
    folder = shutil.copytree(valid / "package", tmp_path / "package")
    card = json.loads((folder / CARD).read_bytes())
    card["settings"]["model"][key] = 512
    card["settings"]["model"]["width"] = 2**16
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(DataError, match="settings and weights do not match"):
        load_package(folder)


@fuzz
@given(changes=edits, text=st.none() | st.text(max_size=80))
@example(changes=[], text="a = " + "[" * 50_000)
@example(changes=[], text="a = " + "9" * 5000)
@example(changes=[], text=".".join("a" * 5000) + " = 1")
@example(changes=[], text='"a\\nb" = 1')
@example(changes=[], text="name = 1e400")
@example(changes=[], text="[train]\nsteps = 2020-01-01")
def test_configuration(valid, tmp_path_factory, changes, text):
    path = tmp_path_factory.getbasetemp() / "settings.toml"
    content = (valid / "settings.toml").read_bytes() if text is None else text.encode("utf-8", "surrogatepass")
    path.write_bytes(edit_bytes(content, changes))
    answers(lambda: load_settings(path), SettingsError)


@fuzz
@given(text=st.text(max_size=40), key=st.sampled_from(["train.steps", "run.threads", "name", "train", "a.b.c", ""]))
@example(text="9" * 5000, key="train.steps")
@example(text="[" * 20_000, key="train.steps")
@example(text="\n", key="")
def test_override(text, key):
    answers(lambda: load_settings("omniglot-cpu", [f"{key}={text}"]), SettingsError)


@fuzz
@given(changes=edits, whole=st.none() | st.binary(max_size=100))
@example(changes=[], whole=nested_tuples(60))
def test_cache(valid, tmp_path_factory, changes, whole):
    path = tmp_path_factory.getbasetemp() / "cache.pkl"
    path.write_bytes(edit_bytes((valid / "cache.pkl").read_bytes(), changes) if whole is None else whole)
    answers(lambda: read_cache.__wrapped__(str(path)), DataError)
