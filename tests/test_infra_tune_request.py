"""Range checks of the numeric options of `metagmvae tune`; calibration of the trials that keep a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_words import TINY, pairs
from small_sweep import open_sweep

from metagmvae.configs.load import SettingsError, load_settings
from metagmvae.configs.search_space import load_space
from metagmvae.infra.runs.run_folder import CALIBRATION, METRICS
from metagmvae.infra.tune import trial
from metagmvae.infra.tune.request import SweepRequest, calibrate_kept, check_numbers
from metagmvae.infra.tune.sweep_folder import SweepPlan
from metagmvae.infra.workflows.run_training import run_training
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.package import load_model, save_package


def request_with(tmp_path: Path, **numbers: float) -> SweepRequest:
    (tmp_path / "mine.toml").write_text("train.em_iterations = {choice=[1, 2]}")
    request = SweepRequest(load_settings("omniglot-5way"), load_space(tmp_path / "mine.toml"), tmp_path / "sweep")
    return replace(request, **numbers)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"trials": 0}, "--trials is 0; give 1 or more"),
        ({"hours": 0.0}, "--hours is 0; give a number of hours above 0"),
        ({"hours": -1.0}, "--hours is -1; "),
        ({"hours": float("inf")}, "--hours is inf; "),
        ({"hours": float("nan")}, "--hours is nan; "),
        ({"seed": -1}, "--seed is -1; give 0 or more"),
        ({"gpus": float("nan")}, "--gpus-per-trial is nan; "),
    ],
)
def test_a_number_out_of_range_is_an_error(tmp_path: Path, numbers: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        check_numbers(request_with(tmp_path, **numbers))
    assert str(error.value).startswith(message)


def test_numbers_in_range_are_accepted(tmp_path: Path) -> None:
    check_numbers(request_with(tmp_path))
    check_numbers(request_with(tmp_path, hours=0.01, trials=1, gpus=0.0))


def test_trials_that_keep_a_checkpoint_are_calibrated_as_a_run_of_train(
    plan: SweepPlan, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last trial is stopped early, and of the one before only the metric lines are left; others are refused."""
    monkeypatch.setattr(trial.tune, "report", lambda result: None)
    small = {**TINY, "train.steps": 4, "validation.every": 2, "data.uri": dataset.uri, "run.threads": 1}
    base = load_settings("omniglot-5way", pairs(small))
    sweep = open_sweep(replace(plan, base=base), dataset, tmp_path / "sweep", keep_all=True)
    numbers = []
    while len(numbers) < 3 and (number := sweep.next_trial()) is not None:
        numbers.append(number)
        folder = sweep.folder.trial_folder(number)
        data = {"data": dataset.uri, "fingerprint": dataset.fingerprint}
        trial.run_trial({"folder": str(folder), "task": sweep.plan.task, **data})
        if len(numbers) == 2:
            (folder / "checkpoint.pt").unlink()
        if len(numbers) == 3:
            lines = (folder / METRICS).read_text().splitlines(keepends=True)
            (folder / METRICS).write_text("".join(lines[:-1]))
        sweep.end_trial(number)
    assert [sweep.ended[number].status for number in numbers] == ["finished", "finished", "stopped"]
    calibrate_kept(sweep)
    folders = [sweep.folder.trial_folder(number) for number in numbers]
    assert [(folder / CALIBRATION).exists() for folder in folders] == [True, False, True]

    settings = sweep.folder.trial_settings(numbers[0])
    run = settings.run.model_copy(update={"out": str(tmp_path / "alone")})
    alone = load_model(run_training(settings.model_copy(update={"run": run}), quiet=True))
    first = load_model(folders[0])
    assert first.calibration is not None
    assert first.calibration == alone.calibration
    save_package(tmp_path / "package", first)
    assert load_model(tmp_path / "package").calibration == first.calibration

    def never(*arguments: Any) -> None:
        raise AssertionError("calibrated twice")

    monkeypatch.setattr("metagmvae.infra.workflows.calibrate.calibrate_path", never)
    calibrate_kept(sweep)
