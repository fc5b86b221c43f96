"""Checkpoints: written atomically; damaged and foreign files are errors; no code is run."""

from __future__ import annotations

import os
import pickle
import random
import resource
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import metagmvae.training.trainer.checkpoint
from metagmvae.training.trainer.checkpoint import (
    VERSION,
    CheckpointError,
    load_state,
    random_state,
    restore_random_state,
    save_state,
)


def state(step: int = 3) -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "kind": "meta-gmvae",
        "projector": {},
        "settings": '{"name": "x"}',
        "image_shape": [1, 28, 28],
        "data_fingerprint": "abc",
        "stage": "meta",
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": {"last_epoch": 3, "lr_lambdas": [None]},
        "rng": random_state(),
        "best": {"5w1s": {"accuracy": 0.5, "ci95": 0.01, "step": 2, "model": model.state_dict()}},
        "elapsed": 1.5,
    }


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    saved = state()
    save_state(tmp_path / "deep" / "checkpoint.pt", saved)
    loaded = load_state(tmp_path / "deep" / "checkpoint.pt")
    assert loaded.pop("version") == VERSION
    assert equal(saved, loaded)
    assert os.listdir(tmp_path / "deep") == ["checkpoint.pt"]


def test_other_users_can_read_a_checkpoint_unless_its_owner_forbids_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_state(path, state())
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o600)
    save_state(path, state())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_loaded_state_can_be_saved_again(tmp_path: Path) -> None:
    save_state(tmp_path / "a.pt", state())
    save_state(tmp_path / "b.pt", load_state(tmp_path / "a.pt"))
    assert equal(load_state(tmp_path / "a.pt"), load_state(tmp_path / "b.pt"))


@pytest.mark.parametrize("moment", ["before writing", "while writing", "before the rename"])
@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_failure_while_saving_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_state(path, state(step=1))
    before = path.read_bytes()
    torch_save = torch.save

    def failing_save(content: Any, file: Any) -> None:
        if moment == "while writing":
            torch_save(content, file)
            file.truncate(file.tell() // 2)
        raise error

    def failing_replace(*_: Any) -> None:
        raise error

    if moment == "before the rename":
        monkeypatch.setattr(os, "replace", failing_replace)
    else:
        monkeypatch.setattr(metagmvae.training.trainer.checkpoint.torch, "save", failing_save)
    with pytest.raises(type(error)):
        save_state(path, state(step=2))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert load_state(path)["step"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("limit", [100, 1000, 3000])
def test_a_disk_that_is_full_at_any_byte_is_an_error_of_the_operating_system(tmp_path: Path, limit: int) -> None:
    """PyTorch's writer raises a RuntimeError about a position in its file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_state(tmp_path / "checkpoint.pt", state() | {"model": {"w": torch.zeros(30_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", [0, VERSION + 1, "1", None])
def test_another_version_is_an_error_that_names_it(tmp_path: Path, version: Any) -> None:
    save_state(tmp_path / "c.pt", state() | {"version": version})
    with pytest.raises(CheckpointError, match=f"version {version}, but this metagmvae reads version {VERSION}"):
        load_state(tmp_path / "c.pt")


def test_truncated_files_are_errors(tmp_path: Path) -> None:
    save_state(tmp_path / "c.pt", state())
    content = (tmp_path / "c.pt").read_bytes()
    for length in [0, 1, 3, 4, 30, *range(100, len(content), len(content) // 40), len(content) - 1]:
        (tmp_path / "c.pt").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated or was not written by metagmvae") as caught:
            load_state(tmp_path / "c.pt")
        assert "\n" not in str(caught.value)


def test_flipped_bit_in_a_weight_is_an_error(tmp_path: Path) -> None:
    """torch.load alone would return a different weight without an error."""
    path = tmp_path / "c.pt"
    saved = state()
    weights = saved["model"]["weight"].numpy().tobytes()
    save_state(path, saved)
    content = bytearray(path.read_bytes())
    assert weights in content
    content[content.find(weights) + 5] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(path)


def test_foreign_files_are_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    foreign = {
        "text": b"accuracy,0.5\n" * 50,
        "json": b'{"version": 1}',
        "png": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "zeros": bytes(4096),
        "old pickle": pickle.dumps({"version": 1}, protocol=0),
        "pickle": pickle.dumps({"version": 1}),
        **{f"noise {i}": rng.randbytes(rng.choice([10, 300, 5000])) for i in range(60)},
        **{f"pickle-like noise {i}": b"\x80\x02" + rng.randbytes(100) for i in range(60)},
    }
    path = tmp_path / "c.pt"
    for name, content in foreign.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_state(path)
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value), name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError):
        load_state(path)


@pytest.mark.parametrize("content", [torch.zeros(3), {"model": {}}, [1, 2], 5])
def test_other_torch_files_are_errors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of metagmvae"):
        load_state(tmp_path / "c.pt")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    partial = state()
    del partial["rng"], partial["best"]
    save_state(tmp_path / "c.pt", partial)
    with pytest.raises(CheckpointError, match="lacks best, rng"):
        load_state(tmp_path / "c.pt")


def test_missing_files_and_folders_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match="no such checkpoint file"):
            load_state(path)


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_pickled_objects_are_errors_and_do_not_run(tmp_path: Path) -> None:
    created = tmp_path / "created"
    torch.save(state() | {"version": VERSION, "best": Trap(created)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError):
        load_state(tmp_path / "c.pt")
    (tmp_path / "d.pt").write_bytes(pickle.dumps(Trap(created)))
    with pytest.raises(CheckpointError):
        load_state(tmp_path / "d.pt")
    assert not created.exists()


def test_random_states_are_restored() -> None:
    saved = random_state()
    first = (torch.rand(3), [random.random() for _ in range(3)], random.gauss(0, 1))
    restore_random_state(saved)
    second = (torch.rand(3), [random.random() for _ in range(3)], random.gauss(0, 1))
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:]
