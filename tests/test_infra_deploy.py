"""The deployment files agree with the package, its dependencies and its settings; no cluster is started."""

import os
import re
import shlex
import subprocess
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


def test_docker_image_names_no_package_index():
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    assert "://" not in "\n".join(lines)
    assert {"ARG PIP_INDEX_URL", "ARG TORCH_INDEX_URL"} <= set(lines)  # without a default value


def test_ci_workflow_runs_the_ci_script_on_the_required_python():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={python}"
    (run,) = [step for step in job["steps"] if "run" in step]
    assert os.access(ROOT / run["run"], os.X_OK)
    assert all(name in (ROOT / run["run"]).read_text() for name in run["env"])


def test_pre_commit_hooks_need_no_network():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format", "mypy"]


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
    assert settings.run.cpus_per_worker == int(pods[1]["containers"][0]["resources"]["limits"]["cpu"])
    image = (DEPLOY / "Dockerfile").read_text()
    (user,) = re.findall(r"useradd --uid (\d+)", image)
    for pod in pods:
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"runs": "/runs", "cache": re.search(r"METAGMVAE_CACHE=(\S+)", image)[1]}
        assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
        assert pod["securityContext"]["fsGroup"] == int(user)
    assert settings.run.out.startswith("/runs/")
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert cluster["rayVersion"] == pinned[1]


def test_slurm_job_runs_a_valid_command_on_all_nodes(tmp_path):
    """The script runs with an `srun` that writes down its words."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    (tmp_path / "srun").write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" > {tmp_path}/words\n")
    (tmp_path / "srun").chmod(0o755)
    text = (DEPLOY / "ray-job.sbatch").read_text().replace("/SHARED", str(tmp_path))
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    nodes, cpus = options["nodes"], options["cpus-per-task"]
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_CPUS_PER_TASK": cpus,
    }
    subprocess.run(["bash", "-c", text], env=environment, check=True)
    words = (tmp_path / "words").read_text().splitlines()
    start, request = words[: words.index("--")], words[words.index("--") + 1 :]
    assert start[:2] == ["ray", "symmetric-run"]
    assert re.fullmatch(r"--address=[0-9a-f.:]+:6379", start[2])
    assert start[3:] == [f"--min-nodes={nodes}", f"--num-cpus={cpus}"]
    assert options["ntasks-per-node"] == "1"
    arguments = build_parser().parse_args(request[1:])
    settings = load_settings(arguments.config, arguments.overrides)
    assert arguments.resume
    assert (settings.run.workers, settings.run.cpus_per_worker) == (int(nodes), int(cpus))
    assert (settings.run.engine, settings.run.address) == ("ray", "auto")
