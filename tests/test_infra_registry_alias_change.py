"""Every order of the requests of two and three processes that move the same alias at once.

`change_alias` runs against a simulated MLflow client that stops it after each request. A stopped process is continued
by running it again from the start with the answers that it got before, so every reachable state of the store and of
the processes is visited once.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS

from metagmvae.infra.registry import alias_change, alias_history
from metagmvae.infra.registry.alias_change import change_alias, describe_move
from metagmvae.infra.registry.alias_history import AliasState, alias_state, read_history
from metagmvae.infra.tracking import tracking_errors
from metagmvae.infra.tracking.store import Store


class Stopped(BaseException):
    """The process has made its next request and is stopped there."""


@dataclass(frozen=True)
class Mlflow:
    """Content of the store. Every request returns an answer and a new content."""

    aliases: dict[str, str] = field(default_factory=lambda: {"champion": "1"})
    tags: dict[str, str] = field(default_factory=dict)
    experiments: dict[str, dict[str, str]] = field(default_factory=dict)

    def get_registered_model(self, name: str) -> tuple[Any, "Mlflow"]:
        return SimpleNamespace(aliases=self.aliases, tags=self.tags, creation_timestamp=1), self

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> tuple[None, "Mlflow"]:
        return None, replace(self, aliases=self.aliases | {alias: version})

    def set_registered_model_tag(self, name: str, key: str, value: str) -> tuple[None, "Mlflow"]:
        return None, replace(self, tags=self.tags | {key: value})

    def create_experiment(self, name: str, artifact_location: str, tags: dict[str, str]) -> tuple[Any, "Mlflow"]:
        if name in self.experiments:
            return MlflowException(name, error_code=RESOURCE_ALREADY_EXISTS), self
        return name, replace(self, experiments=self.experiments | {name: tags})

    def get_experiment_by_name(self, name: str) -> tuple[Any, "Mlflow"]:
        return (SimpleNamespace(tags=self.experiments[name]) if name in self.experiments else None), self

    def delete_experiment(self, name: str) -> tuple[None, "Mlflow"]:
        return None, self


class Client:
    """Answers the first requests from a recording, makes one more, and stops the process at the next one."""

    def __init__(self, store: Mlflow, answers: tuple[Any, ...], requests: int = 1) -> None:
        self.store, self.answers, self.requests = store, answers, requests
        self.position = 0

    def __getattr__(self, method: str) -> Any:
        def request(*args: Any, **options: Any) -> Any:
            if self.position == len(self.answers):
                if not self.requests:
                    raise Stopped
                self.requests -= 1
                answer, self.store = getattr(self.store, method)(*args, **options)
                self.answers += (answer,)
            answer = self.answers[self.position]
            self.position += 1
            if isinstance(answer, MlflowException):
                raise answer
            return answer

        return request


@dataclass(frozen=True)
class Process:
    """A process that moves an alias; `result` is "promoted" or "overtaken" when it has ended."""

    name: str
    version: str
    former: str | None = "1"
    last_change: int = 0
    alias: str = "champion"
    answers: tuple[Any, ...] = ()
    result: str = ""

    def step(self, store: Mlflow, requests: int = 1) -> tuple["Process", Mlflow]:
        client = Client(store, self.answers, requests)
        alias_change.uuid.uuid4 = lambda: SimpleNamespace(hex=self.name)
        try:
            before = AliasState(self.alias, self.former, self.last_change)
            change = change_alias(Store(client, "", None), "m", "promoted", before, self.version)
        except Stopped:
            return replace(self, answers=client.answers), client.store
        return replace(self, answers=(), result="promoted" if change else "overtaken"), client.store


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch):
    """Fixed time, author and token; no conversion of errors, which takes most of the time."""
    monkeypatch.setattr(alias_change, "uuid", SimpleNamespace())
    monkeypatch.setattr(alias_change, "datetime", SimpleNamespace(now=lambda zone: datetime(2026, 1, 1, tzinfo=UTC)))
    monkeypatch.setattr(alias_change, "whoami", lambda: "me@here")
    for module in (alias_change, alias_history):
        monkeypatch.setattr(module, "tracking_errors", lambda uri: nullcontext())
    for module in (alias_change, tracking_errors):
        monkeypatch.setattr(module, "import_mlflow", lambda: SimpleNamespace(MlflowException=MlflowException))


def reachable(store: Mlflow, processes: tuple[Process, ...]) -> list[tuple[Mlflow, tuple[Process, ...]]]:
    """Return every state of store and processes that some order of the requests leads to."""
    states = {repr((store, processes)): (store, processes)}
    unexplored = [(store, processes)]
    while unexplored:
        store, processes = unexplored.pop()
        for index, process in enumerate(processes):
            if not process.result:
                moved, new_store = process.step(store)
                state = new_store, (*processes[:index], moved, *processes[index + 1 :])
                if states.setdefault(repr(state), state) is state:
                    unexplored.append(state)
    return list(states.values())


def check_history(store: Mlflow, processes: tuple[Process, ...], alias: str = "champion", first: str | None = "1"):
    """The history is an unbroken chain that ends where the alias points, and holds exactly the promoted versions."""
    changes = [c for c in read_history(Store(Client(store, ()), "", None), "m") if c.alias == alias]
    versions = [first, *(change.version for change in changes)]
    assert [change.former for change in changes] == versions[:-1]
    assert store.aliases.get(alias) == versions[-1]
    assert sorted(versions[1:]) == sorted(p.version for p in processes if p.result == "promoted" and p.alias == alias)


def test_of_two_processes_one_is_promoted_in_every_order():
    states = reachable(Mlflow(), (Process("A", "2"), Process("B", "3")))
    ended = [(store, processes) for store, processes in states if all(p.result for p in processes)]
    assert len(states) > 100
    assert {tuple(p.result for p in processes) for _, processes in ended} == {
        ("promoted", "overtaken"),
        ("overtaken", "promoted"),
    }
    for store, processes in ended:
        check_history(store, processes)


@pytest.mark.slow
def test_of_three_processes_one_is_promoted_in_every_order():
    processes = Process("A", "2"), Process("B", "3"), Process("C", "4")
    for store, ended in reachable(Mlflow(), processes):
        if all(process.result for process in ended):
            assert sorted(process.result for process in ended) == ["overtaken", "overtaken", "promoted"]
            check_history(store, ended)


def test_first_alias_is_given_once():
    processes = Process("A", "1", former=None), Process("B", "2", former=None)
    for store, ended in reachable(Mlflow(aliases={}), processes):
        if all(process.result for process in ended):
            assert sorted(process.result for process in ended) == ["overtaken", "promoted"]
            check_history(store, ended, first=None)


def test_two_aliases_move_at_once():
    start = Mlflow(aliases={"champion": "1", "staging": "1"})
    processes = Process("A", "2"), Process("B", "3", alias="staging")
    for store, ended in reachable(start, processes):
        if all(process.result for process in ended):
            assert [process.result for process in ended] == ["promoted", "promoted"]
            check_history(store, ended)
            check_history(store, ended, alias="staging")


def later_process(store: Mlflow, name: str, version: str) -> Process:
    """A process that starts now: it compares its model with the version that the alias points to."""
    opened = Store(Client(store, (), requests=2), "", None)
    before = alias_state(opened, "m", "champion", read_history(opened, "m"))
    return Process(name, version, before.version, before.last_change)


def test_process_that_dies_after_any_request_blocks_nobody_and_loses_no_promotion():
    """A claimed promotion is completed by the next process, which is overtaken by it and promotes when repeated."""
    for store, (dead, other) in reachable(Mlflow(), (Process("A", "2"), Process("B", "3"))):
        if not other.result:
            continue
        assert other.result == "promoted" or dead.version == store.aliases["champion"]
        last, store = later_process(store, "C", "4").step(store, requests=1000)
        if last.result == "overtaken":
            last, store = later_process(store, "C", "4").step(store, requests=1000)
        assert last.result == "promoted"
        claimed = [json.loads(tags["record"])["version"] for tags in store.experiments.values()]
        if dead.version in claimed:
            dead = replace(dead, result="promoted")
        check_history(store, (dead, other, last))


def test_process_is_suspended_after_any_request_while_others_promote():
    """B completes the move of A, and C promotes over A's version. A's own write may come last, and A corrects it.

    D compared its model with A's version before C replaced it; it may run at any time.
    """
    for requests in range(20):
        a, store = Process("A", "2").step(Mlflow(), requests)
        b, store = Process("B", "3").step(store, requests=1000)
        c, store = later_process(store, "C", "4"), store
        d = replace(c, name="D", version="5")
        c, store = c.step(store, requests=1000)
        for end_store, end in reachable(store, (a, b, c, d)):
            if all(process.result for process in end):
                check_history(end_store, end)


def test_repeated_request_is_recognised():
    """The HTTP client repeats a request whose answer was lost: the claim then exists, and holds our token."""
    a, store = Process("A", "2").step(Mlflow(), requests=4)
    assert store.experiments
    answers = (*a.answers[:3], MlflowException("exists", error_code=RESOURCE_ALREADY_EXISTS))
    a, store = replace(a, answers=answers).step(store, requests=1000)
    assert a.result == "promoted"
    check_history(store, (a,))


def test_alias_that_was_moved_by_hand_stays_when_a_dead_process_is_completed():
    claimed = False
    for requests in range(20):
        dead, store = Process("A", "2").step(Mlflow(), requests)
        by_hand = replace(store, aliases={"champion": "9"})
        claimed |= bool(store.experiments) and not dead.result
        _, store = later_process(by_hand, "B", "3").step(by_hand, requests=1000)
        assert store.aliases["champion"] in ("3", "9")
    assert claimed


def test_request_that_fails_because_another_process_makes_it_too_is_repeated():
    for requests in (8, 9):  # set the alias, set the tag
        a, store = Process("A", "2").step(Mlflow(), requests)
        error = MlflowException("UNIQUE constraint failed")
        a, store = replace(a, answers=(*a.answers[:-1], error)).step(store, requests=1000)
        assert a.result == "promoted"
        check_history(store, (a,))


def test_move_that_is_not_recorded_yet_is_described_with_its_author():
    for requests in range(20):
        _, store = Process("A", "2").step(Mlflow(), requests)
        if store.experiments:
            client = Client(store, (), requests=1000)
            line = describe_move(Store(client, "", None), "m", AliasState("champion", "1", 0))
            assert "from version 1 to version 2 in the meantime (promoted by me@here" in line
