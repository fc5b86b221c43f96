"""What Ray keeps to itself while a command waits is said: a lost head node, too few nodes."""

import socket
import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from metagmvae.infra.cluster import watch
from metagmvae.infra.cluster.train_on_ray import new_stop_flag

pytestmark = pytest.mark.ray


def wait_for_messages(caplog, count):
    deadline = time.monotonic() + 60
    while len(caplog.messages) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_head_node_that_stops_answering_is_named_once(monkeypatch, caplog):
    """Ray itself ends the process a minute later, without a line about what to do."""
    monkeypatch.setattr(watch, "WATCH_S", 0.05)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with watch.watched_head(address):
            head.accept()[0].close()  # it is asked
            assert caplog.messages == []
            head.close()
            wait_for_messages(caplog, 1)
            time.sleep(0.2)
    (line,) = caplog.messages
    assert line.startswith(f"the head node of the Ray cluster ({address}) does not answer. If it stays away")
    assert not any(thread.name == "ray-watch" for thread in threading.enumerate())


@pytest.fixture
def nodes():
    """A head node with 1 CPU, to which the test is connected, and a function that adds nodes with 2 CPUs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_lost_node_is_named_and_takes_no_stop_flag_with_it(nodes, monkeypatch, caplog):
    """Ray Train waits for other nodes without a word. Without its flag, a training does not stop at a signal."""
    monkeypatch.setattr(watch, "WATCH_S", 0.1)
    node = nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    flags = [new_stop_flag() for _ in range(5)]  # without a place of their own, some are started on the other node
    assert ray.get([flag.poll.remote() for flag in flags]) == [False] * 5
    with watch.watched_resources({"CPU": 3, "GPU": 0}):
        time.sleep(0.5)
        assert caplog.messages == []
        nodes.remove_node(node)
        wait_for_messages(caplog, 1)
        assert ray.get([flag.request.remote() for flag in flags], timeout=30) == [True] * 5
        nodes.add_node(num_cpus=2)
        wait_for_messages(caplog, 2)
        time.sleep(0.5)
    lost, back = caplog.messages
    assert lost.startswith("the Ray cluster has lost a node: 1 of the 3 CPUs of this training are left. It goes on")
    assert back == "the Ray cluster has enough nodes again: the training goes on from its last checkpoint"
