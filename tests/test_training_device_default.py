"""The default device."""

import pytest
import torch

from metagmvae.training.device.default import default_device


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_default_device_is_cuda_if_available(available, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert default_device().type == expected
