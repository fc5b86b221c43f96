"""`metagmvae doctor`: what this machine has, and a remedy for what is missing or wrong."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

GIB = 2**30
LEAST_DISK_GIB = 5
LEAST_MEMORY_GIB = 4


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, `note` (works, but look) or `wrong`, which has a remedy."""

    check: str
    state: str
    found: str
    remedy: str = ""

    def row(self) -> dict[str, str]:
        return asdict(self)


def examine() -> Iterator[Check]:
    """All checks, one after another; Ray is started on this machine and ended again."""
    for name, check in CHECKS.items():
        try:
            yield check(name)
        except Exception as error:
            # A check that breaks is itself the finding.
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            yield Check(name, "wrong", reason, "this check itself failed: see the message")


def _python(name: str) -> Check:
    version = platform.python_version()
    if tuple(map(int, version.split(".")[:2])) < (3, 11):
        return Check(name, "wrong", version, "make the environment with Python 3.11 or newer")
    return Check(name, "ok", f"{version} on {platform.platform(terse=True)}")


def _packages(name: str) -> Check:
    """Every dependency of the installed distribution at a version that it asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("metagmvae") or []]
    except metadata.PackageNotFoundError:
        return Check(name, "note", "metagmvae runs from its source folder", "pip install -e . checks versions")
    bad, found = [], []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            bad.append(f"{requirement} is missing")
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            bad.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if bad:
        return Check(name, "wrong", "; ".join(bad), "pip install -c constraints.txt .")
    return Check(name, "ok", ", ".join(found))


def _device(name: str) -> Check:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Check(name, "ok", f"{torch.cuda.device_count()} GPU: {names}")
    cores = f"no GPU; {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    if shutil.which("nvidia-smi"):
        remedy = f"the driver is too old for torch {torch.__version__}, or hides its GPUs: see nvidia-smi"
        return Check(name, "wrong", f"{cores}, though nvidia-smi is there", remedy)
    return Check(name, "ok", cores)


def _faiss(name: str) -> Check:
    both = [name for name in ("faiss-cpu", "faiss-gpu") if _installed(name)]
    if len(both) == 2:
        return Check(name, "wrong", "faiss-cpu and faiss-gpu overwrite each other", "uninstall both, install one")
    return Check(name, "ok", f"{both[0]} {metadata.version(both[0])}" if both else "not installed (not needed yet)")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _memory(name: str) -> Check:
    text = Path("/proc/meminfo").read_text(encoding="utf-8") if Path("/proc/meminfo").exists() else ""
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    if match is None:
        return Check(name, "note", "unknown on this system")
    free = int(match[1]) * 1024 / GIB
    if free < LEAST_MEMORY_GIB:
        return Check(
            "memory", "wrong", f"{free:.1f} GiB free", f"end other programs: training takes {LEAST_MEMORY_GIB} GiB"
        )
    return Check(name, "ok", f"{free:.1f} GiB free")


def _disk(name: str) -> Check:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    if free < LEAST_DISK_GIB:
        return Check(name, "wrong", f"{free:.1f} GiB free in {Path.cwd()}", "make room, or work in another folder")
    return Check(name, "ok", f"{free:.1f} GiB free in {Path.cwd()}")


def _temporary(name: str) -> Check:
    """Ray keeps sockets and logs there."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            free = shutil.disk_usage(folder).free / GIB
            found = f"{tempfile.gettempdir()}, {free:.1f} GiB free"
    except OSError as error:
        return Check(name, "wrong", str(error), "set TMPDIR to a folder that can be written")
    if free < 1:
        return Check(name, "wrong", found, "set TMPDIR to a folder with more room")
    return Check(name, "ok", found)


def _home(name: str) -> Check:
    home = Path.home()
    if os.access(home, os.W_OK):
        return Check(name, "ok", str(home))
    return Check(
        "home folder",
        "note",
        f"{home} cannot be written",
        "data sets of object stores are kept elsewhere: set METAGMVAE_CACHE",
    )


def _mlflow(name: str) -> Check:
    from metagmvae.configs.schema import TrackingSettings
    from metagmvae.infra.tracking.store import TrackingError, connect, redact, store_uri, tracking_errors
    from metagmvae.pipelines.records import DataError

    tracking = TrackingSettings()
    uri = redact(store_uri(tracking))
    try:
        store = connect(tracking, create=False)
        with tracking_errors(store.uri):
            count = len(store.client.search_registered_models())
    except DataError:
        return Check(name, "ok", f"none yet at {uri}; the first tracked run makes it")
    except TrackingError as error:
        remedy = (
            "start the server, or unset MLFLOW_TRACKING_URI; runs go on without it and are sent by `metagmvae track`"
        )
        return Check(name, "wrong", str(error), remedy)
    return Check(name, "ok", f"{uri}, {count} registered models")


def _ray(name: str) -> Check:
    from metagmvae.configs.load import SettingsError
    from metagmvae.configs.schema import Settings
    from metagmvae.infra.cluster.connect import cluster, cluster_address

    settings = Settings()
    try:
        with cluster(cluster_address(settings), 1):
            import ray

            resources = ray.cluster_resources()
            nodes = len(ray.nodes())
            answer = ray.get(ray.remote(num_cpus=1)(platform.python_version).remote(), timeout=60)
    except SettingsError as error:
        return Check(name, "wrong", str(error), "start the cluster, or unset RAY_ADDRESS")
    where = cluster_address(settings) or "started on this machine and ended"
    found = f"{nodes} nodes, {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs ({where})"
    if answer != platform.python_version():
        return Check(name, "wrong", f"{found}; workers run Python {answer}", "use the same Python on all nodes")
    return Check(name, "ok", found)


CHECKS: dict[str, Callable[[str], Check]] = {
    "python": _python,
    "packages": _packages,
    "device": _device,
    "faiss": _faiss,
    "memory": _memory,
    "disk": _disk,
    "temporary folder": _temporary,
    "home folder": _home,
    "mlflow store": _mlflow,
    "ray": _ray,
}
