"""The public Python API: names, the examples of the docstrings, and models from the registry."""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import mlflow_template
import numpy as np
import pytest
from glyphs_dataset import new_dataset
from PIL import Image

import metagmvae
from metagmvae.infra.api import functions, sweeps
from metagmvae.infra.api.results import PreparedData, TrainedRun

FUNCTIONS_AND_CLASSES = [name for name in metagmvae.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples read: a data set in `data/glyphs` and an untrained run in `runs/glyphs`."""

    folder = tmp_path_factory.mktemp("workspace")
    new_dataset(folder / "data" / "glyphs", (12, 6, 6))
    mlflow_template.new_run(folder / "runs" / "glyphs")
    return folder


@pytest.mark.parametrize("name", FUNCTIONS_AND_CLASSES)
def test_example_in_the_docstring(name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(metagmvae, name), name, globs={})
    assert example.examples, "the docstring shows how to use it"
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example, out=report.append).failed == 0, "".join(report)


def test_names_are_complete_and_loaded_on_first_use() -> None:
    assert set(metagmvae.__all__) <= set(dir(metagmvae))
    assert not {"annotations", "import_module", "metadata", "TYPE_CHECKING"} & set(dir(metagmvae))
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


def test_each_result_stands_for_its_path_and_shows_itself(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One result after the other, as in a notebook; class names come from data, so they are escaped."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label in ("<b>one</b>", "two", "three", "four"):
        folder = tmp_path / "images" / label.replace("/", "")
        folder.mkdir(parents=True)
        for number in range(20):
            Image.fromarray(rng.integers(0, 256, (28, 28)).astype(np.uint8)).save(folder / f"{number}.png")
    source = tmp_path / "images"
    data = metagmvae.prepare("folder", source, out=tmp_path / "data", fractions=(0.5, 0.0, 0.5), size=28, channels=1)
    assert data.image_shape == (1, 28, 28)
    assert (data.samples["train"], data.samples["test"]) == (40, 40)
    assert len(data.open().labels("test")) == 40
    assert dataclasses.is_dataclass(data)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.uri = "other"  # type: ignore[misc]
    run = workspace / "runs" / "glyphs"
    task = {"way": 2, "shot": 1, "episodes": 20, "query": 5}
    result = metagmvae.evaluate(run, data, **task, baselines=True)
    (same,) = metagmvae.evaluate_tasks(metagmvae.load_model(run), data.open(), [task])
    assert result.accuracy == same.mean
    assert result.ci95 == same.ci95
    assert result.ece == result.answer["ece"]
    assert {row["baseline"] for row in result.baselines} >= {"nearest class mean"}
    assert len(result.paired) == len(result.baselines)
    assert f"{100 * result.accuracy:.2f} ± {100 * result.ci95:.2f} %" in result._repr_html_()
    assert "nearest class mean" in result._repr_html_()
    comparison = metagmvae.compare([run, "paper:omniglot/umtra"], data.open(), way=[2], episodes=20, query=5)
    assert comparison.rows[0]["results"][0]["accuracy"] == result.accuracy
    html = comparison._repr_html_()
    assert f"{100 * result.accuracy:.2f} ± {100 * result.ci95:.2f}" in html
    assert "<th>(2,1)</th>" in html
    assert "answer" not in repr(result)
    for shown in (data, result, comparison):
        assert ElementTree.fromstring(f"<div>{shown._repr_html_()}</div>").findall("table")


def test_several_tasks_of_evaluate_are_rows(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `evaluate --ways 2 3 --shot 1 2`; each row is what the task alone gives."""
    monkeypatch.chdir(workspace)
    task = {"episodes": 5, "query": 3}
    table = metagmvae.evaluate("runs/glyphs", "data/glyphs", way=(2, 3), shot=np.array([1, 2]), baselines=True, **task)
    assert [(row["way"], row["shot"]) for row in table.rows] == [(2, 1), (2, 2), (3, 1), (3, 2)]
    alone = metagmvae.evaluate("runs/glyphs", "data/glyphs", way=3, shot=2, **task)
    assert table.rows[3]["accuracy"] == alone.accuracy
    assert table.rows[3]["ci95"] == alone.ci95
    assert {(row["way"], row["shot"]) for row in table.baselines} == {(2, 1), (2, 2), (3, 1), (3, 2)}
    assert f"{100 * alone.accuracy:.2f} ± {100 * alone.ci95:.2f} %" in table._repr_html_()
    (row,) = metagmvae.evaluate("runs/glyphs", "data/glyphs", way=3, shot=[2], **task).rows  # a list of one number
    assert (row["way"], row["shot"], row["accuracy"]) == (3, 2, alone.accuracy)


def test_texts_of_models_and_runs_are_one_line(workspace: Path) -> None:
    loaded = metagmvae.load_model(workspace / "runs" / "glyphs")
    assert re.fullmatch(r"<LoadedModel [\w-]+: MetaGMVAE of images \(1, 28, 28\)>", repr(loaded))
    run = TrainedRun(answer={}, path=Path("runs/a"), last={"step": 5, "steps": 9}, registered="models:/a/1")
    assert repr(run) == "<TrainedRun runs/a: step 5 of 9, models:/a/1>"


def test_values_in_the_html_are_escaped() -> None:
    data = PreparedData(
        answer={}, uri="<i>&", name="x", image_shape=(1, 2, 3), samples={"<b>": 1}, classes={}, skipped=({"f": "<a>"},)
    )
    html = data._repr_html_()
    assert not re.search("<[iab]>", html)
    assert "&lt;i&gt;&amp;" in html


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: metagmvae.prepare("glyphs", out="x", siez=3), "unrecognized arguments: --siez=3"),
        (lambda: metagmvae.prepare("glifs", out="x"), "glifs"),
        (lambda: metagmvae.prepare("folder", "nowhere", out="x"), "nowhere"),
        (lambda: metagmvae.prepare("folder", object(), out="x"), "object is no name"),  # type: ignore[arg-type]
        (lambda: metagmvae.train("glyphs-demo", {"train.stepz": 3}), "train.stepz"),
        (lambda: metagmvae.train("glyphs-demo", kind="decoder"), "'decoder' is no command"),
        (lambda: metagmvae.train("glyphs-demo", {"run.out": None}), "run.out is None; leave the key out"),
        (lambda: metagmvae.train("glyphs-demo", {"data": {"uri": "x"}}), "data is a dict; give each of its keys"),
        (lambda: metagmvae.train("glyphs-demo", {"model.encoder": object()}), "model.encoder: object is no name"),
        (lambda: metagmvae.evaluate("runs/none", "data/glyphs"), "runs/none: no such model"),
        (lambda: metagmvae.evaluate("runs/glyphs", "data/glyphs", mode="both"), "invalid choice: 'both'"),
        (lambda: metagmvae.evaluate("runs/glyphs", "data/glyphs", way=2.5), "invalid int value: '2.5'"),  # type: ignore[arg-type]
        (lambda: metagmvae.compare([]), "required: WHAT"),
        (lambda: metagmvae.compare(["runs/none"]), "runs/none"),
        (lambda: metagmvae.compare("runs/none"), "runs/none: not found"),
        (lambda: metagmvae.prepare_images([[1, 2]], out="x"), "image 0 is int64"),
        # Numbers of NumPy are numbers.
        (lambda: metagmvae.evaluate("runs/glyphs", "data/glyphs", way=np.int64(99)), "way 99 exceeds"),
        (lambda: metagmvae.train("glyphs-demo", {"train.steps": np.int64(-7)}), "train.steps = -7"),
        (lambda: metagmvae.train("glyphs-demo", {"train.learning_rate": np.float32(-0.5)}), "rate = -0.5"),
        (lambda: metagmvae.fit("nowhere", out="x"), "nowhere"),
        (lambda: metagmvae.tune("glyphs-demo", space="none", out="x"), "none"),
        (lambda: metagmvae.tune("glyphs-demo", space="core", out="x", trails=3), "unrecognized arguments: --trails=3"),
    ],
)
def test_wrong_arguments_are_one_line(
    call: Callable[[], object],
    reason: str,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workspace)
    with pytest.raises(ValueError, match=reason) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    assert capsys.readouterr() == ("", "")
    assert not (workspace / "x").exists()


def test_a_dataset_shows_what_it_holds(workspace: Path) -> None:
    uri = workspace / "data" / "glyphs"
    splits = metagmvae.Dataset.open(uri).manifest["splits"]
    counts = ", ".join(f"{split} {splits[split]['samples']:,}" for split in ("train", "validation", "test"))
    assert repr(metagmvae.Dataset.open(uri)) == f"<Dataset {uri}: images 1 x 28 x 28; {counts}>"


def test_result_of_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are those of the command line, and the result stands for the folder."""
    best = {"number": 3, "accuracy": 0.5, "ci95": 0.25, "task": "5w1s"}
    answers = [
        {"sweep": "runs/s", "name": "s", "trials": {"done": 8}, "best": best, "settings": {"train.steps": 9}}
        | {"report": "runs/s/report.md", "train": "metagmvae train runs/s/best.toml"},
        {"sweep": "runs/s", "name": "s", "trials": {"failed": 8}, "best": None, "why": "no steps"},
        {"dry run": "all checks passed, nothing was written", "sweep": "runs/s", "trials": 8},
    ]
    called: list[Sequence[object]] = []

    def answer(name: str, *values: object, **options: object) -> dict[str, object]:
        called.append([name, *values, options])
        return answers[len(called) - 1]

    monkeypatch.setattr(sweeps, "call_command", answer)
    result = metagmvae.tune("glyphs-demo", {"train.batch": np.int64(4)}, space="core", trials=8)
    options = {"space": "core", "out": None, "set": {"train.batch": "4"}, "resume": False, "trials": 8}
    assert called == [["tune", "glyphs-demo", options]]
    assert (Path(result), result.best_settings) == (Path("runs/s"), Path("runs/s/best.toml"))
    assert (result.best, result.settings, result.report) == (best, {"train.steps": 9}, Path("runs/s/report.md"))
    ElementTree.fromstring(result._repr_html_())
    assert metagmvae.tune("glyphs-demo", space="core").best is None
    assert metagmvae.tune("glyphs-demo", space="core", dry_run=True).trials == 8


def test_result_of_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded answer of a real fit, which takes minutes; the words are those of the command line."""
    recorded = json.loads(
        (Path(metagmvae.__file__).parent / "evaluation" / "results" / "fit-omniglot.json").read_text()
    )
    called: list[Sequence[object]] = []

    def answer(name: str, *values: object, **options: object) -> dict[str, object]:
        called.append([name, *values, options])
        return recorded

    monkeypatch.setattr(functions, "call_command", answer)
    result = metagmvae.fit("pictures", out="models/birds", budget="30m", labelled="some")
    assert called == [["fit", "pictures", {"out": "models/birds", "budget": "30m", "labelled": "some"}]]
    assert Path(result) == result.model == Path(recorded["model"])
    assert result.report == Path(recorded["report"])
    assert list(result.accuracy) == recorded["accuracy"]
    html = ElementTree.fromstring(f"<div>{result._repr_html_()}</div>")
    cells = ["".join(cell.itertext()) for cell in html.iter("td")]
    first = recorded["accuracy"][0]
    assert f"{100 * first['accuracy']:.2f} ± {100 * first['ci95']:.2f} %" in cells
    assert recorded["baselines"][0]["baseline"] in cells
