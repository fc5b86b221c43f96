"""Tells the workers of a training that its driver has received a signal. Imports nothing, so it starts at once."""

from __future__ import annotations


class StopFlag:
    """An actor of Ray that the driver and the workers of a training ask."""

    def __init__(self) -> None:
        self.requested = self.polled = False

    def request(self) -> bool:
        """Request the stop; return whether a worker is training."""
        self.requested = True
        return self.polled

    def poll(self) -> bool:
        """Whether a stop is requested; called by the workers."""
        self.polled = True
        return self.requested
