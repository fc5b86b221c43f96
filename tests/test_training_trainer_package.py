"""Model packages and run folders: loading gives the saved weights, and damage is reported."""

import json
import resource

import pytest
import torch

from metagmvae.configs.schema import ModelSettings, Settings, TrainSettings, ValidationSettings
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.checkpoint import CheckpointError, save_state
from metagmvae.training.trainer.package import CARD, LoadedModel, load_model, load_package, save_package

SHAPE = (1, 12, 12)
SETTINGS = Settings(model=ModelSettings(latent=6, channels=8, width=16, heads=2, layers=1))


def test_package_round_trip_is_exact_and_damage_is_reported(tmp_path):
    model = build_model(SETTINGS.model, SHAPE, seed=3).eval()
    loaded = LoadedModel(model, SETTINGS, SHAPE, {"step": 3})
    path = save_package(tmp_path / "p", loaded)
    read = load_package(path)
    assert read.settings == SETTINGS
    assert read.info == {"step": 3}
    for name, value in model.state_dict().items():
        assert torch.equal(read.model.state_dict()[name], value)
    with pytest.raises(DataError, match="already exists"):
        save_package(path, loaded)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="changed after it was written"):
        load_model(path)
    card = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps(card | {"version": 99}))
    with pytest.raises(DataError, match="not a model package of version 2"):
        load_model(path)


def test_a_full_disk_leaves_no_package_and_is_one_line(tmp_path):
    loaded = LoadedModel(build_model(SETTINGS.model, SHAPE, seed=3).eval(), SETTINGS, SHAPE, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DataError, match=rf"^{tmp_path}/p: cannot be written \(File too large\)"):
            save_package(tmp_path / "p", loaded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("selection", "validated", "expected"),
    [
        ("best", (1, 5), {1: 0, 5: 1, 20: 2, None: 0}),
        ("best-first-shot", (1, 5), {1: 0, 5: 0, 20: 0, None: 0}),
        ("best-first-shot", (5, 1), {1: 1, 5: 1, 20: 1, None: 1}),
        ("best-first-shot", (1,), {1: 0, 5: 0, 50: 0, None: 0}),
        ("last", (1, 5), {1: 2, 5: 2, None: 2}),
    ],
)
def test_selection_decides_which_model_of_a_run_is_loaded(tmp_path, selection, validated, expected):
    """Models 0 and 1 are the best at 1 and 5 shots, model 2 is the last one."""
    parts = {"train": TrainSettings(selection=selection), "validation": ValidationSettings(shots=validated)}
    settings = SETTINGS.model_copy(update=parts)
    weights = [build_model(SETTINGS.model, SHAPE, seed).state_dict() for seed in range(3)]
    best = {
        f"5w{shot}s": {"accuracy": 0.5, "ci95": 0.1, "step": 7 * shot, "model": weights[number]}
        for number, shot in enumerate((1, 5))
        if shot in validated
    }
    state = {
        "kind": "meta-gmvae",
        "projector": {},
        "settings": settings.model_dump_json(),
        "image_shape": list(SHAPE),
        "data_fingerprint": "d",
        "stage": "meta",
        "step": 60,
        "model": weights[2],
        "optimizer": {},
        "schedule": {},
        "rng": {},
        "best": best,
        "elapsed": 0.0,
    }
    save_state(tmp_path / "checkpoint.pt", state)
    for shot, number in expected.items():
        loaded = load_model(tmp_path, shot=shot)
        assert torch.equal(loaded.model.state_dict()["head.weight"], weights[number]["head.weight"])
        assert loaded.info["step"] == (7, 35, 60)[number]
        assert loaded.info.get("selected_by") == ("validation/5w1s", "validation/5w5s", None)[number]


def test_folders_and_files_that_are_no_checkpoint(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="contains neither"):
        load_model(empty)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK but not a zip file")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_model(tmp_path)


RECORDED = Preprocessing.of_shape(SHAPE, invert=True).model_dump(mode="json")


@pytest.mark.parametrize(
    ("recorded", "reason"),
    [
        (RECORDED, None),
        (None, None),  # a package of an older version
        (RECORDED | {"equalise": True}, "preprocessing: equalise"),
        (RECORDED | {"size": [84, 84]}, r"gives images \(1, 84, 84\)"),
    ],
)
def test_package_keeps_the_preprocessing_and_refuses_one_that_cannot_be_applied(tmp_path, recorded, reason):
    model = build_model(SETTINGS.model, SHAPE, seed=3).eval()
    written = LoadedModel(model, SETTINGS, SHAPE, {}, Preprocessing.model_validate(RECORDED))
    card_file = save_package(tmp_path / "package", written) / CARD
    card = json.loads(card_file.read_text())
    assert card.pop("preprocessing") == RECORDED
    card_file.write_text(json.dumps(card if recorded is None else card | {"preprocessing": recorded}))
    if reason is None:
        assert load_model(card_file.parent).preprocessing == (recorded and written.preprocessing)
    else:
        with pytest.raises(DataError, match=reason):
            load_model(card_file.parent)
