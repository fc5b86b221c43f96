"""The public Python API: names, the examples of the docstrings, and models from the registry."""

from __future__ import annotations

import doctest
import re
from importlib import metadata
from pathlib import Path

import mlflow_template
import numpy as np
import pytest

import metagmvae

FUNCTIONS_AND_CLASSES = [name for name in metagmvae.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples read: a data set in `data/glyphs` and an untrained run in `runs/glyphs`."""
    from metagmvae.pipelines.shards.writer import write_dataset
    from metagmvae.pipelines.sources.source import open_source

    folder = tmp_path_factory.mktemp("workspace")
    write_dataset(open_source("glyphs", classes=(12, 6, 6), drawings=20), folder / "data" / "glyphs")
    mlflow_template.new_run(folder / "runs" / "glyphs")
    return folder


@pytest.mark.parametrize("name", FUNCTIONS_AND_CLASSES)
def test_example_in_the_docstring(name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(metagmvae, name), name, globs={})
    assert example.examples
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example, out=report.append).failed == 0, "".join(report)


def test_names_are_complete_and_loaded_on_first_use() -> None:
    assert set(metagmvae.__all__) <= set(dir(metagmvae))
    assert metagmvae.__version__ == metadata.version("metagmvae")
    assert metagmvae.FewShotClassifier is metagmvae.FewShotClassifier
    with pytest.raises(AttributeError, match="no attribute 'estimator'"):
        metagmvae.estimator  # noqa: B018


@pytest.mark.mlflow
def test_classifier_of_a_registered_model(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metagmvae.infra.registry.register import register
    from metagmvae.infra.tracking.store import connect

    store = mlflow_template.new_store(tmp_path / "store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", connect(store).uri)
    run = mlflow_template.new_run(tmp_path / "run")
    register(run, store, "few-shot", "champion")
    images = np.random.default_rng(0).integers(0, 256, (6, 28 * 28)).astype(np.uint8)
    by_path, by_reference = (
        metagmvae.FewShotClassifier(model).fit(images[:4], [0, 1, 1, 0]).predict_proba(images[4:])
        for model in (run, "models:/few-shot@champion")
    )
    np.testing.assert_array_equal(by_path, by_reference)
    assert metagmvae.load_model("models:/few-shot@champion").image_shape == (1, 28, 28)


def test_baseline_of_the_evaluation_guide(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from metagmvae.evaluation.fewshot import baselines

    monkeypatch.chdir(workspace)
    guide = (Path(metagmvae.__file__).parent / "evaluation" / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    monkeypatch.setitem(baselines.BASELINES, "nearest neighbour", None)  # its entry is removed after the test
    exec(program, {})
    assert re.search(r"nearest neighbour \(inductive\): [\d.]+ ± [\d.]+ %", capsys.readouterr().out)
