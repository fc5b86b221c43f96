"""Parameters of a request are bounded, so that a request to a server always ends."""

import pytest

from metagmvae.configs.schema import AdaptSettings
from metagmvae.infra.registry.pyfunc_model import MAX_PARAMETER, adapt_settings
from metagmvae.pipelines.records import DataError


@pytest.mark.parametrize("key", ["samples", "iterations"])
@pytest.mark.parametrize("value", [0, -1, MAX_PARAMETER + 1, 10**9, 2**63 - 1])
def test_a_count_beyond_the_bounds_is_refused(key, value):
    with pytest.raises(DataError, match=f"{key} is {value}; it must be between 1 and 1,000"):
        adapt_settings(AdaptSettings(), {key: value})


def test_a_count_within_the_bounds_replaces_the_setting():
    assert adapt_settings(AdaptSettings(), {"samples": MAX_PARAMETER}).samples == MAX_PARAMETER
