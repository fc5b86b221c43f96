"""MLflow knows the data set of a run and ranks the models on it; the wheel travels with each registered model."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import mlflow_template
import pytest
from called_commands import answer_of

from metagmvae.infra.registry.own_wheel import write_wheel
from metagmvae.infra.registry.register import register
from metagmvae.infra.runs.run_folder import METRICS, RECORD
from metagmvae.infra.tracking.dataset_input import logged_model_id
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.tracking.store import Store, connect
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.package import load_model

pytestmark = pytest.mark.mlflow

DATA = {"data": "/data/birds", "data_fingerprint": "d" * 64, "dataset": {"name": "birds"}}


def new_run(folder: Path, accuracy: float, seed: int, record: dict[str, Any]) -> Path:
    """A run whose model has a validation accuracy; an earlier step was better."""
    run = mlflow_template.new_run(folder, seed=seed)
    info = load_model(run).info
    common = {"stage": info["stage"], "loss": 1.0, "elapsed_s": 1.5}
    last, earlier = info["step"], info["step"] - 1
    lines = [
        common | {"step": step, "global_step": step, "validation/5w1s": value}
        for step, value in ((earlier, 0.99), (last, accuracy))
    ]
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / RECORD).write_text(json.dumps(record))
    return run


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    settings = mlflow_template.new_store(tmp_path / "store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", connect(settings).uri)
    return settings


def ranked(opened: Store, run_id: str, metric: str, name: str, digest: str) -> list[str]:
    """Names of the logged models with a metric on a data set, the best first."""
    experiment = opened.client.get_run(run_id).info.experiment_id
    data = {"dataset_name": name, "dataset_digest": digest}
    found = opened.client.search_logged_models(
        [experiment],
        filter_string=f"metrics.`{metric}` > 0",
        datasets=[data],
        order_by=[{"field_name": f"metrics.{metric}", "ascending": False, **data}],
    )
    return [model.name for model in found]


def test_models_are_ranked_by_accuracy_on_one_data_set(tmp_path: Path, store: Any) -> None:
    runs = {
        "middle": (0.6, DATA),
        "best": (0.8, DATA),
        "worst": (0.4, DATA),
        "elsewhere": (0.9, {**DATA, "data_fingerprint": "e" * 64}),
    }
    for seed, (name, (accuracy, record)) in enumerate(runs.items()):
        register(new_run(tmp_path / name, accuracy, seed, record), store, name)
    opened = connect(store)
    version = opened.client.get_model_version("best", "1")
    assert ranked(opened, version.run_id, "validation/5w1s", "birds", "d" * 36) == ["best", "middle", "worst"]
    assert ranked(opened, version.run_id, "validation/5w1s", "birds", "e" * 36) == ["elsewhere"]
    assert ranked(opened, version.run_id, "validation/5w1s", "cats", "d" * 36) == []
    model = opened.client.get_logged_model(logged_model_id(version))
    assert model.source_run_id == version.run_id
    # The run has each point once.
    history = opened.client.get_metric_history(version.run_id, "validation/5w1s")
    assert sorted(point.value for point in history) == [0.8, 0.99]


def test_run_has_its_data_set_as_input(tmp_path: Path, store: Any) -> None:
    run = new_run(tmp_path / "run", 0.5, 0, DATA)
    opened = connect(store)
    for _ in range(2):  # the second upload sends nothing again
        version = register(run, store, "x")
    run_id = opened.client.get_model_version("x", version.version).run_id
    (found,) = opened.client.get_run(run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("birds", "d" * 36)
    assert json.loads(found.dataset.profile) == {"fingerprint": "d" * 64}
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]
    assert import_mlflow().data.get_source(found.dataset).to_dict() == {"uri": "/data/birds"}


def test_evaluation_of_a_version_is_a_metric_of_its_model_on_that_data_set(
    tmp_path: Path, store: Any, data: Path
) -> None:
    register(new_run(tmp_path / "run", 0.5, 0, DATA), store, "x")
    accuracy = answer_of("evaluate", "models:/x/1", "--data", data, "--episodes", "4")["accuracy"]
    opened = connect(store)
    version = opened.client.get_model_version("x", "1")
    metrics = opened.client.get_logged_model(logged_model_id(version)).metrics
    (found,) = [metric for metric in metrics if metric.key == "test/5w1s/transductive"]
    assert found.value == accuracy
    dataset = Dataset.open(data)
    assert (found.dataset_name, found.dataset_digest) == ("glyphs", dataset.fingerprint[:36])


SERVE = """
import json, sys
sys.path.insert(0, "installed")
import metagmvae, mlflow, numpy as np
assert metagmvae.__file__.startswith(sys.argv[1]), metagmvae.__file__
model = mlflow.pyfunc.load_model(sys.argv[2])
images = np.random.default_rng(0).integers(0, 256, (4, 1, 28, 28), dtype=np.uint8)
answer = model.predict({"images": images, "label": np.array([0, 1, -1, -1])})
print(json.dumps(np.asarray(answer).sum(axis=1).round(6).tolist()))
"""


@pytest.mark.slow
def test_requirements_can_be_installed_where_the_model_is_served(tmp_path: Path, store: Any) -> None:
    """In the folder of the model, as MLflow installs them; the requirements of the package are installed already."""
    register(new_run(tmp_path / "run", 0.5, 0, DATA), store, "x")
    opened = connect(store)
    source = opened.client.get_model_version("x", "1").source
    model = Path(import_mlflow().artifacts.download_artifacts(artifact_uri=source, dst_path=str(tmp_path / "model")))
    first, *others = (model / "requirements.txt").read_text().splitlines()
    assert first.startswith("code/metagmvae-")
    assert {line.split("==")[0] for line in others} == {"torch", "torchvision", "safetensors", "numpy", "mlflow"}
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), first]
    subprocess.run(install, cwd=model, check=True, capture_output=True, timeout=200)
    command = [sys.executable, "-c", SERVE, str(target), str(model)]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout.splitlines()[-1]) == [1.0, 1.0]


def test_wheel_has_its_metadata_beside_a_build_in_the_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    egg_info = tmp_path / "metagmvae.egg-info"
    egg_info.mkdir()
    text = "Metadata-Version: 2.4\nName: metagmvae\nVersion: 7.1\n"
    (egg_info / "PKG-INFO").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    wheel = write_wheel(tmp_path)
    assert wheel is not None
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("metagmvae-7.1.dist-info/METADATA").decode() == text


def test_wheels_of_equal_files_are_equal(tmp_path: Path) -> None:
    wheels = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        wheels.append(write_wheel(tmp_path / name))
    first, second = wheels
    assert first is not None
    assert second is not None
    assert first.read_bytes() == second.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    assert {"metagmvae/__init__.py", "metagmvae/infra/registry/pyfunc_model.py", "metagmvae/py.typed"} <= set(names)
    assert any(name.endswith("glyphs-demo.toml") for name in names)
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyc", ".json", ".png"))]
