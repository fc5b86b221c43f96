"""Makes a challenger the champion of a registered model if it is better, and stores the evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metagmvae.configs.schema import TrackingSettings
from metagmvae.evaluation.comparison.head_to_head import EvalPlan, HeadToHead, evaluate_head_to_head
from metagmvae.evaluation.comparison.promotion_rule import MARGIN, Decision, check_margin, decide
from metagmvae.evaluation.provenance import provenance
from metagmvae.infra.registry.alias_change import change_alias, describe_move, settled_state
from metagmvae.infra.registry.alias_history import AliasChange, AliasState, alias_state, alias_version, read_history
from metagmvae.infra.registry.evidence import Evidence, Status, complete_tags, tag_version, upload_evidence
from metagmvae.infra.registry.register import check_alias_name, check_model_name, register, registered_version
from metagmvae.infra.registry.resolve import find_version, load_from_store
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.run_tracker import tracking_settings
from metagmvae.infra.tracking.run_uploader import upload_run
from metagmvae.infra.tracking.store import Store, connect
from metagmvae.infra.tracking.tracking_errors import tracking_errors
from metagmvae.pipelines.optional_packages import MissingPackageError
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.package import LoadedModel, load_model


@dataclass(frozen=True)
class PromotionRequest:
    """Arguments of `promote`."""

    challenger: str
    """`models:/name/3`, or a run folder."""
    over: str = ""
    """Model to compare with if no version has the alias yet; empty: none."""
    alias: str = "champion"
    name: str = ""
    """Registered model for a run folder; empty: the one in its settings."""
    allow_equal: bool = False
    margin: float = MARGIN
    dry_run: bool = False


@dataclass(frozen=True)
class Challenger:
    """The loaded challenger and its place in the registry."""

    store: Store
    tracking: TrackingSettings
    name: str
    """Name of the registered model."""
    version: str
    """Empty: a run folder that is not registered."""
    loaded: LoadedModel
    given: str
    """The reference or folder in the request."""

    @property
    def ref(self) -> str:
        """Reference of the version; the folder of a run that is not registered."""
        return f"models:/{self.name}/{self.version}" if self.version else self.given


def promote(request: PromotionRequest, plan: EvalPlan) -> dict[str, Any]:
    """Evaluate challenger and champion, decide by the promotion rule, and move the alias if the challenger won.

    Returns:
        `decision` ("promoted", "refused", or "overtaken" if the alias was moved in the meantime), reason and numbers.

    Raises:
        RuleError: the margin is invalid.
        DataError: a model does not exist, the two cannot be compared, or the challenger is the champion.
        UnfinishedError: the store cannot be reached, or has gone meanwhile.
    """
    check_margin(request.margin)
    check_alias_name(request.alias)
    shot = plan.tasks[0]["shot"]
    with _unfinished("no alias has moved"):
        challenger = _find_challenger(request, shot)
        store, name = challenger.store, challenger.name
        if request.dry_run:
            before = alias_state(store, name, request.alias, read_history(store, name))
        else:
            before, changes = settled_state(store, name, request.alias)
            if completed := _complete_promotion(challenger, before, changes):
                return completed
        opponent = _opponent(request, challenger, before.version)
        champion = (opponent, load_from_store(store, opponent)) if opponent else None
        comparison = evaluate_head_to_head(plan, (request.challenger, challenger.loaded), champion)
        decision = _decide(comparison, request)
        if not request.dry_run and not challenger.version:
            registered = register(Path(request.challenger), challenger.tracking, name, alias="", shot=shot, once=True)
            challenger = replace(challenger, version=registered.version)
    evidence = Evidence(challenger.ref, opponent, request.alias, plan, comparison, decision, provenance())
    if request.dry_run:
        return evidence.answer("would be promoted" if decision.promoted else "would be refused")
    with _unfinished(f"{challenger.ref} is registered, and no alias has moved"):
        if not decision.promoted:
            return _store_evidence(challenger, evidence, "refused")
        return _move_alias(challenger, evidence, before)


class UnfinishedError(TrackingError):
    """The store went away in the middle of a promotion. The message says what is done."""


@contextmanager
def _unfinished(state: str) -> Iterator[None]:
    """Where the store goes away inside the block, say what is done, and that the same command does the rest."""
    try:
        yield
    except (UnfinishedError, MissingPackageError):
        raise
    except TrackingError as error:
        raise UnfinishedError(f"{error}; {state}; run the command again, which does what is missing") from error


def _complete_promotion(
    challenger: Challenger, state: AliasState, changes: Sequence[AliasChange]
) -> dict[str, Any] | None:
    """Complete the tags that an interrupted promotion of this challenger has left out.

    Returns:
        The answer of that promotion; None if the last move gave the alias to another version, or left nothing out.
    """
    last = next((change for change in changes if change.number == state.last_change), None)
    if last is None or not last.evidence or not challenger.version == last.version == state.version:
        return None
    version = _version(challenger)
    with _unfinished(_moved(challenger, state.alias)):
        answer = complete_tags(challenger.store, version, last.evidence)
    return answer and answer | {"evidence": last.evidence}


def _moved(challenger: Challenger, alias: str) -> str:
    return f"models:/{challenger.name}@{alias} is version {challenger.version}, whose tags are not complete"


def _decide(comparison: HeadToHead, request: PromotionRequest) -> Decision:
    if not comparison.champion:
        return Decision(True, "first", request.margin, f"no version has the alias {request.alias!r} yet")
    return decide(comparison.differences, allow_equal=request.allow_equal, margin=request.margin)


def _move_alias(challenger: Challenger, evidence: Evidence, before: AliasState) -> dict[str, Any]:
    """Move the alias, unless it was moved since the two models were loaded."""
    store, name = challenger.store, challenger.name
    version, folder = _version(challenger), ""
    if alias_state(store, name, before.alias, read_history(store, name)) == before:
        # Before the move, so that no promotion is without its evidence.
        record = evidence.record(challenger.loaded.settings, "promoted")
        folder = upload_evidence(store, version, evidence, record)
        with _unfinished(f"{challenger.ref} is registered, and models:/{name}@{before.alias} may have moved to it"):
            moved = change_alias(store, name, "promoted", before, challenger.version, evidence=folder)
        if moved:
            with _unfinished(_moved(challenger, before.alias)):
                tag_version(store, version, record, folder)
            return evidence.answer("promoted") | {"evidence": folder}
    reason = describe_move(store, name, before)
    # If another process promoted the same version, its tags are about that promotion.
    if alias_version(store, name, before.alias) == challenger.version:
        return evidence.answer("overtaken", reason)
    return _store_evidence(challenger, evidence, "overtaken", reason, folder)


def _store_evidence(
    challenger: Challenger, evidence: Evidence, status: Status, reason: str = "", folder: str = ""
) -> dict[str, Any]:
    version = _version(challenger)
    record = evidence.record(challenger.loaded.settings, status, reason)
    folder = upload_evidence(challenger.store, version, evidence, record, folder)
    tag_version(challenger.store, version, record, folder)
    return evidence.answer(status, reason) | {"evidence": folder}


def _version(challenger: Challenger) -> Any:
    with tracking_errors(challenger.store.uri):
        return find_version(challenger.store, challenger.ref)


def _find_challenger(request: PromotionRequest, shot: int) -> Challenger:
    """Load the challenger from the registry or from a run folder."""
    given = request.challenger
    if given.startswith("models:"):
        if request.name:
            raise DataError(f"--name {request.name}: only for a run folder; {given} already names a registered model")
        store = connect(TrackingSettings(), create=False)
        with tracking_errors(store.uri):
            version = find_version(store, given)
        loaded = load_from_store(store, f"models:/{version.name}/{version.version}")
        return Challenger(store, TrackingSettings(), version.name, str(version.version), loaded, given)
    if given.startswith("runs:"):
        raise DataError(f"{given}: give models:/NAME/VERSION, or the run folder, which is then registered")
    tracking = tracking_settings(given)
    name, loaded = check_model_name(request.name or tracking.register_as), load_model(given, shot=shot)
    challenger = Challenger(connect(tracking, create=not request.dry_run), tracking, name, "", loaded, given)
    if request.dry_run:
        return challenger
    run_id = upload_run(given, tracking).run_id
    return replace(challenger, version=registered_version(challenger.store, name, run_id, loaded))


def _opponent(request: PromotionRequest, challenger: Challenger, aliased: str | None) -> str:
    """Return the reference of the model to compare with; empty if there is none."""
    champion = f"models:/{challenger.name}/{aliased}" if aliased else ""
    if request.over:
        with tracking_errors(challenger.store.uri):
            named = find_version(challenger.store, request.over)
        over = f"models:/{named.name}/{named.version}"
        if champion and over != champion:
            raise DataError(
                f"--over {request.over}: is {over}, but models:/{challenger.name}@{request.alias} is {champion}, which "
                "the challenger must be compared with; omit --over"
            )
        champion = over
    if challenger.version and champion == challenger.ref:
        raise DataError(
            f"{request.challenger}: is already {request.alias} of {challenger.name}, as version {challenger.version}"
        )
    return champion
