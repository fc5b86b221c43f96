"""Says on stderr what Ray keeps to itself while a command waits: a lost head node, too few nodes."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

LOG = logging.getLogger(__name__)
WATCH_S = 10.0
"""Seconds between looks at the cluster."""
CONNECT_TIMEOUT_S = 5.0
"""For a connection to the head node."""


@contextmanager
def watched_head(head: str) -> Iterator[None]:
    """Say if the head node at `host:port` stops answering: Ray ends this process a minute later.

    It does so from C++, so that no error can be raised and no answer be printed.
    """
    failures = 0

    def look() -> bool:
        nonlocal failures
        failures = 0 if _answers(head) else failures + 1
        if failures < 2:
            return True
        LOG.error(
            "the head node of the Ray cluster (%s) does not answer. If it stays away, Ray ends this command within a "
            "minute; then start a cluster and give the same command again, train and tune with --resume",
            head,
        )
        return False

    with _repeated(look):
        yield


@contextmanager
def watched_resources(needed: Mapping[str, int]) -> Iterator[None]:
    """Say if the cluster no longer has the CPUs and GPUs of a training, which then waits for as long as it takes."""
    lost: dict[str, int] = {}

    def look() -> bool:
        nonlocal lost
        try:
            present = ray.cluster_resources()
        except RayError:
            return True  # `watched_head` says so
        now = {name: int(present.get(name, 0)) for name, count in needed.items() if present.get(name, 0) < count}
        if now and now != lost:
            left = " and ".join(f"{count} of the {needed[name]} {name}s" for name, count in now.items())
            LOG.warning(
                "the Ray cluster has lost a node: %s of this training are left. It goes on from its last checkpoint "
                "when nodes are added; otherwise stop it, and continue with fewer run.workers and --resume",
                left,
            )
        elif lost and not now:
            LOG.warning("the Ray cluster has enough nodes again: the training goes on from its last checkpoint")
        lost = now
        return True

    with _repeated(look):
        yield


@contextmanager
def _repeated(look: Callable[[], bool]) -> Iterator[None]:
    """Call a function every `WATCH_S` seconds in a thread, until it returns False or the block ends."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_S) and look():
            pass

    thread = threading.Thread(target=watch, name="ray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(CONNECT_TIMEOUT_S)  # a question to Ray while Ray shuts down could start it again


def _answers(head: str) -> bool:
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
