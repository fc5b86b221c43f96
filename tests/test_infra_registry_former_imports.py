"""A model that was registered before the packages moved into `metagmvae` loads, answers and is evaluated as then.

`fixtures/registered_before_move/model` was logged by the code at commit 77a17f9; `expected.json` is what that code
answered: an evaluation by `metagmvae evaluate`, and probabilities by MLflow's loader.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metagmvae.infra.cli import main
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

FIXTURE = Path(__file__).parent / "fixtures" / "registered_before_move"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
ANSWER = """
import sys, numpy as np, mlflow
mlflow.set_tracking_uri("file:///nowhere")
request = dict(np.load(sys.argv[2]))
np.save(sys.argv[3], mlflow.pyfunc.load_model(sys.argv[1]).predict(request))
assert "metagmvae.infra.registry.pyfunc_model" in sys.modules
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("former") / "data"
    made = EXPECTED["data"]
    write_dataset(open_source(made["source"], classes=made["classes"], drawings=made["drawings"]), folder)
    assert Dataset.open(folder).fingerprint == made["fingerprint"]
    return folder


def request_of(data: Path) -> dict[str, np.ndarray]:
    rows = EXPECTED["request"]["rows"]
    images = Dataset.open(data).rows("test", "memory")
    return {"images": np.stack([images[[row]][0] for row in rows]), "label": np.array(EXPECTED["request"]["label"])}


@pytest.mark.mlflow
@pytest.mark.parametrize("own_infra", [False, True], ids=["no package infra", "a user's package infra"])
def test_mlflow_loads_it_and_answers_the_same(data, tmp_path, own_infra):
    """From a folder where the user has a package of the former name, too."""
    if own_infra:
        (tmp_path / "infra").mkdir()
        (tmp_path / "infra" / "__init__.py").write_text("")
    np.savez(tmp_path / "request.npz", **request_of(data))
    command = [sys.executable, "-c", ANSWER, str(FIXTURE / "model"), "request.npz", "answer.npy"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), EXPECTED["probabilities"], atol=1e-6)


def test_its_package_is_evaluated_with_the_identical_accuracy(data, capsys):
    package = FIXTURE / "model" / "artifacts" / "package"
    wanted = EXPECTED["evaluate"]
    task = ["--way", wanted["way"], "--shot", wanted["shot"], "--episodes", wanted["episodes"]]
    assert main(["evaluate", str(package), "--data", str(data), *map(str, task), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {key: answer[key] for key in wanted} == wanted
