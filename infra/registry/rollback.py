"""An alias goes back to the version that had it before the last promotion."""

from __future__ import annotations

import re
from typing import Any

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.registry.alias_history import (
    AliasChange,
    alias_version,
    move_alias,
    promotion_change,
    read_history,
)
from metagmvae.infra.registry.promote import alias_moved_since
from metagmvae.infra.registry.registry_lock import registry_lock
from metagmvae.infra.registry.resolve import find_version
from metagmvae.infra.tracking.store import Store, connect, tracking_errors
from metagmvae.pipelines.records import DataError


def roll_back(ref: str, alias: str, dry_run: bool = False) -> dict[str, Any]:
    """Take back the promotion of the version that an alias points to; again, and the one before it is taken back.

    Args:
        ref: `models:/name` or `models:/name@alias`.
        alias: where the reference names none.
        dry_run: only say what would be done.

    Raises:
        DataError: there is nothing to go back to; says why.
        TrackingError: the store cannot be reached, or another promotion of that model takes too long.
    """
    match = re.fullmatch(r"models:/([^/@'\"]+)(?:@([^/@]+))?", ref)
    if match is None:
        raise DataError(f"{ref}: --rollback takes models:/NAME@ALIAS, and finds the version itself")
    name, alias = match[1], match[2] or alias
    store = connect(TrackingSettings(), create=False)
    with tracking_errors(store.uri):
        current = str(find_version(store, f"models:/{name}@{alias}").version)
    undone = _undone(store, name, alias, current)
    answer = {
        "decision": "would be rolled back" if dry_run else "rolled back",
        "alias": f"models:/{name}@{alias}",
        "version": undone.former,
        "before": current,
        "undoes": f"the promotion of version {current} by {undone.by} at {undone.time}",
    }
    return answer if dry_run else answer | _go_back(store, name, alias, undone)


def _undone(store: Store, name: str, alias: str, current: str) -> AliasChange:
    """The promotion to take back, whose former champion is still there."""
    found = promotion_change(read_history(store, name), alias, current)
    if found is None or found.former is None:
        why = "was the first one" if found else "got it without a promotion on record"
        raise DataError(f"models:/{name}@{alias}: no former version to go back to; version {current} {why}")
    with tracking_errors(store.uri):
        find_version(store, f"models:/{name}/{found.former}")
    return found


def _go_back(store: Store, name: str, alias: str, undone: AliasChange) -> dict[str, Any]:
    assert undone.former is not None
    with registry_lock(store, name) as lock:
        now = alias_version(store, name, alias)
        if now != undone.version:
            reason = alias_moved_since(store, name, alias, undone.version, now)
            return {"decision": "overtaken", "reason": reason, "version": now}
        move = move_alias(store, lock, "rolled back", alias, undone.former, undone.version, undoes=undone.number)
        with tracking_errors(store.uri):
            for version, key in ((undone.version, "promotion.rolled_back"), (undone.former, "promotion.restored")):
                store.client.set_model_version_tag(name, version, key, f"{move.time} by {move.by}")
    return {"by": move.by, "time": move.time}
