"""Moves an alias of a registered model. Of several processes that move it at once, one succeeds.

MLflow sets an alias without comparing its old value, but every MLflow database lets only one process create an
experiment of a given name. So the moves of a registered model are numbered, and a process claims number n by creating
the experiment `metagmvae-alias-change/MODEL/CREATED/n`, whose tags hold the record of the move. Whoever creates it has
moved the alias; everybody else finds that record there.

A claimed move is carried out in two steps: set the alias, then copy the record to the tags of the registered model
(the history). Any process may carry it out, any number of times, so nobody waits for a process that has died: the next
one that wants the number completes its move. The experiment is deleted at once, which hides it in the user interface;
MLflow keeps the names and tags of deleted experiments.

What reads or writes a store raises a TrackingError if it cannot be reached.
"""

from __future__ import annotations

import getpass
import os
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

from metagmvae.infra.registry.alias_history import (
    Action,
    AliasChange,
    AliasState,
    alias_state,
    alias_version,
    read_history,
    registered_model,
)
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.tracking.store import Store
from metagmvae.infra.tracking.tracking_errors import ignored, tracking_errors

PREFIX = "metagmvae-alias-change"
TOKEN, RECORD = "token", "record"


def change_alias(
    store: Store,
    name: str,
    action: Action,
    before: AliasState,
    version: str,
    *,
    evidence: str = "",
    undoes: int | None = None,
) -> AliasChange | None:
    """Move an alias to another version if its state is still `before`, and record the move.

    Returns:
        The record; None if the alias has been moved since, so that nothing was done.
    """
    token, claims = uuid.uuid4().hex, _claims(store, name)
    while True:
        changes = read_history(store, name)
        if alias_state(store, name, before.alias, changes) != before:
            return None
        change = AliasChange(
            number=_next_number(changes),
            action=action,
            alias=before.alias,
            version=version,
            former=before.version,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            by=whoami(),
            evidence=evidence,
            undoes=undoes,
        )
        with tracking_errors(store.uri):
            claimed = _claim(store, claims, change, token)
            _carry_out(store, name, claims, change.number)
        if claimed:
            return change
        # Another process has claimed this number. If it moved another alias, the next number is tried.


def set_alias_if_free(store: Store, name: str, alias: str, version: str) -> bool:
    """Give an alias to a version if no version has it; return whether it was given."""
    before = alias_state(store, name, alias, read_history(store, name))
    return before.version is None and change_alias(store, name, "registered", before, version) is not None


def _complete_moves(store: Store, name: str) -> None:
    """Carry out the moves that a process has claimed and not carried out, because it died or the store went away."""
    number, claims = _next_number(read_history(store, name)), _claims(store, name)
    with tracking_errors(store.uri):
        _carry_out(store, name, claims, number)


def settled_state(store: Store, name: str, alias: str) -> tuple[AliasState, list[AliasChange]]:
    """Return the state of an alias and the history, after carrying out a move that is claimed and not recorded yet.

    Otherwise the alias could point to the version of a move that is not in the history.
    """
    while True:
        changes = read_history(store, name)
        state = alias_state(store, name, alias, changes)
        if registered_model(store, name) is None:
            return state, changes
        with tracking_errors(store.uri):
            # Read after the alias: a move is claimed before it sets an alias.
            under_way = store.client.get_experiment_by_name(f"{_claims(store, name)}/{_next_number(changes)}")
        if under_way is None:
            return state, changes
        _complete_moves(store, name)


def describe_move(store: Store, name: str, before: AliasState) -> str:
    """Return one line that says who has moved an alias since `before`."""
    _complete_moves(store, name)  # the process that moved it may not have recorded its move yet
    changes = read_history(store, name)
    now = alias_state(store, name, before.alias, changes)
    last = next((change for change in changes if change.number == now.last_change), None)
    recorded = last is not None and last.version == now.version
    author = f"{last.action} by {last.by} at {last.time}" if last and recorded else "moved by hand, without a record"
    old, new = (f"version {version}" if version else "no version" for version in (before.version, now.version))
    alias = f"models:/{name}@{before.alias}"
    return f"{alias} moved from {old} to {new} in the meantime ({author}); run the command again"


def whoami() -> str:
    """Return `user@host`, with the user name for MLflow's server if there is one."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    if not user:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # the user of a container may have no name
            user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _next_number(changes: Sequence[AliasChange]) -> int:
    return max((change.number for change in changes), default=0) + 1


def _claims(store: Store, name: str) -> str:
    """Return the prefix of the names of the experiments. A model that is deleted and created again has another one."""
    with tracking_errors(store.uri):
        return f"{PREFIX}/{name}/{store.client.get_registered_model(name).creation_timestamp}"


def _claim(store: Store, claims: str, change: AliasChange, token: str) -> bool:
    """Claim the number of a move; return whether this process has it."""
    client = store.client
    claim, tags = f"{claims}/{change.number}", {TOKEN: token, RECORD: change.model_dump_json(exclude_none=True)}
    created = None
    with ignored("RESOURCE_ALREADY_EXISTS"):
        created = client.create_experiment(claim, artifact_location=store.artifacts, tags=tags)
    if created is None:
        # It is ours after all if the server's answer was lost and the HTTP client has repeated the request.
        existing = client.get_experiment_by_name(claim)
        return existing is not None and bool(existing.tags.get(TOKEN) == token)
    # The request may have been repeated; a visible experiment does no harm.
    with suppress(import_mlflow().MlflowException):
        client.delete_experiment(created)
    return True


def _carry_out(store: Store, name: str, claims: str, number: int) -> None:
    """Carry out the claimed move `number`, and later ones.

    Later ones exist if this process was suspended; its own write may then have replaced a newer version.
    """
    while claim := store.client.get_experiment_by_name(f"{claims}/{number}"):
        try:
            _set_alias_and_record(store, name, claim.tags[RECORD])
        except import_mlflow().MlflowException:  # two processes that insert the same row at once: one of them fails
            _set_alias_and_record(store, name, claim.tags[RECORD])
        number += 1


def _set_alias_and_record(store: Store, name: str, record: str) -> None:
    change = AliasChange.model_validate_json(record)
    if alias_version(store, name, change.alias) == change.former:
        store.client.set_registered_model_alias(name, change.alias, change.version)
    store.client.set_registered_model_tag(name, change.tag, record)
