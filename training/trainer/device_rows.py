"""Training data that stays on the training device: sampled there, nothing but row numbers travels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metagmvae.pipelines.records import Rows

ROWS = 4096
"""Rows that go to the device at once."""


class DeviceRows:
    """Images or features by row on a device: `rows[numbers] -> (n, ...)` there, in the type they are stored in."""

    def __init__(self, data: Rows, device: torch.device) -> None:
        count = len(data)
        pieces = [np.asarray(data[np.arange(first, min(first + ROWS, count))]) for first in range(0, count, ROWS)]
        self.tensor = torch.cat([torch.from_numpy(piece).to(device) for piece in pieces])
        self.shape = tuple(self.tensor.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return self.tensor[torch.as_tensor(rows, device=self.tensor.device)]
