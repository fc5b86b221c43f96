"""Connects to a Ray cluster: an existing one, or a temporary one on this machine."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.services import get_ray_address_from_environment
from ray.exceptions import AuthenticationError

from metagmvae.configs.load import SettingsError
from metagmvae.infra.cluster.watch import watched_head
from metagmvae.pipelines.records import WorkError

LOG = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 5.0
"""For the first connection to a cluster; Ray itself would try for minutes."""
HTTP2_SETTINGS = b"\x04"
"""Type of the frame that a server of HTTP/2, on which gRPC is based, sends first."""
HTTP2_START = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + HTTP2_SETTINGS + b"\0" * 5
"""What a client of HTTP/2 sends first."""
PACKAGES = ("configs", "pipelines", "training", "evaluation", "infra")
OBJECT_STORE_BYTES = 200 * 2**20
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # With Tune's default of 2 s a trial is lost without a message if a busy worker needs longer to clean up.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
}
"""Set only where the user has not set them."""
NEW_CLUSTER_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Of a cluster that is started here, also only where unset: no cloud provider takes its node away."""


@contextmanager
def cluster(address: str, cpus: int, *, dashboard: bool = False, dry_run: bool = False) -> Iterator[None]:
    """Connect to a Ray cluster and disconnect at the end; a cluster started here is stopped at the end.

    A process that is connected already keeps its connection. Workers of an existing cluster run the code of this
    process, see `_package_copy`.

    Args:
        address: `host:port`, `ray://host:port` or `auto`. `local`: a new cluster on this machine. Empty: RAY_ADDRESS;
            if that is empty too, a new cluster.
        cpus: CPUs that the work needs at the same time.
        dashboard: whether the work needs Ray's dashboard. Trials that train on several workers do: Ray frees the
            workers of a stopped trial only through the dashboard, and without it they wait for each other forever.
        dry_run: start no cluster. A new one would have the CPUs that are needed.

    Raises:
        SettingsError: no cluster answers at the address, it refuses the token, it has too few CPUs or no dashboard.
        WorkError: a cluster on this machine did not start in time.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    address = address or os.environ.get("RAY_ADDRESS", "")
    is_new = address in ("", "local")
    if ray.is_initialized() or (dry_run and is_new):
        yield
        return
    try:
        with _own_signal_handlers():
            context = _start(cpus, dashboard) if is_new else _join(address)
        head = getattr(context, "address_info", {}).get("gcs_address") or address.removeprefix("ray://")
        name = f"{address!r} ({head})" if address == "auto" else repr(address)  # which one, if there are several
        if dashboard and not context.dashboard_url:
            raise SettingsError(
                "Ray runs without its dashboard, which a sweep of trials with several workers needs: pip install "
                "'ray[default]', and start the cluster with --include-dashboard=true"
            )
        available = int(ray.cluster_resources().get("CPU", 0))
        if available < cpus:
            raise SettingsError(
                f"{cpus} CPUs are needed at once (workers times CPUs per worker), but the cluster at {name} "
                f"has {available}: use fewer workers, or add nodes"
            )
        free = int(ray.available_resources().get("CPU", 0))
        if not is_new and free < cpus:  # Ray waits without a word, and for as long as it takes
            LOG.warning(
                "the Ray cluster at %s has %d of its %d CPUs free; the work starts when %d are free",
                name,
                free,
                available,
                cpus,
            )
        # Ray prints about lost workers on standard output whatever its log level. That is for the command's answer, and
        # the error that follows says the same (`worker_failures`).
        with open(os.devnull, "w") as null, redirect_stdout(null), watched_head(head):
            yield
    finally:
        ray.shutdown()


def gpu_count() -> int:
    """GPUs of the cluster; of this machine in a dry run, which starts none."""
    if ray.is_initialized():
        return int(ray.cluster_resources().get("GPU", 0))
    import torch  # not needed by tasks, such as those of `prepare`

    return torch.cuda.device_count()


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the handler of SIGTERM of this process, which `ray.init` replaces by one that ends it without a word."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before != signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _join(address: str) -> Any:
    """Connect to an existing cluster.

    Raises:
        SettingsError: it does not answer or refuses the connection.
    """
    found = _find_cluster(address)
    try:
        with _package_copy() as package:
            # Ray reads the token of ~/.ray by itself for "auto" only.
            address_of_ray = address if address == "auto" else found
            return _init(address=address_of_ray, runtime_env={"env_vars": ENVIRONMENT, "py_modules": [package]})
    except (ConnectionError, AuthenticationError) as error:
        if "AuthenticationError" in repr(error) + repr(error.__cause__):
            raise SettingsError(
                f"run.address (or RAY_ADDRESS) = {address!r}: the cluster requires a token; set RAY_AUTH_MODE=token, "
                "and RAY_AUTH_TOKEN to the cluster's token unless it is in ~/.ray/auth_token"
            ) from error
        raise _no_cluster(address) from error


def _start(cpus: int, dashboard: bool) -> Any:
    """Start a cluster on this machine, whatever other clusters run here or have left files in /tmp/ray.

    Raises:
        SettingsError: Ray cannot write its token into the home folder.
        WorkError: the start took longer than Ray allows.
    """
    port = _free_port()
    # Ray's cleaner of stopped trials asks the dashboard. Without an address it asks that of the newest cluster on this
    # machine, which may be another one, and then the workers of a stopped trial are never freed.
    dashboard_address = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"} if dashboard else {}
    try:
        # Not as a runtime environment: Ray would start new processes for it, and not use those that wait for work.
        unset = {key: value for key, value in NEW_CLUSTER_ENVIRONMENT.items() if key not in os.environ}
        with _inherited(unset | dashboard_address):
            return _init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, cpus),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=dashboard,
                dashboard_port=port if dashboard else None,
            )
    except (PermissionError, NotADirectoryError) as error:
        remedy = "set HOME to a writable folder, or RAY_AUTH_TOKEN to a secret of your own"
        raise SettingsError(f"{error.filename}: Ray cannot write there ({error.strerror}); {remedy}") from error
    except Exception as error:  # Ray raises a plain Exception, and its limit of 30 s is not configurable
        if "timed out during startup" not in str(error):
            raise
        remedy = "try again when the machine is less busy, or join a running cluster: --set run.address=auto"
        raise WorkError(f"Ray did not start within 30 s because this machine is too busy: {remedy}") from error


@contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _init(**options: Any) -> Any:
    # Under `uv run`, Ray would send the project folder to every worker and build its environment there, or refuse a
    # folder that is too large. Ray reads the variable when it is imported, which may have happened before.
    if "RAY_ENABLE_UV_RUN_RUNTIME_ENV" not in os.environ:
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    return ray.init(log_to_driver=False, logging_level="ERROR", **options)


@contextmanager
def _package_copy() -> Iterator[str]:
    """A copy of this package for Ray to send to all nodes, in a folder with its import name `metagmvae`.

    Workers then run the code of the driver, whatever version their node has installed. The copy is needed because a
    source checkout may have any folder name and holds files that workers do not need.
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


def _find_cluster(address: str) -> str:
    """The address of a cluster that answers; that of `auto` is the one of a cluster on this machine.

    `ray.init` would try for minutes to connect to a port at which something else than Ray answers.

    Raises:
        SettingsError: it is no address, or no server of gRPC, which Ray uses, answers there.
    """
    try:
        found: str = get_ray_address_from_environment("auto", None) if address == "auto" else address
        host, _, port = found.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            raise SettingsError(
                f"run.address (or RAY_ADDRESS) = {address!r}: give host:port, ray://host:port, auto or local"
            )
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                connection.sendall(HTTP2_START)
                if connection.recv(9)[3:4] != HTTP2_SETTINGS:
                    raise ConnectionError("not a server of gRPC")
    except (OSError, OverflowError) as error:
        raise _no_cluster(address) from error
    return found


def _no_cluster(address: str) -> SettingsError:
    return SettingsError(
        f"run.address (or RAY_ADDRESS) = {address!r}: no Ray cluster answers there; start one, or leave it empty to "
        "use this machine"
    )
