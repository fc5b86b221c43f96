"""The Ray cluster that work runs on: one that is there, or one of this machine for the time being."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray

from metagmvae.configs.load import SettingsError
from metagmvae.configs.schema import Settings

POLL_S = "0.5"
PATIENCE_S = 5.0
"""For a cluster to take a connection; Ray itself would try for minutes."""
PACKAGES = ("configs", "pipelines", "training", "evaluation", "infra")
OBJECT_STORE = 200 * 2**20
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_S,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Tune loses a trial without a word where a busy worker has not cleared up after 2 s, its default.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
}
"""Set where the user has not set them."""


@contextmanager
def cluster(address: str, cpus: int, *, dashboard: bool = False) -> Iterator[None]:
    """Join a cluster, or start one on this machine and end it afterwards.

    Args:
        address: `host:port`, `ray://host:port` or `auto`; empty: a cluster of this machine.
        cpus: that the work needs at once.
        dashboard: whether the work needs Ray's dashboard: a trial that trains on several workers does, as Ray frees
            the workers of a stopped one only by asking it (without it they wait for each other for ever).

    Raises:
        SettingsError: no cluster answers there, it has fewer CPUs in all, or no dashboard.
        RuntimeError: a cluster of this machine did not start in time.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if ray.is_initialized():
        yield
        return
    runtime: dict[str, Any] = {"env_vars": ENVIRONMENT}
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address:
            _check_listening(address)
            with _our_code() as package:
                context = ray.init(address=address, runtime_env={**runtime, "py_modules": [package]}, **quiet)
        else:
            here = max(os.cpu_count() or 1, cpus)
            store = {"object_store_memory": OBJECT_STORE, "include_dashboard": dashboard}
            context = ray.init(address="local", num_cpus=here, runtime_env=runtime, **store, **quiet)
    except ConnectionError as error:
        text = f"run.address = {address!r}: no Ray cluster answers there; start one, or leave it empty"
        raise SettingsError(text) from error
    except (PermissionError, NotADirectoryError) as error:
        # Ray keeps the token by which its processes know each other in the home folder.
        remedy = "set HOME to a folder that can be written, or RAY_AUTH_TOKEN to a secret of your own"
        raise SettingsError(f"{error.filename}: Ray cannot write there ({error.strerror}); {remedy}") from error
    except Exception as error:  # Ray raises a plain one, and its 30 s are no setting of it
        if "timed out during startup" not in str(error):
            raise
        remedy = "try again when there is less to do, or join a cluster that runs already: --set run.address=auto"
        raise RuntimeError(f"Ray did not start within its 30 s, this machine is too busy: {remedy}") from error
    try:
        if dashboard and not context.dashboard_url:
            raise SettingsError(
                "Ray runs without its dashboard, which a sweep of trials with several workers needs: pip install "
                "'ray[default]', and start the cluster with --include-dashboard=true"
            )
        there = int(ray.cluster_resources().get("CPU", 0))
        if there < cpus:
            raise SettingsError(
                f"{cpus} CPUs are needed at once (workers times CPUs per worker), and the cluster at {address!r} "
                f"has {there}: lower them, or add nodes"
            )
        yield
    finally:
        ray.shutdown()


@contextmanager
def _our_code() -> Iterator[str]:
    """A copy of this package, in a folder of its import name, for Ray to send to the nodes of a cluster.

    Workers then run the code of the driver, whatever version their node has installed; a source checkout has another
    folder name, and holds what workers do not need.
    """
    root = Path(__file__).parents[2]
    with TemporaryDirectory() as folder:
        package = Path(folder) / "metagmvae"
        package.mkdir()
        for name in ("__init__.py", "__main__.py"):
            shutil.copy2(root / name, package)
        for name in PACKAGES:
            shutil.copytree(root / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        yield str(package)


def _check_listening(address: str) -> None:
    """Refuse at once an address where nothing listens.

    Raises:
        ConnectionError: it is not host:port, or nobody answers.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise SettingsError(f"run.address = {address!r}: give host:port, ray://host:port or auto")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE_S).close()
    except OSError as error:
        raise ConnectionError(str(error)) from error


def cluster_address(settings: Settings) -> str:
    """The Ray cluster to join: the setting, RAY_ADDRESS, or none (one is started on this machine)."""
    return settings.run.address or os.environ.get("RAY_ADDRESS", "")
