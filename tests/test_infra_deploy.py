"""The deployment files agree with the package, its dependencies and its settings; no cluster is started."""

import re
import shlex
import tomllib
from pathlib import Path

import yaml

from metagmvae.configs.load import load_settings
from metagmvae.infra.cli import build_parser

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "infra" / "deploy"


def test_docker_image_has_all_packages_and_files_of_the_build():
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[1] for name in project["tool"]["setuptools"]["packages"] if "." in name}
    needed = {
        *packages,
        "__init__.py",
        "__main__.py",
        "py.typed",
        *project["project"]["license-files"],
        "pyproject.toml",
    }
    assert needed | {project["project"]["readme"], "constraints.txt"} == copied


def test_ray_job_runs_a_valid_command():
    job = yaml.safe_load((DEPLOY / "ray-job.yaml").read_text())
    program, *request = shlex.split(job["spec"]["entrypoint"])
    assert program == "metagmvae"
    arguments = build_parser().parse_args(request)
    settings = load_settings(arguments.config, arguments.overrides)
    assert arguments.resume
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert settings.run.workers == workers["replicas"]
    assert settings.run.engine == "ray"
    pods = [cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    mounts = {mount["mountPath"] for pod in pods for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/runs"}
    assert settings.run.out.startswith("/runs/")
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert cluster["rayVersion"] == pinned[1]
