"""The programs of the guide infra/api/README.md run, and its package adds a source and an encoder to the commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import metagmvae
from metagmvae.configs.method_settings import MethodSettings
from metagmvae.infra.cli import main
from metagmvae.pipelines.shards.dataset import Dataset

GUIDE = (Path(metagmvae.__file__).parent / "infra" / "api" / "README.md").read_text()


def block(language: str, holding: str) -> str:
    """The program of the guide that holds a text."""
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL) if holding in b]
    return found


def install(folder: Path, name: str, modules: dict[str, str], entry_points: dict[str, dict[str, str]]) -> None:
    """Write modules and the metadata of a package, as pip does."""
    folder.mkdir(exist_ok=True)
    for module, text in modules.items():
        (folder / module).write_text(text)
    metadata = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = (
        line for group, points in entry_points.items() for line in (f"[{group}]", *map(" = ".join, points.items()))
    )
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the package of the guide, from which packages are imported."""
    project = tomllib.loads(block("toml", "entry-points"))["project"]
    modules = {
        "metagmvae_spirals.py": block("python", "def open_spirals"),
        "metagmvae_cosine.py": block("python", "class CosineNets"),
        "metagmvae_student.py": block("python", "class StudentMixture"),
        "metagmvae_rotations.py": block("python", "class Rotations"),
        "test_metagmvae_spirals.py": block("python", "import check_encoder"),
    }
    install(tmp_path / "site", project["name"], modules, project["entry-points"])
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "metagmvae_spirals", raising=False)
    for module in ("metagmvae_cosine", "metagmvae_student", "metagmvae_rotations"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path / "site"


def test_parts_of_the_package_are_short() -> None:
    assert len(block("python", "def open_spirals").splitlines()) < 40
    assert len(block("python", "class CosineNets").splitlines()) < 40
    assert len(block("toml", "entry-points").splitlines()) < 40


@pytest.mark.slow
def test_source_and_encoder_of_another_package(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the guide, with fewer steps; the model is used again from its folder."""
    prepare, train = (line.split()[1:] for line in block("sh", "prepare spirals").splitlines())
    assert main([*prepare, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == {"train": 240, "validation": 120, "test": 120}
    short = ["pretrain.steps=2", "train.steps=2", "validation.every=0", "run.engine=local", "tracking.enabled=false"]
    assert main([*train, *(word for setting in short for word in ("--set", setting)), "--json"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "runs/spirals", "--data", "data/spirals", "--episodes", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 5
    assert metagmvae.load_model("runs/spirals").model.encoder.feature_dim == 256
    # Without the package, what needs it says so in one line.
    monkeypatch.syspath_prepend("nothing")
    sys.path.remove(str(site))
    monkeypatch.delitem(sys.modules, "metagmvae_spirals")
    assert main([*prepare, "--out", "other"]) == 2
    assert "unknown source 'spirals'" in capsys.readouterr().err
    assert main(["evaluate", "runs/spirals", "--data", "data/spirals"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "patches" in line
    assert "no such encoder" in line


@pytest.mark.slow
def test_method_of_another_package(
    site: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the guide, with fewer steps; the model is used again from its folder, or refused in one line."""
    words = block("sh", "method.name=cosine").split()[1:]
    short = ["pretrain.steps=0", "train.steps=2", "validation.every=0", "run.engine=local", "tracking.enabled=false"]
    more = [word for setting in [*short, f"data.uri={data}"] for word in ("--set", setting)]
    assert main([*words, *more, "--json"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "runs/cosine", "--data", str(data), "--episodes", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 5
    monkeypatch.syspath_prepend("nothing")
    sys.path.remove(str(site))
    monkeypatch.delitem(sys.modules, "metagmvae_cosine")
    assert main(["evaluate", "runs/cosine", "--data", str(data)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "method.name (cosine): no such method" in line
    assert "protonets" in line


METHODS = {
    "def make(): return 3": "its package returns int instead of a Method",
    "def make(): raise KeyError('no weights')": "its package cannot build it (KeyError: 'no weights')",
    "raise ImportError('no such library')": "cannot be imported (no such library)",
}


@pytest.mark.parametrize("text", METHODS)
def test_a_broken_method_is_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metagmvae.pipelines.records import DataError
    from metagmvae.training.methods.methods_by_name import find_method

    install(tmp_path / "site", "other", {"other_way.py": text}, {"metagmvae.methods": {"other": "other_way:make"}})
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "other_way", raising=False)
    with pytest.raises(DataError, match=re.escape(METHODS[text])) as caught:
        find_method(MethodSettings(name="other"))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(DataError, match=r"no such method; did you mean 'protonets'\?"):
        find_method(MethodSettings(name="protonet"))
    with pytest.raises(DataError, match=r"no such method; known: meta-gmvae, .*, other"):
        find_method(MethodSettings(name="unheard-of"))


BROKEN_ANSWERS = {
    "log_posteriors returns torch.float32": "return super().log_posteriors(*a, **k).float()",
    "probabilities do not sum to 1": "return super().log_posteriors(*a, **k) - 1",
    "answers differ when repeated": "return super().log_posteriors(*a, **k) + self.switch()",
    "inductive: a query depends on the others": "return super().log_posteriors(*a, **k) if a[3].shape[1] == 4 else U",
}


@pytest.mark.parametrize("broken", BROKEN_ANSWERS)
def test_the_kit_names_the_rule_that_a_method_breaks(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"""
import torch
from metagmvae.training.methods.protonets import ProtoNets
from metagmvae.training.methods.task_method import TaskMethod
U = torch.full((1, 1, 3), 1 / 3, dtype=torch.float64).log()
class Wrong(ProtoNets):
    def switch(self):
        self.calls = getattr(self, "calls", 0) + 1
        return 0.0 if self.calls % 2 else 1e-12
    def log_posteriors(self, *a, **k):
        {BROKEN_ANSWERS[broken]}
def make():
    return TaskMethod(Wrong)
"""
    from metagmvae.infra.api.method_testing import check_method

    install(tmp_path / "site", "bad", {"bad_way.py": text}, {"metagmvae.methods": {"bad": "bad_way:make"}})
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "bad_way", raising=False)
    with pytest.raises(AssertionError, match=broken):
        check_method("bad", (1, 8, 8))


def test_tests_of_the_package(site: Path) -> None:
    names: dict = {}
    exec((site / "test_metagmvae_spirals.py").read_text(), names)
    names["test_source"]()
    names["test_encoder"]()
    names["test_methods"]()
    names["test_objective_and_baseline"]()


@pytest.mark.slow
def test_programs_of_the_guide(tmp_path: Path) -> None:
    """In one process each, as a user runs them."""
    (tmp_path / "1.py").write_text(block("python", "metagmvae.prepare("))
    (tmp_path / "2.py").write_text(block("python", "FewShotClassifier("))
    outputs = [
        subprocess.run([sys.executable, f"{n}.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280)
        for n in (1, 2)
    ]
    for output in outputs:
        assert output.returncode == 0, output.stderr
        assert "Warning" not in output.stderr
    assert re.search(r"^[\d.]+ ± [\d.]+ %, calibration error [\d.]+ %$", outputs[0].stdout, flags=re.MULTILINE)
    assert "nearest class mean: " in outputs[0].stdout
    assert "paper: UMTRA" in outputs[0].stdout
    assert "['glyph 0' 'glyph 1' 'glyph 2']" in outputs[1].stdout
    assert len(Dataset.open(tmp_path / "data" / "glyphs").labels("test")) == 2000


BROKEN = {
    "raise ImportError('no such library')": (["prepare", "broken", "--out", "x"], "no such library"),
    "def broken(source=None): return 3": (["prepare", "broken", "--out", "x"], "returns int, not an ImageSource"),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_package_is_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, reason = BROKEN[text]
    points = {"metagmvae.sources": {"broken": "broken_module:broken"}}
    install(tmp_path / "site", "broken-package", {"broken_module.py": text}, points)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_module", raising=False)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "x").exists()


ENCODERS = {
    "def build(shape): return 3": "returns int instead of a torch.nn.Module",
    "def build(shape): raise KeyError('no weights')": "cannot build it",
    "from torch import nn\ndef build(shape): return nn.Conv2d(1, 2, 3)": "one feature vector per image",
    "from torch import nn\ndef build(shape): return nn.Linear(5, 2)": "does not accept images of (1, 28, 28)",
}


@pytest.mark.parametrize("text", ENCODERS)
def test_a_broken_encoder_is_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metagmvae.training.models.encoders import EncoderError, build_encoder

    install(tmp_path / "site", "other", {"other_net.py": text}, {"metagmvae.encoders": {"other": "other_net:build"}})
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "other_net", raising=False)
    with pytest.raises(EncoderError, match=re.escape(ENCODERS[text])) as caught:
        build_encoder("other", (1, 28, 28), 64)
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_of_two_packages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        points = {"metagmvae.sources": {"twice": f"module_{number}:f"}, "metagmvae.encoders": {"conv4": "module_1:f"}}
        install(tmp_path / str(number), f"package-{number}", {f"module_{number}.py": "f = 1"}, points)
        monkeypatch.syspath_prepend(tmp_path / str(number))
    from metagmvae.pipelines.sources.source import open_source
    from metagmvae.training.models.conv import ConvEncoder
    from metagmvae.training.models.encoders import build_encoder

    with pytest.raises(ValueError, match="package-1 and package-2 both add it"):
        open_source("twice")
    assert isinstance(build_encoder("conv4", (1, 28, 28), 8), ConvEncoder)


SOURCES = {
    "the key 'a' occurs 2 times": "keys = ['a', 'a']",
    "is an absolute path": "keys = ['/a', '/b']",
    "train and test share classes": "label = 'same'",
    "not uint8": "dtype = 'int64'",
    "another fingerprint": "fingerprint = lambda: str(np.random.rand())",
    "other pixels": "draw = lambda: np.random.randint(0, 256, (1, 8, 8)).astype('uint8')",
}


@pytest.mark.parametrize("broken", SOURCES)
def test_the_kit_names_the_rule_that_a_source_breaks(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"""
import numpy as np
from functools import partial
from metagmvae.pipelines.records import ImageRecord
from metagmvae.pipelines.sources.source import ImageSource
keys, label, dtype, fingerprint = ['a', 'b'], None, 'uint8', lambda: 'f' * 64
draw = lambda: np.arange(64).reshape(1, 8, 8)
{SOURCES[broken]}
def load(key):
    return draw().astype(dtype)
def open_it(source=None):
    splits = {{split: [ImageRecord(key, label or split, partial(load, key))]
              for key, split in zip(keys, ('train', 'test'))}}
    return ImageSource('bad', (1, 8, 8), splits, fingerprint())
"""
    from metagmvae.infra.api.testing import check_source

    install(tmp_path / "site", "bad", {"bad_source.py": text}, {"metagmvae.sources": {"bad": "bad_source:open_it"}})
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "bad_source", raising=False)
    with pytest.raises(AssertionError, match=broken):
        check_source("bad")


NETWORKS = {
    "depend on the others": "lambda x: x.mean(dim=(2, 3)) - x.mean()",
    "random in evaluation mode": "lambda x: x.mean(dim=(2, 3)) + torch.rand(1)",
    "not finite": "lambda x: x.mean(dim=(2, 3)) / 0",
    "equal features": "lambda x: torch.ones(len(x), 3)",
    "parameters without a gradient": "lambda x: x.mean(dim=(2, 3))",
}


@pytest.mark.parametrize("broken", NETWORKS)
def test_the_kit_names_the_rule_that_an_encoder_breaks(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"""
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Linear(1, 1)
    def forward(self, x):
        return ({NETWORKS[broken]})(x)
def build(shape):
    return Net()
"""
    from metagmvae.infra.api.testing import check_encoder

    install(tmp_path / "site", "bad", {"bad_net.py": text}, {"metagmvae.encoders": {"bad": "bad_net:build"}})
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "bad_net", raising=False)
    with pytest.raises(AssertionError, match=broken):
        check_encoder("bad", (1, 8, 8))
