"""One writer at a time in a registered model, wherever the writers are: a lock that lies in the MLflow store.

MLflow moves an alias without asking where it stood, so two promotions at once could both win. What every MLflow
database does decide atomically is the name of an experiment, which is unique. The lock of a model is a chain of
experiments `metagmvae-lock/NAME/1`, 2, 3 and so on, and whoever makes the next link holds it. A link ends when its
holder deletes it (MLflow keeps the name of a deleted experiment, and hides it) or when its lease runs out, because the
holder died. Nobody needs to delete another's link, so a slow contender cannot take a lock that is not free any more.

After making a link everybody looks again, and steps back if another one is alive: of two who both hold one, the later
sees the earlier. So the lock holds even where `mlflow gc` removed old links and a number is used twice.
"""

from __future__ import annotations

import getpass
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from metagmvae.infra.tracking.store import Store, TrackingError, import_mlflow, paginate, tracking_errors

PREFIX = "metagmvae-lock"
PATIENCE_S = 240.0
"""How long to wait for another holder: longer than the lease of one that died."""
WORK_S = 120.0
"""A holder writes nothing any more after this, counted by its own clock from before it had the lock."""
PAUSE_S = (0.1, 0.4)
OWNER, TOKEN, LEASE = "owner", "token", "lease_s"


class BusyError(TrackingError):
    """Another process holds the lock, or it was held too long."""


@dataclass(frozen=True)
class Lock:
    """Held on one registered model."""

    name: str
    experiment_id: str
    since: float
    """By `time.monotonic`, before the lock was asked for."""

    def check(self) -> None:
        """To be called before each write that must not happen twice.

        Raises:
            BusyError: the lease may run out before the write arrives.
        """
        if time.monotonic() - self.since > WORK_S:
            raise BusyError(f"{self.name}: the lock was held for {WORK_S:.0f} s, and is given up; try again")


@dataclass(frozen=True)
class _Link:
    number: int
    experiment_id: str
    active: bool
    created: float
    """Seconds since 1970 by the clock of the store."""
    tags: dict[str, str]

    def alive(self, now: float) -> bool:
        return self.active and now - self.created < float(self.tags.get(LEASE, WORK_S))


@contextmanager
def registry_lock(store: Store, name: str, patience_s: float = PATIENCE_S) -> Iterator[Lock]:
    """Hold the lock of a registered model.

    Args:
        store: an open store; the lock is the same for all who use its database, directly or through a server.
        name: of the registered model, which need not exist.
        patience_s: how long to wait for another holder.

    Raises:
        BusyError: another one held it all the while; says who and since when.
        TrackingError: the store cannot be reached.
    """
    with tracking_errors(store.uri):
        lock = _acquire(store, name, patience_s)
    try:
        yield lock
    finally:
        _delete(store, lock.experiment_id)


def whoami() -> str:
    """Who asks: `user@host`; the name by which MLflow's server knows them, where there is one."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    if not user:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user without a name
            user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _acquire(store: Store, name: str, patience_s: float) -> Lock:
    token, until = uuid.uuid4().hex, time.monotonic() + patience_s
    ahead = 0.0  # of the store's clock before ours, once it is known
    while True:
        since = time.monotonic()
        links = _links(store, name)
        alive = [link for link in links if link.alive(time.time() + ahead)]
        if not alive:
            number = max((link.number for link in links), default=0) + 1
            ours = _make(store, name, number, token)
            if ours is not None:
                # The other links are judged by the time that the store gave ours: no two clocks are compared.
                links = _links(store, name)
                now = next(link.created for link in links if link.experiment_id == ours)
                ahead = now - time.time()
                others = [link for link in links if link.experiment_id != ours and link.active]
                alive = [link for link in others if link.alive(now)]
                if not alive:
                    for stale in others:
                        _delete(store, stale.experiment_id)
                    return Lock(name, ours, since)
                _delete(store, ours)
        if time.monotonic() > until:
            raise BusyError(f"{name}: {_who(alive)} at work in this registered model; try again in some minutes")
        time.sleep(random.uniform(*PAUSE_S))


def _links(store: Store, name: str) -> list[_Link]:
    prefix, found = f"{PREFIX}/{name}/", []
    view = import_mlflow().entities.ViewType.ALL
    for experiment in paginate(store.client.search_experiments, view_type=view, filter_string=f"name LIKE '{prefix}%'"):
        number = experiment.name.removeprefix(prefix)
        # LIKE takes `_` and `%` in a name for wildcards, and may ignore case.
        if experiment.name.startswith(prefix) and number.isdecimal():
            active = experiment.lifecycle_stage == "active"
            created = experiment.creation_time / 1000
            found.append(_Link(int(number), experiment.experiment_id, active, created, experiment.tags))
    return found


def _make(store: Store, name: str, number: int, token: str) -> str | None:
    """Id of the new link; None where another one was quicker."""
    tags = {OWNER: f"{whoami()}, process {os.getpid()}", TOKEN: token, LEASE: f"{_lease_s():.0f}"}
    link = f"{PREFIX}/{name}/{number}"
    try:
        return str(store.client.create_experiment(link, artifact_location=store.artifacts, tags=tags))
    except import_mlflow().MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = store.client.get_experiment_by_name(link)
    # Ours after all where the server's answer was lost, and the HTTP client asked a second time.
    return str(found.experiment_id) if found is not None and found.tags.get(TOKEN) == token else None


def _lease_s() -> float:
    """Longer than any holder can be at work: a write that began in time may take as long as the HTTP client waits."""
    variables: Any = import_mlflow().environment_variables
    tries = 1 + variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()
    return WORK_S + 2 * tries * variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get()


def _delete(store: Store, experiment_id: str) -> None:
    """End a link; where that fails (the store is gone, or the link is another's) its lease runs out all the same."""
    with suppress(TrackingError), tracking_errors(store.uri):
        store.client.delete_experiment(experiment_id)


def _who(alive: list[_Link]) -> str:
    if not alive:
        return "others are"
    link = alive[-1]
    since = datetime.fromtimestamp(link.created, UTC).isoformat(timespec="seconds")
    return f"{link.tags.get(OWNER, 'another process')} is since {since}"
