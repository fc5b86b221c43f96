"""Checkpoints that state more than they contain are refused before they cost memory or time."""

import io
import zipfile

import pytest
import torch

from metagmvae.training.trainer.checkpoint import CheckpointError, load_state, random_state, save_state


def state(**changes):
    return {
        "kind": "meta-gmvae",
        "settings": "{}",
        "image_shape": [1, 28, 28],
        "data_fingerprint": "abc",
        "stage": "meta",
        "step": 3,
        "elapsed": 1.5,
        "model": {"weight": torch.zeros(3)},
        "projector": {},
        "optimizer": {},
        "schedule": {},
        "best": {},
        "rng": random_state(),
    } | changes


def rezip(path, change):
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(buffer, "w") as changed:
        for name in archive.namelist():
            change(changed, name, archive.read(name))
    path.write_bytes(buffer.getvalue())


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "c.pt"
    save_state(path, state())
    rezip(path, lambda archive, name, content: archive.writestr(name, content, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="members are compressed, which torch does not do"):
        load_state(path)


def test_a_tensor_that_repeats_its_values_is_refused(tmp_path):
    """It would become a million times larger when it is copied."""
    save_state(tmp_path / "c.pt", state(model={"weight": torch.zeros(1).expand(10**12)}))
    with pytest.raises(CheckpointError, match="a tensor repeats its values"):
        load_state(tmp_path / "c.pt")


def test_lists_that_contain_each_other_are_refused(tmp_path):
    nested: list = []
    for _ in range(60):
        nested = [nested, nested]
    cyclic: list = []
    cyclic.append(cyclic)
    for value in (nested, cyclic):
        save_state(tmp_path / "c.pt", state(schedule={"x": value}))
        with pytest.raises(CheckpointError, match="more than 1,048,576 values"):
            load_state(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_shape": [1, 28]}, "image_shape"),
        ({"image_shape": [1, 10**9, 28]}, "image_shape.1 = 1000000000"),
        ({"model": {"weight": 3}}, "model.weight = 3"),
        ({"model": []}, "model = "),
        ({"best": {"worst": {}}}, "best.worst"),
        ({"best": {"5w1s": {"accuracy": float("nan"), "step": 1, "model": {}}}}, "best.5w1s.accuracy"),
        ({"kind": "An other"}, 'kind = "An other"'),
        ({"settings": 7}, "settings = 7"),
    ],
)
def test_values_of_another_type_are_named(tmp_path, change, reason):
    save_state(tmp_path / "c.pt", state(**change))
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_state(tmp_path / "c.pt")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    from metagmvae.pipelines import files

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    save_state(tmp_path / "c.pt", state())
    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(CheckpointError, match=r"c\.pt: cannot be read \(Permission denied\)"):
        load_state(tmp_path / "c.pt")
