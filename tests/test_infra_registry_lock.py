"""The lock of a registered model: one holder at a time, over processes; what is left by the dead is passed over."""

import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow_template
import pytest

from metagmvae.infra.registry import registry_lock as module
from metagmvae.infra.registry.registry_lock import BusyError, registry_lock
from metagmvae.infra.tracking.store import connect

REPOSITORY = Path(__file__).parents[1]
COUNT = """
import sys, time
from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.tracking.store import connect
from metagmvae.infra.registry.registry_lock import registry_lock

store = connect(TrackingSettings(uri=sys.argv[1]))
for _ in range(int(sys.argv[2])):
    with registry_lock(store, "counted", patience_s=200):
        tags = store.client.get_registered_model("counted").tags
        time.sleep(0.01)  # whoever is in here too has read the same number
        store.client.set_registered_model_tag("counted", "count", str(int(tags.get("count", 0)) + 1))
"""


@pytest.fixture
def store(tmp_path):
    return connect(mlflow_template.new_store(tmp_path / "store"))


def links(store) -> list[tuple[str, str]]:
    found = store.client.search_experiments(view_type=3, filter_string=f"name LIKE '{module.PREFIX}/%'")
    return sorted((experiment.name, experiment.lifecycle_stage) for experiment in found)


def make(store, number: int, **tags: str) -> str:
    return store.client.create_experiment(f"{module.PREFIX}/x/{number}", store.artifacts, tags=tags)


def test_processes_that_count_lose_no_number(store):
    store.client.create_registered_model("counted")
    environment = {**os.environ}
    command = [sys.executable, "-c", COUNT, store.uri, "8"]
    running = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert store.client.get_registered_model("counted").tags["count"] == "16"
    assert {stage for _, stage in links(store)} == {"deleted"}


def test_a_second_holder_is_told_who_is_first(store):
    with registry_lock(store, "x"):
        told = rf"^x: .*@.*, process {os.getpid()} is since 20.* at work"
        with pytest.raises(BusyError, match=told), registry_lock(store, "x", patience_s=0):
            pass
        with registry_lock(store, "x_", patience_s=0), registry_lock(store, "X", patience_s=0):
            pass  # other models have other locks, and their links are not taken for each other's
    with registry_lock(store, "x", patience_s=0):
        pass
    assert [name for name, _ in links(store) if "/x/" in name] == ["metagmvae-lock/x/1", "metagmvae-lock/x/2"]


def test_a_lock_is_let_go_when_its_work_fails(store):
    with pytest.raises(KeyError), registry_lock(store, "x"):
        raise KeyError
    with registry_lock(store, "x", patience_s=0):
        pass


def test_a_dead_holder_is_passed_over_when_its_lease_is_over(store):
    make(store, 1, owner="ann@gone, process 7", lease_s="1")
    with pytest.raises(BusyError, match="ann@gone, process 7"), registry_lock(store, "x", patience_s=0):
        pass
    time.sleep(1.1)
    with registry_lock(store, "x", patience_s=0):
        assert links(store) == [("metagmvae-lock/x/1", "deleted"), ("metagmvae-lock/x/2", "active")]


def test_a_clock_that_is_ahead_robs_nobody(store, monkeypatch):
    """A contender whose clock is a day ahead takes a live lock for a dead one, until it has asked the store's clock."""
    real = time.time
    with registry_lock(store, "x"):
        monkeypatch.setattr(module.time, "time", lambda: real() + 86400)
        # SQLite's clock is that of the process, too, so the store's is held still by its own module's name.
        monkeypatch.setattr(
            "mlflow.store.tracking.sqlalchemy_store.get_current_time_millis", lambda: int(1000 * real())
        )
        with pytest.raises(BusyError), registry_lock(store, "x", patience_s=1):
            pass
        assert [stage for _, stage in links(store)] == ["active", "deleted"]


def test_a_number_that_is_used_twice_lets_only_one_in(store, monkeypatch):
    """As after `mlflow gc`: a contender has seen no links, while another one made a later one."""
    seen = module._links
    make(store, 7, owner="ann@here", lease_s="60")
    early = [[]]
    monkeypatch.setattr(module, "_links", lambda *request: early.pop() if early else seen(*request))
    with pytest.raises(BusyError, match="ann@here"), registry_lock(store, "x", patience_s=0):
        pass
    assert links(store) == [("metagmvae-lock/x/1", "deleted"), ("metagmvae-lock/x/7", "active")]


def test_an_answer_that_was_lost_is_known_again(store):
    """The HTTP client asks a second time: the link is there already, and it is ours by its token."""
    assert module._make(store, "x", 1, "ours") == module._make(store, "x", 1, "ours")
    assert module._make(store, "x", 1, "another's") is None


def test_a_holder_that_takes_too_long_writes_nothing(store, monkeypatch):
    with registry_lock(store, "x") as lock:
        lock.check()
        monkeypatch.setattr(module, "WORK_S", 0.0)
        with pytest.raises(BusyError, match="is given up"):
            lock.check()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")
    assert module._lease_s() >= 200  # a write that began in time arrives before the lease is over
