"""Reads who moved an alias of a registered model, when, and from which version.

Each move is stored as one tag of the registered model. `alias_change` writes these tags.

What reads or writes a store raises a TrackingError if it cannot be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from metagmvae.infra.tracking.store import Store
from metagmvae.infra.tracking.tracking_errors import ignored, tracking_errors
from metagmvae.pipelines.records import DataError

PREFIX = "promotion.history."
Action = Literal["registered", "promoted", "rolled back"]
"""The command that moved the alias: `train` (to the first version of a name), `promote`, `promote --rollback`."""


class AliasChange(BaseModel, frozen=True, extra="forbid"):
    """One move of an alias."""

    number: int
    """Counts the moves of all aliases of the registered model in their order, from 1."""
    action: Action
    alias: str
    version: str
    """Version that the alias points to after the move."""
    former: str | None = None
    """Version that it pointed to before; None: the alias did not exist."""
    time: str
    by: str
    evidence: str = ""
    """Folder of the evidence, `runs:/id/promotions/…`."""
    undoes: int | None = None
    """Number of the promotion that a rollback undoes."""

    @property
    def tag(self) -> str:
        """Key of the tag that holds this record."""
        return f"{PREFIX}{self.number:06d}"


@dataclass(frozen=True)
class AliasState:
    """Where an alias points, and by which move: what a process compares to find out whether another one moved it."""

    alias: str
    version: str | None
    """None: the registered model or the alias does not exist."""
    last_change: int
    """Number of the last recorded move of this alias; 0: none."""


def alias_state(store: Store, name: str, alias: str, changes: Sequence[AliasChange]) -> AliasState:
    """Return the state of an alias. The history `changes` must have been read before.

    An alias is set before the record of its move appears in the history. So a version that is read after the history
    includes all moves of that history.
    """
    last_change = max((change.number for change in changes if change.alias == alias), default=0)
    return AliasState(alias, alias_version(store, name, alias), last_change)


def alias_version(store: Store, name: str, alias: str) -> str | None:
    """Return the version that an alias points to; None if the registered model or the alias does not exist."""
    model = registered_model(store, name)
    version = None if model is None else model.aliases.get(alias)
    return None if version is None else str(version)


def read_history(store: Store, name: str) -> list[AliasChange]:
    """Return the moves of all aliases of a registered model in their order; empty if the model does not exist.

    Raises:
        DataError: a tag with our prefix is not such a record.
    """
    model = registered_model(store, name)
    tags = {} if model is None else model.tags
    changes = []
    for key in sorted(key for key in tags if key.startswith(PREFIX)):
        try:
            changes.append(AliasChange.model_validate_json(tags[key]))
        except ValidationError as error:
            raise DataError(f"registered model {name}: tag {key} is not a promotion record; delete the tag") from error
    return sorted(changes, key=lambda change: change.number)


def registered_model(store: Store, name: str) -> Any:
    """Return MLflow's entry of a registered model; None if there is none."""
    with tracking_errors(store.uri), ignored("RESOURCE_DOES_NOT_EXIST"):
        return store.client.get_registered_model(name)
    return None


def promotion_change(changes: Sequence[AliasChange], alias: str, version: str) -> AliasChange | None:
    """Return the latest promotion that gave an alias to a version and was not rolled back.

    `version` is the one that the alias points to now.
    """
    ours = [change for change in changes if change.alias == alias]
    versions_after = [*(change.former for change in ours[1:]), version]
    # Earlier releases could record a rollback and die before the move: then the alias did not point where it led.
    undone = {change.undoes for change, after in zip(ours, versions_after, strict=False) if change.version == after}
    promotions = (change for change in reversed(ours) if change.action == "promoted" and change.number not in undone)
    return next((change for change in promotions if change.version == version), None)
