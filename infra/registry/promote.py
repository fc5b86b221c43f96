"""A challenger takes the place of the champion of a registered model, or does not; with the evidence kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metagmvae.configs.schema import TrackingSettings
from metagmvae.evaluation.comparison.head_to_head import EvalPlan, HeadToHead, evaluate_head_to_head
from metagmvae.evaluation.comparison.promotion_rule import MARGIN, Decision, check_margin, decide
from metagmvae.evaluation.provenance import provenance
from metagmvae.infra.registry.alias_history import alias_version, last_change, move_alias, read_history
from metagmvae.infra.registry.evidence import Evidence, Result, keep_files, keep_tags
from metagmvae.infra.registry.register import checked_name, register
from metagmvae.infra.registry.registry_lock import registry_lock
from metagmvae.infra.registry.resolve import find_version, load_from
from metagmvae.infra.tracking.run_tracker import tracking_settings
from metagmvae.infra.tracking.run_uploader import upload_run
from metagmvae.infra.tracking.store import Store, connect, paginate, tracking_errors
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.package import LoadedModel, load_model


@dataclass(frozen=True)
class PromotionRequest:
    """What `promote` was asked for."""

    challenger: str
    """`models:/name/3`, or a run folder."""
    over: str = ""
    """What to be better than where no version has the alias yet; empty: nothing."""
    alias: str = "champion"
    name: str = ""
    """Registered model for a run folder; empty: as its settings say."""
    allow_equal: bool = False
    margin: float = MARGIN
    dry_run: bool = False


@dataclass(frozen=True)
class Challenger:
    """A challenger that was found."""

    store: Store
    tracking: TrackingSettings
    name: str
    """Of the registered model."""
    version: str
    """Empty: a run folder that is not registered."""
    loaded: LoadedModel
    given: str
    """As it was asked for."""

    @property
    def ref(self) -> str:
        return f"models:/{self.name}/{self.version}" if self.version else self.given


def promote(wish: PromotionRequest, course: EvalPlan) -> dict[str, Any]:
    """Judge challenger and champion, decide, and move the alias if it is to be moved.

    Returns:
        `decision` ("promoted", "refused", or "overtaken" by another promotion), the reason and the numbers.

    Raises:
        RuleError: the margin is none.
        DataError: there is no such model, the two cannot be compared, or the challenger is the champion.
        TrackingError: the store cannot be reached, or another promotion of that model takes too long.
    """
    check_margin(wish.margin)
    shot = course.tasks[0]["shot"]
    entrant = _find(wish, shot)
    before = alias_version(entrant.store, entrant.name, wish.alias)
    over = _over(wish, entrant, before)
    champion = (over, load_from(entrant.store, over)) if over else None
    outcome = evaluate_head_to_head(course, (wish.challenger, entrant.loaded), champion)
    decision = _decide(outcome, wish)
    if not wish.dry_run and not entrant.version:
        given = Path(wish.challenger)
        version = register(given, entrant.tracking, entrant.name, alias="", shot=shot).version
        entrant = replace(entrant, version=version)
    evidence = Evidence(entrant.ref, over, wish.alias, course, outcome, decision, provenance())
    if wish.dry_run:
        return evidence.answer("would be promoted" if decision.promoted else "would be refused")
    if not decision.promoted:
        return _keep(entrant, evidence, "refused")
    return _move(entrant, evidence, before)


def _decide(outcome: HeadToHead, wish: PromotionRequest) -> Decision:
    if not outcome.champion:
        return Decision(
            True, "first", wish.margin, f"no version has the alias {wish.alias!r} yet: nothing to be beaten"
        )
    return decide(outcome.differences, allow_equal=wish.allow_equal, margin=wish.margin)


def _move(entrant: Challenger, evidence: Evidence, before: str | None) -> dict[str, Any]:
    """Under the lock: the alias moves only from where it stood when the two were judged."""
    store, name, alias = entrant.store, entrant.name, evidence.alias
    version = _entry(entrant)
    with registry_lock(store, name) as lock:
        now = alias_version(store, name, alias)
        if now == before:
            where = keep_files(store, version, evidence, entrant.loaded.settings, "promoted", "")
            move_alias(store, lock, "promoted", alias, entrant.version, before, evidence=where)
    if now != before:
        reason = alias_moved_since(store, name, alias, before, now)
        if now == entrant.version:  # its tags are those of the promotion that came first
            return evidence.answer("overtaken", reason)
        return _keep(entrant, evidence, "overtaken", reason)
    # Not under the lock, which others may wait for: they are many small requests, and of this version only.
    keep_tags(store, version, evidence, "promoted", "", where)
    return evidence.answer("promoted") | {"evidence": where}


def alias_moved_since(store: Store, name: str, alias: str, before: str | None, now: str | None) -> str:
    """One line about who moved an alias that is not where it was."""
    last = last_change(read_history(store, name), alias, now)
    who = f"{last.action} by {last.by} at {last.time}" if last else "moved by hand, without a record"
    was, is_ = (f"version {number}" if number else "no version" for number in (before, now))
    return f"models:/{name}@{alias} went from {was} to {is_} in the meantime ({who}); ask again"


def _keep(entrant: Challenger, evidence: Evidence, result: Result, reason: str = "") -> dict[str, Any]:
    version = _entry(entrant)
    where = keep_files(entrant.store, version, evidence, entrant.loaded.settings, result, reason)
    keep_tags(entrant.store, version, evidence, result, reason, where)
    return evidence.answer(result, reason) | {"evidence": where}


def _entry(entrant: Challenger) -> Any:
    with tracking_errors(entrant.store.uri):
        return find_version(entrant.store, entrant.ref)


def _find(wish: PromotionRequest, shot: int) -> Challenger:
    """The challenger, by reference or as a run folder."""
    given = wish.challenger
    if given.startswith("models:"):
        if wish.name:
            raise DataError(f"--name {wish.name}: is for a run folder; {given} has a name")
        store = connect(TrackingSettings(), create=False)
        with tracking_errors(store.uri):
            version = find_version(store, given)
        loaded = load_from(store, f"models:/{version.name}/{version.version}")
        return Challenger(store, TrackingSettings(), version.name, str(version.version), loaded, given)
    if given.startswith("runs:"):
        raise DataError(f"{given}: give models:/NAME/VERSION, or the run's folder, which is then registered")
    tracking = tracking_settings(given)
    name, loaded = checked_name(wish.name or tracking.register_as), load_model(given, shot=shot)
    entrant = Challenger(connect(tracking, create=not wish.dry_run), tracking, name, "", loaded, given)
    return entrant if wish.dry_run else replace(entrant, version=_registered_before(entrant))


def _registered_before(entrant: Challenger) -> str:
    """The version that holds this very model of the run already; empty where there is none."""
    run_id = upload_run(entrant.given, entrant.tracking).run_id
    model = [str(entrant.loaded.info.get(key, "")) for key in ("step", "selected_by")]
    with tracking_errors(entrant.store.uri):
        found = paginate(entrant.store.client.search_model_versions, filter_string=f"name = '{entrant.name}'")
        same = [
            str(version.version)
            for version in found
            if version.run_id == run_id and [version.tags.get(key, "") for key in ("step", "selected_by")] == model
        ]
    return same[0] if same else ""


def _over(wish: PromotionRequest, entrant: Challenger, before: str | None) -> str:
    """Reference of the model to be better than; empty where there is none.

    Raises:
        DataError: the challenger is it, or another one was named than the champion.
    """
    champion = f"models:/{entrant.name}/{before}" if before else ""
    if wish.over:
        with tracking_errors(entrant.store.uri):
            named = find_version(entrant.store, wish.over)
        over = f"models:/{named.name}/{named.version}"
        if champion and over != champion:
            raise DataError(
                f"--over {wish.over}: is {over}, and models:/{entrant.name}@{wish.alias} is {champion}; a champion "
                "gives way only to what is better than itself: leave --over out"
            )
        champion = over
    if entrant.version and champion == entrant.ref:
        raise DataError(f"{wish.challenger}: is {wish.alias} of {entrant.name} already, as version {entrant.version}")
    return champion
