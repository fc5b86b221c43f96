"""A model that was registered before the packages moved into `metagmvae` gives the same results as then.

`fixtures/registered_before_move/model` was logged by the code at commit 77a17f9. `expected.json` holds the results of
that code: an evaluation by `metagmvae evaluate`, and probabilities by MLflow's loader.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow_template
import numpy as np
import pytest

from metagmvae.infra.cli import main
from metagmvae.infra.tracking.store import connect, experiment_id
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
    source = EXPECTED["data"]
    write_dataset(open_source(source["source"], classes=source["classes"], drawings=source["drawings"]), folder)
    assert Dataset.open(folder).fingerprint == source["fingerprint"]
    return folder


def request_of(data: Path) -> dict[str, np.ndarray]:
    rows = EXPECTED["request"]["rows"]
    images = Dataset.open(data).rows("test", "memory")
    return {"images": np.stack([images[[row]][0] for row in rows]), "label": np.array(EXPECTED["request"]["label"])}


@pytest.mark.mlflow
@pytest.mark.parametrize("own_infra", [False, True], ids=["no package infra", "a user's package infra"])
def test_mlflow_loads_it_and_gives_the_same_probabilities(data, tmp_path, own_infra):
    """This also works in a folder that holds a package of the former name."""
    if own_infra:
        (tmp_path / "infra").mkdir()
        (tmp_path / "infra" / "__init__.py").write_text("")
    np.savez(tmp_path / "request.npz", **request_of(data))
    command = [sys.executable, "-c", ANSWER, str(FIXTURE / "model"), "request.npz", "answer.npy"]
    process = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    # Not exactly equal: the noise of a support image does not depend on the order of the support any more.
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), EXPECTED["probabilities"], atol=1e-5)


def evaluate(model: str, data: Path, capsys) -> dict:
    task = {key: str(EXPECTED["evaluate"][key]) for key in ("way", "shot", "episodes")}
    options = [word for key, value in task.items() for word in (f"--{key}", value)]
    assert main(["evaluate", model, "--data", str(data), *options, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {key: answer[key] for key in EXPECTED["evaluate"]} == EXPECTED["evaluate"]
    return answer


def test_package_has_the_recorded_accuracy(data, capsys):
    evaluate(str(FIXTURE / "model" / "artifacts" / "package"), data, capsys)


@pytest.mark.mlflow
def test_registered_version_has_the_recorded_accuracy(data, tmp_path, capsys, monkeypatch):
    store = connect(mlflow_template.new_store(tmp_path / "mlflow"))
    run = store.client.create_run(experiment_id(store, "metagmvae"))
    store.client.create_registered_model("former")
    store.client.create_model_version("former", str(FIXTURE / "model"), run.info.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert evaluate("models:/former/1", data, capsys)["kept"] == "models:/former/1"
