"""Complete runs of pre-training and meta-training: metric lines, best models, initialisation."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from small_runs import (
    SHAPE,
    FolderContext,
    flat,
    images,
    run,
    settings,
    uninterrupted,
    without_times,
)

from metagmvae.configs.schema import Settings
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.checkpoint import load_state
from metagmvae.training.trainer.stages import train
from metagmvae.training.trainer.update import NonFiniteLossError


def test_metric_lines_have_all_keys_at_the_right_steps(tmp_path_factory: pytest.TempPathFactory) -> None:
    lines = uninterrupted("pixels", tmp_path_factory).lines
    assert [(line["stage"], line["step"], line["global_step"]) for line in lines] == [
        *[("pretrain", step, step) for step in (2, 4, 6)],
        *[("meta", step, 6 + step) for step in (2, 3, 4, 6, 8, 9)],
    ]
    always = {"loss", "steps", "images_per_s", "waiting_share", "elapsed_s", "learning_rate", "gradient_norm"}
    assert all(always <= line.keys() for line in lines)
    meta = [line for line in lines if line["stage"] == "meta"]
    for line in meta:
        parts = sum(float(line[name]) for name in ("reconstruction", "prior", "entropy"))
        assert float(line["elbo"]) == pytest.approx(parts, rel=1e-5)
        assert float(line["loss"]) == pytest.approx(-6 * float(line["elbo"]), rel=1e-5)  # sum over M = 6
    validated = [line["step"] for line in meta if "validation/5w1s" in line]
    assert validated == [3, 6, 9] == [line["step"] for line in meta if "validation/5w1s_ci95" in line]
    elapsed = [float(line["elapsed_s"]) for line in lines]
    assert elapsed == sorted(elapsed)


def test_final_state_describes_the_run_and_loads_into_the_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    state = uninterrupted("pixels", tmp_path_factory).load()
    assert state is not None
    assert (state["stage"], state["step"]) == ("meta", 9)
    options = Settings.model_validate_json(state["settings"])
    assert options == settings()
    assert tuple(state["image_shape"]) == SHAPE
    assert state["data_fingerprint"] == "fingerprint"
    assert state["elapsed"] > 0
    model = build_model(options.model, SHAPE, seed=99)
    model.load_state_dict(state["model"])


def test_best_model_of_each_task_is_kept(tmp_path: Path) -> None:
    """Accuracies 0.5, 0.9, 0.7 for one task, increasing for the other: the weights of steps 6 and 9 are kept."""
    weights: list[dict[str, torch.Tensor]] = []
    scores = iter([(0.5, 0.1), (0.9, 0.2), (0.7, 0.3)])

    def scripted_validate(model: MetaGMVAE) -> dict[str, dict[str, float]]:
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        first, second = next(scores)
        return {"5w1s": {"accuracy": first, "ci95": 0.0}, "5w5s": {"accuracy": second, "ci95": 0.0}}

    folder = FolderContext(tmp_path)
    train(settings(), images(), SHAPE, "fingerprint", folder, scripted_validate)
    best = load_state(folder.path)["best"]
    assert (best["5w1s"]["step"], best["5w1s"]["accuracy"]) == (6, 0.9)
    assert (best["5w5s"]["step"], best["5w5s"]["accuracy"]) == (9, 0.3)
    assert flat(best["5w1s"]["model"]) == flat(weights[1])
    assert flat(best["5w5s"]["model"]) == flat(weights[2])


def test_without_pretraining_steps_meta_training_starts(tmp_path: Path) -> None:
    folder = FolderContext(tmp_path)
    state = run(folder, settings(pretrain={"steps": 0}))
    assert {line["stage"] for line in folder.lines} == {"meta"}
    assert (state["stage"], state["step"]) == ("meta", 9)
    assert [line["global_step"] for line in folder.lines][-1] == 9


def test_meta_training_on_features_keeps_the_pretrained_encoder(tmp_path: Path) -> None:
    folder = FolderContext(tmp_path, killed_at=7)
    with pytest.raises(InterruptedError):
        run(folder, settings("features"))
    pretrained = load_state(folder.path)["model"]
    run(FolderContext(tmp_path), settings("features"))
    final = load_state(folder.path)["model"]
    changed = {name for name in pretrained if not torch.equal(pretrained[name], final[name])}
    assert not any(name.startswith("encoder.") for name in changed)
    assert any(name.startswith("decoder.") for name in changed)
    # The scaling has the statistics of the training images under this encoder.
    model = build_model(settings("features").model, SHAPE, 0)
    model.load_state_dict(final)
    with torch.no_grad():
        raw = model.eval().encoder(model.scale_images(torch.tensor(images())))
    assert torch.allclose(final["scale.mean"], raw.mean(dim=0), atol=1e-5)


def test_pca_initialisation_follows_the_settings(tmp_path: Path) -> None:
    for start in ("components", "random"):
        folder = tmp_path / start
        folder.mkdir()
        initial = run(FolderContext(folder), settings("features", train={"steps": 0, "start": start}))["model"]
        attention_is_identity = not initial["attention.blocks.0.output.weight"].any()
        assert attention_is_identity == (start == "components")


def test_diverging_run_stops_and_keeps_the_last_finite_checkpoint(tmp_path: Path) -> None:
    folder = FolderContext(tmp_path)
    diverging = {"learning_rate": 1e30, "checkpoint_every": 1, "clip_norm": 0.0, "schedule": "constant"}
    with pytest.raises(NonFiniteLossError, match="last checkpoint stays"):
        run(folder, settings(train=diverging, pretrain={"steps": 0}, validation={"every": 0}))
    saved = load_state(folder.path)
    assert saved["step"] == folder.saved[-1][1] >= 1
    assert all(torch.isfinite(value.float()).all() for value in saved["optimizer"]["state"][0].values())


def test_run_depends_on_its_seed_only(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected_run = uninterrupted("pixels", tmp_path_factory).load()
    assert expected_run is not None
    torch.manual_seed(12345)
    repeated = run(FolderContext(tmp_path / "repeated"), settings())
    assert flat(repeated["model"]) == flat(expected_run["model"])
    other = run(FolderContext(tmp_path / "other"), settings(train={"seed": 1}))
    assert flat(other["model"]) != flat(expected_run["model"])


def test_no_threads_are_left(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    run(FolderContext(tmp_path / "a"), settings())
    with pytest.raises(InterruptedError):
        run(FolderContext(tmp_path / "b", killed_at=9), settings())
    run(FolderContext(tmp_path / "b"), settings())
    run(FolderContext(tmp_path / "b"), settings())
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("reconstruct", ["pixels", "features"])
def test_data_on_the_device_give_the_same_run(
    reconstruct: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected_run = uninterrupted(reconstruct, tmp_path_factory)
    on_device, options = FolderContext(tmp_path), settings(reconstruct, data={"reader": "device"})
    assert options.data.reader == "device"
    torch.manual_seed(1)
    run(on_device, options)
    left, right = expected_run.load(), on_device.load()
    assert left is not None
    assert right is not None
    assert flat(left["model"]) == flat(right["model"])
    assert without_times(expected_run.lines) == without_times(on_device.lines)
