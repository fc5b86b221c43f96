"""The files for a cluster ask for what is there: no cluster is started, but nothing in them can have drifted."""

import re
import shlex
import tomllib
from pathlib import Path

import yaml

from metagmvae.configs.load import load_settings
from metagmvae.infra.cli import build_parser

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "infra" / "deploy"


def test_the_image_holds_every_package_and_file_that_the_build_needs():
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


def test_the_job_is_a_request_that_the_command_line_understands():
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
