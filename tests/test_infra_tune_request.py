"""Range checks of the numeric options of `metagmvae tune`."""

from dataclasses import replace
from pathlib import Path

import pytest

from metagmvae.configs.load import SettingsError, load_settings
from metagmvae.configs.search_space import load_space
from metagmvae.infra.tune.request import SweepRequest, check_numbers


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
