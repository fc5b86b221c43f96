"""Moves an alias back to the version that had it before the last promotion."""

from __future__ import annotations

import re
from typing import Any

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.registry.alias_change import change_alias, describe_move
from metagmvae.infra.registry.alias_history import alias_state, alias_version, promotion_change, read_history
from metagmvae.infra.registry.resolve import find_version
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.store import connect
from metagmvae.infra.tracking.tracking_errors import tracking_errors
from metagmvae.pipelines.records import DataError


def roll_back(ref: str, alias: str, dry_run: bool = False) -> dict[str, Any]:
    """Undo the promotion of the version that an alias points to. The next call undoes the promotion before it.

    `ref` is `models:/name` or `models:/name@alias`; `alias` is used if it names none.

    Raises:
        DataError: there is no version to go back to; says why.
        TrackingError: the store cannot be reached; after a lost answer the alias may have moved.
    """
    match = re.fullmatch(r"models:/([^/@'\"]+)(?:@([^/@]+))?", ref)
    if match is None:
        raise DataError(f"{ref}: --rollback takes models:/NAME@ALIAS without a version")
    name, alias = match[1], match[2] or alias
    store = connect(TrackingSettings(), create=False)
    with tracking_errors(store.uri):
        find_version(store, f"models:/{name}@{alias}")
    changes = read_history(store, name)
    before = alias_state(store, name, alias, changes)
    current = str(before.version)
    undone = promotion_change(changes, alias, current)
    if undone is None or undone.former is None:
        reason = "was the first one" if undone else "got the alias without a recorded promotion"
        raise DataError(f"models:/{name}@{alias}: no version to go back to; version {current} {reason}")
    with tracking_errors(store.uri):
        find_version(store, f"models:/{name}/{undone.former}")
    answer = {
        "decision": "would be rolled back" if dry_run else "rolled back",
        "alias": f"models:/{name}@{alias}",
        "version": undone.former,
        "before": current,
        "undoes": f"the promotion of version {current} by {undone.by} at {undone.time}",
    }
    if dry_run:
        return answer
    try:
        change = change_alias(store, name, "rolled back", before, undone.former, undoes=undone.number)
        if change is None:
            now = alias_version(store, name, alias)
            return answer | {"decision": "overtaken", "reason": describe_move(store, name, before), "version": now}
        with tracking_errors(store.uri):
            for version, key in ((current, "promotion.rolled_back"), (undone.former, "promotion.restored")):
                store.client.set_model_version_tag(name, version, key, f"{change.time} by {change.by}")
    except TrackingError as error:
        raise TrackingError(
            f"{error}; models:/{name}@{alias} may have moved to version {undone.former}: see `metagmvae models {name}` "
            "before another --rollback, which undoes one promotion more"
        ) from error
    return answer | {"by": change.by, "time": change.time}
