"""Who moved an alias of a registered model, when, and from where: tags of the registered model, one for each move.

A record is written before the alias is moved, and both under the model's lock: there may be a record of a move that
did not happen, because its process died in between, but no recorded alias is ever moved without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from metagmvae.infra.registry.registry_lock import Lock, registry_lock, whoami
from metagmvae.infra.tracking.store import Store, import_mlflow, tracking_errors
from metagmvae.pipelines.records import DataError

PREFIX = "promotion.history."
Action = Literal["registered", "promoted", "rolled back"]
"""The first version of a name, which `train` registered; by `promote`; by `promote --rollback`."""


class AliasChange(BaseModel):
    """One move of an alias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    """From 1, in the order in which they were made."""
    action: Action
    alias: str
    version: str
    """Where it points since."""
    former: str | None = None
    """Where it pointed before; None: nowhere."""
    time: str
    by: str
    evidence: str = ""
    """Folder of the evidence, `runs:/id/promotions/…`."""
    undoes: int | None = None
    """Number of the promotion that a rollback takes back."""


def alias_version(store: Store, name: str, alias: str) -> str | None:
    """The version that an alias points to; None where there is no such model or alias.

    Raises:
        TrackingError: the store cannot be reached.
    """
    with tracking_errors(store.uri):
        try:
            found = store.client.get_registered_model(name).aliases.get(alias)
        except import_mlflow().MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
    return None if found is None else str(found)


def read_history(store: Store, name: str) -> list[AliasChange]:
    """Moves of all aliases of a registered model, in the order in which they were made.

    Raises:
        DataError: a tag is not one of ours.
        TrackingError: the store cannot be reached.
    """
    with tracking_errors(store.uri):
        tags = store.client.get_registered_model(name).tags
    moves = []
    for key in sorted(key for key in tags if key.startswith(PREFIX)):
        try:
            moves.append(AliasChange.model_validate_json(tags[key]))
        except ValidationError as error:
            raise DataError(f"registered model {name}: its tag {key} is no record of ours; delete it there") from error
    return sorted(moves, key=lambda move: move.number)


def move_alias(
    store: Store,
    lock: Lock,
    action: Action,
    alias: str,
    version: str,
    former: str | None,
    *,
    evidence: str = "",
    undoes: int | None = None,
) -> AliasChange:
    """Record a move and make it; the caller holds the lock, and knows that the alias stands at `former`.

    Raises:
        BusyError: the lock was held too long; nothing was moved.
        TrackingError: the store cannot be reached.
    """
    number = max((move.number for move in read_history(store, lock.name)), default=0) + 1
    move = AliasChange(
        number=number,
        action=action,
        alias=alias,
        version=version,
        former=former,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        by=whoami(),
        evidence=evidence,
        undoes=undoes,
    )
    lock.check()
    with tracking_errors(store.uri):
        text = move.model_dump_json(exclude_none=True)
        store.client.set_registered_model_tag(lock.name, f"{PREFIX}{number:06d}", text)
        lock.check()
        store.client.set_registered_model_alias(lock.name, alias, version)
    return move


def set_alias_if_free(store: Store, name: str, alias: str, version: str) -> bool:
    """Give an alias to a version where no version of that name has it; whether it was given.

    Raises:
        TrackingError: the store cannot be reached, or another process holds the lock.
    """
    if alias_version(store, name, alias) is not None:
        return False
    with registry_lock(store, name) as lock:
        if alias_version(store, name, alias) is not None:
            return False
        move_alias(store, lock, "registered", alias, version, None)
    return True


def last_change(moves: Sequence[AliasChange], alias: str, version: str | None) -> AliasChange | None:
    """The latest move that left an alias at a version."""
    return next((move for move in reversed(moves) if (move.alias, move.version) == (alias, version)), None)


def promotion_change(moves: Sequence[AliasChange], alias: str, version: str) -> AliasChange | None:
    """The promotion by which a version got an alias, and which was not taken back; the latest.

    Args:
        moves: of a registered model.
        alias: of it.
        version: where the alias points now.
    """
    ours = [move for move in moves if move.alias == alias]
    found_at = [*(move.former for move in ours[1:]), version]
    # A rollback that died between its record and its move took nothing back: the alias was not found where it led.
    undone = {move.undoes for move, at in zip(ours, found_at, strict=False) if move.version == at}
    made = (move for move in reversed(ours) if move.action == "promoted" and move.number not in undone)
    return next((move for move in made if move.version == version), None)
