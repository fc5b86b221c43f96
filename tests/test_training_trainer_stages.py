"""Complete runs of pre-training and meta-training: exact resume, best models, metric lines."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import process_context

from metagmvae.configs.schema import Settings
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.stages import train
from metagmvae.training.trainer.update import NonFiniteLossError

SHAPE = (1, 8, 8)


def settings(reconstruct: str = "pixels", **changes: dict[str, Any]) -> Settings:
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "reconstruct": reconstruct,
            "latent": 2,
            "channels": 4,
            "width": 8,
            "heads": 2,
            "layers": 1,
        },
        "pretrain": {"steps": 6, "batch": 8},
        "train": {
            "steps": 9,
            "batch": 2,
            "set_size": 6,
            "samples": 3,
            "decode_samples": 2,
            "components": 2,
            "em_iterations": 2,
            "learning_rate": 0.01,
            "start": "components" if reconstruct == "features" else "random",
            "schedule": "cosine",
            "clip_norm": 5.0,
            "log_every": 2,
            "checkpoint_every": 4,
        },
        "validation": {"every": 3},
        "data": {},
    }
    return Settings.model_validate({name: part | changes.get(name, {}) for name, part in sections.items()})


def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.random((40, *SHAPE)) < 0.3).astype(np.uint8) * 255


def validate(model: MetaGMVAE) -> dict[str, dict[str, float]]:
    """A number that depends on all weights, as a NumPy type, which a validation may return."""
    assert not model.training
    total = sum(p.detach().double().abs().sum() for p in model.parameters())
    return {"5w1s": {"accuracy": np.float64(float(total) % 1.0), "ci95": np.float64(0.1)}}


class FolderContext(RunContext):
    """A context with checkpoints in a folder. It is killed before it records the line of global step `killed_at`."""

    device = torch.device("cpu")
    rank, world = 0, 1

    def __init__(self, folder: Path, killed_at: int = 0, signal_number: int = 0) -> None:
        self.path = folder / "checkpoint.pt"
        self.killed_at, self.signal_number = killed_at, signal_number
        self.lines: list[MetricLine] = []
        self.saved: list[tuple[str, int]] = []

    def load(self) -> TrainState | None:
        return load_state(self.path) if self.path.exists() else None

    def report(self, line: MetricLine | None, state: TrainState | None) -> None:
        if line is not None and self.killed_at and int(line["global_step"]) >= self.killed_at:
            if self.signal_number:
                os.kill(os.getpid(), self.signal_number)
            raise InterruptedError
        if line is not None:
            self.lines.append(line)
        if state is not None:
            self.saved.append((state["stage"], state["step"]))
            save_state(self.path, state)


def run(context: FolderContext, options: Settings) -> TrainState:
    return train(options, images(), SHAPE, "fingerprint", context, validate)


def without_times(lines: list[MetricLine]) -> list[dict[str, Any]]:
    times = {"images_per_s", "elapsed_s", "waiting_share"}
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for key in sorted(value, key=str) for item in (key, *flat(value[key]))]
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in flat(part)]
    return [value.tolist()] if isinstance(value, torch.Tensor) else [value]


def assert_equal(left: TrainState | None, right: TrainState | None) -> None:
    assert left is not None
    assert right is not None
    for part in (left.keys() | right.keys()) - {"elapsed", "version"}:
        assert flat(left[part]) == flat(right[part]), part


UNINTERRUPTED: dict[str, FolderContext] = {}


def uninterrupted(reconstruct: str, tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    if reconstruct not in UNINTERRUPTED:
        UNINTERRUPTED[reconstruct] = FolderContext(tmp_path_factory.mktemp("uninterrupted"))
        torch.manual_seed(1)
        run(UNINTERRUPTED[reconstruct], settings(reconstruct))
    return UNINTERRUPTED[reconstruct]


@pytest.mark.parametrize("reconstruct", ["pixels", "features"])
@pytest.mark.parametrize("killed_at", [2, 6, 8, 11, 12, 15])
def test_killed_and_resumed_run_equals_the_uninterrupted_one(
    reconstruct: str, killed_at: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed in pre-training (before and after its checkpoint), at its end, and in meta-training, always before the
    checkpoint of that step is written. The resumed process starts with another global random state."""
    expected_run = uninterrupted(reconstruct, tmp_path_factory)
    killed = FolderContext(tmp_path, killed_at)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        run(killed, settings(reconstruct))
    last = killed.saved[-1] if killed.saved else ("pretrain", 0)
    expected = {2: ("pretrain", 0), 6: ("pretrain", 4), 15: ("meta", 8)}
    assert last == expected.get(killed_at, ("meta", 4) if killed_at > 10 else ("pretrain", 6))
    if not killed.saved:
        torch.manual_seed(1)
    else:
        torch.manual_seed(killed_at)
    resumed = FolderContext(tmp_path)
    run(resumed, settings(reconstruct))
    assert_equal(expected_run.load(), resumed.load())
    reached = last[1] if last[0] == "pretrain" else 6 + last[1]
    lines_before = [line for line in killed.lines if int(line["global_step"]) <= reached]
    assert without_times(expected_run.lines) == without_times(lines_before) + without_times(resumed.lines)


def killed_process(folder: str, killed_at: int, threads: int) -> None:
    torch.set_num_threads(threads)  # the last bits of sums depend on the number of threads
    run(FolderContext(Path(folder), killed_at, signal_number=signal.SIGKILL), settings())


def test_run_of_a_killed_process_resumes_exactly(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected_run = uninterrupted("pixels", tmp_path_factory)
    process = process_context().Process(target=killed_process, args=(str(tmp_path), 12, torch.get_num_threads()))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    resumed = FolderContext(tmp_path)
    assert load_state(resumed.path)["step"] == 4
    run(resumed, settings())
    left, right = expected_run.load(), resumed.load()
    assert left is not None
    assert right is not None
    for part in ("model", "optimizer", "schedule", "best"):
        assert flat(left[part]) == flat(right[part]), part


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


def test_finished_run_returns_at_once(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    done = uninterrupted("pixels", tmp_path_factory).load()
    assert done is not None
    save_state(tmp_path / "checkpoint.pt", done)
    finished = FolderContext(tmp_path)
    assert_equal(done, run(finished, settings()))
    assert finished.lines == []


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


def encoder_run(context: FolderContext) -> TrainState:
    options = settings(pretrain={"steps": 9, "projector": (6, 4), "optimizer": "lars"})
    return train(options, images(), SHAPE, "fingerprint", context, encoder_validate, kind="encoder")


def encoder_validate(model: EncoderModel) -> dict[str, dict[str, float]]:
    assert not isinstance(model, MetaGMVAE)
    total = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    return {"5w1s": {"accuracy": total % 1.0, "ci95": 0.1}, "linear": {"accuracy": 0.5}}


@pytest.mark.parametrize("killed_at", [2, 6, 9])
def test_killed_and_resumed_encoder_only_run_equals_the_uninterrupted_one(killed_at: int, tmp_path: Path) -> None:
    (tmp_path / "uninterrupted").mkdir()
    (tmp_path / "killed").mkdir()
    expected_run = FolderContext(tmp_path / "uninterrupted")
    torch.manual_seed(1)
    state = encoder_run(expected_run)
    killed = FolderContext(tmp_path / "killed", killed_at)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        encoder_run(killed)
    if killed.saved:
        torch.manual_seed(5)
    else:
        torch.manual_seed(1)
    resumed = FolderContext(tmp_path / "killed")
    encoder_run(resumed)
    assert_equal(expected_run.load(), resumed.load())
    assert state["kind"] == "encoder"
    assert set(state["projector"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(name.startswith("encoder.") for name in state["model"])
    validated = [line for line in expected_run.lines if "validation/5w1s" in line]
    assert [line["step"] for line in validated] == [3, 6, 9]
    assert all(line["validation/linear"] == 0.5 and "validation/linear_ci95" not in line for line in validated)
    assert set(state["best"]) == {"5w1s"}


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


class StoppedContext(FolderContext):
    """Requests a stop when the training has asked `stop_at` times: after each step but the last one of a stage."""

    def __init__(self, folder: Path, stop_at: int) -> None:
        super().__init__(folder)
        self.stop_at, self.asked = stop_at, 0

    @contextmanager
    def stop_requests(self) -> Iterator[Callable[[], bool]]:
        def stop() -> bool:
            self.asked += 1
            return self.asked == self.stop_at

        yield stop


@pytest.mark.parametrize("reconstruct", ["pixels", "features"])
@pytest.mark.parametrize(("stop_at", "stage", "step"), [(1, "pretrain", 1), (4, "pretrain", 4), (8, "meta", 3)])
def test_a_run_stopped_between_checkpoints_and_resumed_equals_an_uninterrupted_one(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, reconstruct: str, stop_at: int, stage: str, step: int
) -> None:
    """Bit-identical state and metric lines; a checkpoint is due at pre-training step 4, a validation at meta step 3."""
    expected = uninterrupted(reconstruct, tmp_path_factory)
    stopped = StoppedContext(tmp_path, stop_at)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, settings(reconstruct))
    state = load_state(stopped.path)
    assert (state["stage"], state["step"]) == (stage, step)
    torch.manual_seed(stop_at)
    resumed = FolderContext(tmp_path)
    run(resumed, settings(reconstruct))
    assert_equal(expected.load(), resumed.load())
    assert without_times(stopped.lines + resumed.lines) == without_times(expected.lines)
