"""Calibrations for tests."""

from metagmvae.configs.schema import AdaptSettings
from metagmvae.training.models.posterior_calibration import FittedMap, PosteriorCalibration

QUALITY = {"queries": 10, "nll": 0.1, "nll_uncalibrated": 0.2, "ece": 0.01, "ece_uncalibrated": 0.1}


def fits(temperature: float, **changes) -> PosteriorCalibration:
    """A calibration with temperatures that show in every probability."""
    temperatures = tuple(
        FittedMap(mode=mode, way=5, shot=shot, temperature=temperature * shot * factor, uniform=0.02 * shot, **QUALITY)
        for mode, factor in (("transductive", 1.0), ("inductive", 10.0))
        for shot in (1, 5)
    )
    record = {"fitted_on": "labelled classes", "split": "validation", "data_fingerprint": "d", "adapt": AdaptSettings()}
    return PosteriorCalibration(**(record | {"temperatures": temperatures} | changes))
