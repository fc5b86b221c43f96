"""`metagmvae doctor`: checks of the installation and the machine, with a remedy for each problem."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from metagmvae.configs.credentials import redact
from metagmvae.evaluation.provenance import installed_version
from metagmvae.infra.tracking.mlflow_environment import MissingMlflowError, TrackingError
from metagmvae.pipelines.optional_packages import EXTRA_OF_PACKAGE, MissingPackageError, optional_package
from metagmvae.pipelines.records import DataError

GIB = 2**30
MIN_DISK_GIB = 5
MIN_MEMORY_GIB = 4


@dataclass(frozen=True)
class CheckResult:
    """Result of one check."""

    state: str
    """`ok`; `note`: works, but deserves attention; `wrong`: must be repaired, see `remedy`."""
    found: str
    remedy: str = ""


def run_checks() -> Iterator[tuple[str, CheckResult]]:
    """Run all checks; yield the name and the result of each.

    The last one starts a Ray cluster on this machine and stops it, unless RAY_ADDRESS names one.
    """
    for name, check in CHECKS.items():
        try:
            yield name, check()
        except Exception as error:  # a check that raises is reported as a problem, and the others still run
            message = (str(error).splitlines() or [type(error).__name__])[0][:300]
            yield name, CheckResult("wrong", message, "the check itself failed, see the message")


def _python() -> CheckResult:
    version = platform.python_version()
    if tuple(map(int, version.split(".")[:2])) < (3, 11):
        return CheckResult("wrong", version, "create the environment with Python 3.11 or newer")
    return CheckResult("ok", f"{version} on {platform.platform(terse=True)}")


def _packages() -> CheckResult:
    """Check that every dependency is installed in a version that the package allows; name extras that are not."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("metagmvae") or []]
    except metadata.PackageNotFoundError:
        return CheckResult("note", "metagmvae is not installed, versions are not checked", "pip install -e .")
    problems, installed, absent = [], [], []
    for requirement in requirements:
        extras = ("", *EXTRA_OF_PACKAGE.values())
        extra = next((e for e in extras if not requirement.marker or requirement.marker.evaluate({"extra": e})), None)
        if extra is None:
            continue
        version = installed_version(requirement.name)
        if version:
            installed.append(f"{requirement.name} {version}")
            if not requirement.specifier.contains(version, prereleases=True):
                problems.append(f"{requirement.name} {version} is not {requirement.specifier}")
        elif extra:
            absent.append(f"[{extra}] {requirement.name}")
        else:
            problems.append(f"{requirement.name}{requirement.specifier} is missing")
    if problems:
        return CheckResult("wrong", "; ".join(problems), "pip install -c constraints.txt .")
    missing = f"; extras that are not installed: {', '.join(dict.fromkeys(absent))}" if absent else ""
    return CheckResult("ok", ", ".join(dict.fromkeys(installed)) + missing)


def _device() -> CheckResult:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return CheckResult("ok", f"{torch.cuda.device_count()} GPU: {names}")
    cores = f"no GPU; {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    if shutil.which("nvidia-smi"):
        remedy = f"update the driver for torch {torch.__version__}, or unset CUDA_VISIBLE_DEVICES; see nvidia-smi"
        return CheckResult("wrong", f"{cores}, although nvidia-smi is installed", remedy)
    return CheckResult("ok", cores)


def _faiss() -> CheckResult:
    versions = {package: installed_version(package) for package in ("faiss-cpu", "faiss-gpu")}
    installed = [f"{package} {version}" for package, version in versions.items() if version]
    if len(installed) == 2:
        return CheckResult("wrong", "faiss-cpu and faiss-gpu overwrite each other", "uninstall both, install one")
    if not installed:
        return CheckResult("ok", "not installed; no command needs it")
    return CheckResult("ok", installed[0])


def _memory() -> CheckResult:
    available = psutil.virtual_memory().available / GIB
    found = f"{available:.1f} GiB available"
    if available < MIN_MEMORY_GIB:
        return CheckResult("wrong", found, f"stop other programs: training needs {MIN_MEMORY_GIB} GiB")
    return CheckResult("ok", found)


def _disk() -> CheckResult:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    found = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < MIN_DISK_GIB:
        return CheckResult("wrong", found, "delete files, or work in another folder")
    return CheckResult("ok", found)


def _temporary_folder() -> CheckResult:
    """Check the folder where Ray keeps its sockets and logs."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return CheckResult("wrong", str(error), "set TMPDIR to a writable folder")
    found = f"{tempfile.gettempdir()}, {free:.1f} GiB free"
    if free < 1:
        return CheckResult("wrong", found, "set TMPDIR to a folder with more space")
    return CheckResult("ok", found)


def _home_folder() -> CheckResult:
    home = Path.home()
    if os.access(home, os.W_OK):
        return CheckResult("ok", str(home))
    remedy = "set METAGMVAE_CACHE to a writable folder, where copies of remote datasets are kept"
    return CheckResult("note", f"{home} is not writable", remedy)


def _mlflow() -> CheckResult:
    from metagmvae.configs.schema import TrackingSettings
    from metagmvae.infra.tracking.store import connect, paginate, store_uri
    from metagmvae.infra.tracking.tracking_errors import tracking_errors

    tracking = TrackingSettings()
    uri = redact(store_uri(tracking))
    try:
        store = connect(tracking, create=False)
        with tracking_errors(store.uri):
            count = sum(1 for _ in paginate(store.client.search_registered_models))
    except MissingMlflowError as error:
        return CheckResult("note", str(error), "not needed with --set tracking.enabled=false")
    except DataError:
        return CheckResult("ok", f"none yet at {uri}; the first tracked run creates it")
    except TrackingError as error:
        remedy = (
            "start the server, or unset MLFLOW_TRACKING_URI; training works without the server, and `metagmvae track` "
            "uploads the runs later"
        )
        return CheckResult("wrong", str(error), remedy)
    return CheckResult("ok", f"{uri}, {count} registered models")


def _ray() -> CheckResult:
    from metagmvae.configs.load import SettingsError

    try:
        with optional_package("ray", "run.engine = ray"):
            from metagmvae.infra.cluster.connect import cluster
    except MissingPackageError as error:
        return CheckResult("note", str(error), "not needed with --set run.engine=local and without --workers")
    try:
        with cluster("", 1):
            import ray

            resources = ray.cluster_resources()
            nodes = len(ray.nodes())
            version = ray.get(ray.remote(num_cpus=1)(platform.python_version).remote(), timeout=60)
    except SettingsError as error:
        return CheckResult("wrong", str(error), "start the cluster, or unset RAY_ADDRESS")
    where = os.environ.get("RAY_ADDRESS") or "started on this machine and stopped"
    found = f"{nodes} nodes, {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs ({where})"
    if version != platform.python_version():
        return CheckResult("wrong", f"{found}; workers run Python {version}", "use the same Python on all nodes")
    return CheckResult("ok", found)


CHECKS: dict[str, Callable[[], CheckResult]] = {
    "python": _python,
    "packages": _packages,
    "device": _device,
    "faiss": _faiss,
    "memory": _memory,
    "disk": _disk,
    "temporary folder": _temporary_folder,
    "home folder": _home_folder,
    "mlflow store": _mlflow,
    "ray": _ray,
}
