"""The record of a calibration: which fit is used, files of older versions, and values that no map has."""

import pytest
from calibrations import fits

from metagmvae.configs.schema import AdaptSettings
from metagmvae.pipelines.files import check_document
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.posterior_calibration import (
    UNCALIBRATED,
    CalibrationMap,
    PosteriorCalibration,
)


def test_the_nearest_fit_is_used_and_none_for_other_settings_or_modes():
    record, adapt = fits(2.0), AdaptSettings()
    free = adapt.model_copy(update={"iterations": 3, "samples": 7})
    for settings, mode, way, shot, temperature, uniform in (
        (adapt, "transductive", 5, 1, 2.0, 0.02),
        (adapt, "inductive", 5, 5, 100.0, 0.1),
        (adapt, "transductive", 20, 3, 10.0, 0.1),  # 3 is nearer to 5 than to 1, in ratio
        (adapt, "transductive", 5, 2.0, 2.0, 0.02),
        (free, "transductive", 5, 1, 2.0, 0.02),
    ):
        found = record.nearest_map(settings, mode, way, shot)
        assert (found.temperature, found.uniform) == (temperature, uniform)
    for change in ({"temperature": 4.0}, {"e_step": "identity"}, {"proportions": "estimated"}):
        assert record.nearest_map(adapt.model_copy(update=change), "transductive", 5, 1) == UNCALIBRATED
    only = fits(2.0, temperatures=[fit for fit in record.temperatures if fit.mode == "transductive"])
    assert only.nearest_map(adapt, "inductive", 5, 1) == UNCALIBRATED
    assert record.background(adapt, "transductive", 5, 1) is None


def test_files_of_older_versions_have_a_temperature_alone():
    document = fits(2.0).model_dump(mode="json")
    for fit in document["temperatures"]:
        del fit["uniform"]
    read = check_document(PosteriorCalibration, document, "model.json", "use another copy")
    found = read.nearest_map(AdaptSettings(), "transductive", 5, 1)
    assert (found.temperature, found.uniform) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("key", "value"), [("uniform", 1.0), ("uniform", -0.1), ("uniform", float("nan")), ("temperature", 0.0)]
)
def test_a_map_that_loses_the_predictions_is_refused(key, value):
    document = fits(2.0).model_dump(mode="json")
    document["temperatures"][1][key] = value
    with pytest.raises(DataError, match=rf"model.json: temperatures.1.{key} = .*use another copy") as error:
        check_document(PosteriorCalibration, document, "model.json", "use another copy")
    assert "\n" not in str(error.value)


def test_only_the_map_that_changes_nothing_is_the_identity():
    assert UNCALIBRATED.is_identity
    assert not CalibrationMap(temperature=2.0).is_identity
    assert not CalibrationMap(uniform=0.1).is_identity
