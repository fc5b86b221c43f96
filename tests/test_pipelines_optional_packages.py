"""Every command works with what pip installs for it, and names the extra that is missing in one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from installed_packages import PROJECT, installed_with, requirements, run_with
from packaging.requirements import Requirement
from PIL import Image

from metagmvae.pipelines.optional_packages import EXTRA_OF_PACKAGE, MissingPackageError, optional_package
from metagmvae.pipelines.shards.dataset import Dataset

ROOT = Path(__file__).parents[1]
SHORT = ["glyphs-demo", "--set", "pretrain.steps=2", "--set", "train.steps=2", "--set", "validation.every=0"]
LOCAL, UNTRACKED = ["--set", "run.engine=local"], ["--set", "tracking.enabled=false"]
RAY, MLFLOW, TUNE = (f"pip install 'metagmvae[{extra}]'" for extra in ("ray", "mlflow", "tune"))


def test_extras_are_complete() -> None:
    extras = PROJECT["optional-dependencies"]
    names = {extra: {Requirement(line).name for line in requirements([extra])} for extra in extras}
    core = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert not core & {"ray", "mlflow", "optuna", "timm", "faiss-cpu"}
    assert names["all"] == names["ray"] | names["mlflow"] | names["tune"] | names["timm"] | names["faiss"]
    assert names["gpu"] - {"faiss-gpu"} == names["all"] - {"faiss-cpu"}
    assert set(EXTRA_OF_PACKAGE.values()) <= set(extras)
    assert {"pandas", "tensorboardx"} & installed_with(["tune"])


def test_pinned_are_all_packages_that_the_extras_install() -> None:
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    from importlib import metadata

    installed = {d.metadata["Name"].lower().replace("_", "-").replace(".", "-") for d in metadata.distributions()}
    needed = {name for name in installed_with(["all", "dev"]) & installed if not re.match("nvidia-|cuda-|triton", name)}
    assert needed - pinned <= {"pip", "setuptools", "wheel", "metagmvae"}


def test_missing_package_is_one_line_and_other_errors_pass() -> None:
    with (
        pytest.raises(MissingPackageError, match=r"^the job needs .*timm.*'metagmvae\[timm\]', or wait$"),
        optional_package("timm", "the job", "wait"),
    ):
        raise ModuleNotFoundError("No module named 'huggingface_hub'", name="huggingface_hub")
    with pytest.raises(ModuleNotFoundError, match="no_such"), optional_package("timm", "the job"):
        import metagmvae.no_such  # noqa: F401


def _image_folders(data: Path, folder: Path) -> list[str]:
    """Write labelled images and a query; return both folders, with the option between."""
    dataset = Dataset.open(data)
    images, labels = dataset.images("test"), dataset.labels("test")
    for class_id in range(3):
        (folder / "labelled" / str(class_id)).mkdir(parents=True)
        row = np.flatnonzero(labels == np.unique(labels)[class_id])[0]
        Image.fromarray(images[row][0]).save(folder / "labelled" / str(class_id) / "0.png")
    (folder / "queries").mkdir()
    Image.fromarray(images[0][0]).save(folder / "queries" / "0.png")
    return [str(folder / "labelled"), "--query", str(folder / "queries")]


@pytest.mark.slow
def test_basic_installation(data: Path, tmp_path: Path) -> None:
    """All that a user who classifies needs; then each command that needs more."""
    run = str(tmp_path / "run")
    train = ["train", *SHORT, "--set", f"data.uri={data}", "--set"]
    works = [
        ["prepare", "glyphs", "--out", str(tmp_path / "glyphs"), "--json"],
        [*train, f"run.out={run}", *LOCAL, *UNTRACKED, "--json"],
        ["evaluate", run, "--data", str(data), "--episodes", "5", "--json"],
        ["figure", run, "--data", str(data), "--split", "test", "--out", str(tmp_path / "figures"), "--json"],
        ["compare", run, "paper:omniglot", "--html", str(tmp_path / "page.html"), "--json"],
        ["features", run, "--data", str(data), "--out", str(tmp_path / "features"), "--json"],
        ["verify", str(data), "--json"],
        ["classify", run, "--support", *_image_folders(data, tmp_path), "--json"],
    ]
    other = str(tmp_path / "other")
    tune = ["tune", *SHORT, "--space", "core", "--set", f"data.uri={data}", "--out", other]
    fails = [
        ([*train, f"run.out={other}", *UNTRACKED], RAY, "--set run.engine=local"),
        ([*train, f"run.out={other}", *LOCAL], MLFLOW, "--set tracking.enabled=false"),
        (["pretrain", *train[1:], f"run.out={other}", *LOCAL], MLFLOW, "--set tracking.enabled=false"),
        ([*train, f"run.out={other}", *LOCAL, "--dry-run"], MLFLOW, "--set tracking.enabled=false"),
        (["prepare", "glyphs", "--out", other, "--workers", "1"], RAY, "--workers 0"),
        (["features", run, "--data", str(data), "--out", other, "--workers", "1"], RAY, "--workers 0"),
        (tune, TUNE, ""),
        (["demo", "--out", other], RAY, ""),
        (["bench", "tune"], TUNE, ""),
        (["models"], MLFLOW, ""),
        (["promote", run, "--name", "x", "--data", str(data)], MLFLOW, ""),
        (["promote", "models:/x/1", "--data", str(data)], MLFLOW, ""),
        (["track", run], MLFLOW, ""),
        (["serve", run, "--port", "0"], MLFLOW, ""),
        (["compare", "models:/x", "paper:omniglot"], MLFLOW, ""),
        (["evaluate", "models:/x@champion", "--data", str(data)], MLFLOW, ""),
        (["evaluate", "runs:/123", "--data", str(data)], MLFLOW, ""),
        (["classify", "models:/x@champion", "--support", str(data), "--query", str(data)], MLFLOW, ""),
    ]
    answers = run_with([], [*works, *(words for words, _, _ in fails)], tmp_path)
    for words, answer in zip(works, answers, strict=False):
        assert answer["code"] == 0, (words, answer["err"])
    for (words, remedy, otherwise), answer in zip(fails, answers[len(works) :], strict=True):
        assert answer["code"] == 2, (words, answer)
        assert answer["out"] == ""
        (line,) = answer["err"].splitlines()
        assert remedy in line, (words, line)
        assert line.endswith(otherwise)
    assert not Path(other).exists(), "nothing is left behind"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extras", "words", "remedy"),
    [
        (["mlflow"], ["demo", "--out", "demo"], RAY),
        (["ray"], ["demo", "--out", "demo"], MLFLOW),
        (["ray", "mlflow"], ["tune", "glyphs-demo", "--space", "core", "--out", "demo"], TUNE),
    ],
)
def test_one_of_two_extras(extras: list[str], words: list[str], remedy: str, tmp_path: Path) -> None:
    (answer,) = run_with(extras, [words], tmp_path)
    assert answer["code"] == 2
    (line,) = answer["err"].splitlines()
    assert remedy in line
    assert list(tmp_path.iterdir()) == []
