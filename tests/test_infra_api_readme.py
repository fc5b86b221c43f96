"""The programs of the guide infra/api/README.md run, and its package adds a source and an encoder to the commands."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from added_packages import Site
from called_commands import answer_of, refusal_of
from command_words import set_words

import metagmvae
from metagmvae.configs.method_settings import MethodSettings
from metagmvae.pipelines.shards.dataset import Dataset

GUIDE = (Path(metagmvae.__file__).parent / "infra" / "api" / "README.md").read_text()

SHORT = {"train.steps": 2, "validation.every": 0, "run.engine": "local", "tracking.enabled": "false"}


def block(language: str, holding: str) -> str:
    """The program of the guide that holds a text."""
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL) if holding in b]
    return found


@pytest.fixture
def guide_package(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The package of the guide, installed."""
    project = tomllib.loads(block("toml", "entry-points"))["project"]
    modules = {
        "metagmvae_spirals": block("python", "def open_spirals"),
        "metagmvae_cosine": block("python", "class CosineNets"),
        "metagmvae_student": block("python", "class StudentMixture"),
        "metagmvae_rotations": block("python", "class Rotations"),
        "test_metagmvae_spirals": block("python", "import check_encoder"),
    }
    site.install(project["name"], modules, project["entry-points"])
    monkeypatch.chdir(tmp_path)
    return site


def test_parts_of_the_package_are_short() -> None:
    assert len(block("python", "def open_spirals").splitlines()) < 40
    assert len(block("python", "class CosineNets").splitlines()) < 40
    assert len(block("toml", "entry-points").splitlines()) < 40


@pytest.mark.slow
def test_source_and_encoder_of_another_package(guide_package: Site) -> None:
    """The commands of the guide, with fewer steps; the model is used again from its folder."""
    prepare, train = (line.split()[1:] for line in block("sh", "prepare spirals").splitlines())
    assert answer_of(*prepare)["samples"] == {"train": 240, "validation": 120, "test": 120}
    answer_of(*train, *set_words(SHORT | {"pretrain.steps": 2}))
    evaluate = ["evaluate", "runs/spirals", "--data", "data/spirals"]
    assert answer_of(*evaluate, "--episodes", 5)["episodes"] == 5
    assert metagmvae.load_model("runs/spirals").model.encoder.feature_dim == 256
    # Without the package, what needs it says so in one line.
    guide_package.remove("metagmvae_spirals")
    assert "unknown source 'spirals'" in refusal_of(*prepare, "--out", "other")
    line = refusal_of(*evaluate)
    assert "patches" in line
    assert "no such encoder" in line


@pytest.mark.slow
def test_method_of_another_package(guide_package: Site, data: Path) -> None:
    """The command of the guide, with fewer steps; the model is used again from its folder, or refused in one line."""
    train = block("sh", "method.name=cosine").split()[1:]
    answer_of(*train, *set_words(SHORT | {"pretrain.steps": 0, "data.uri": data}))
    evaluate = ["evaluate", "runs/cosine", "--data", data]
    assert answer_of(*evaluate, "--episodes", 5)["episodes"] == 5
    guide_package.remove("metagmvae_cosine")
    line = refusal_of(*evaluate)
    assert "method.name (cosine): no such method" in line
    assert "protonets" in line


METHODS = {
    "def make(): return 3": "its package returns int instead of a Method",
    "def make(): raise KeyError('no weights')": "its package cannot build it (KeyError: 'no weights')",
    "raise ImportError('no such library')": "cannot be imported (no such library)",
}


@pytest.mark.parametrize("text", METHODS)
def test_a_broken_method_is_one_line(text: str, site: Site) -> None:
    from metagmvae.pipelines.records import DataError
    from metagmvae.training.methods.methods_by_name import find_method

    site.install("other", {"other_way": text}, {"metagmvae.methods": {"other": "other_way:make"}})
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
def test_the_kit_names_the_rule_that_a_method_breaks(broken: str, site: Site) -> None:
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

    site.install("bad", {"bad_way": text}, {"metagmvae.methods": {"bad": "bad_way:make"}})
    with pytest.raises(AssertionError, match=broken):
        check_method("bad", (1, 8, 8))


def test_tests_of_the_package(guide_package: Site) -> None:
    names: dict = {}
    exec((guide_package.folder / "test_metagmvae_spirals.py").read_text(), names)
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
def test_a_broken_package_is_one_line(text: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, reason = BROKEN[text]
    points = {"metagmvae.sources": {"broken": "broken_module:broken"}}
    site.install("broken-package", {"broken_module": text}, points)
    monkeypatch.chdir(tmp_path)
    assert reason in refusal_of(*words)
    assert not (tmp_path / "x").exists()


ENCODERS = {
    "def build(shape): return 3": "returns int instead of a torch.nn.Module",
    "def build(shape): raise KeyError('no weights')": "cannot build it",
    "from torch import nn\ndef build(shape): return nn.Conv2d(1, 2, 3)": "one feature vector per image",
    "from torch import nn\ndef build(shape): return nn.Linear(5, 2)": "does not accept images of (1, 28, 28)",
}


@pytest.mark.parametrize("text", ENCODERS)
def test_a_broken_encoder_is_one_line(text: str, site: Site) -> None:
    from metagmvae.training.models.encoders import EncoderError, build_encoder

    site.install("other", {"other_net": text}, {"metagmvae.encoders": {"other": "other_net:build"}})
    with pytest.raises(EncoderError, match=re.escape(ENCODERS[text])) as caught:
        build_encoder("other", (1, 28, 28), 64)
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_of_two_packages_is_refused(site: Site) -> None:
    for number in (1, 2):
        points = {"metagmvae.sources": {"twice": f"module_{number}:f"}, "metagmvae.encoders": {"conv4": "module_1:f"}}
        site.install(f"package-{number}", {f"module_{number}": "f = 1"}, points)
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
def test_the_kit_names_the_rule_that_a_source_breaks(broken: str, site: Site) -> None:
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

    site.install("bad", {"bad_source": text}, {"metagmvae.sources": {"bad": "bad_source:open_it"}})
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
def test_the_kit_names_the_rule_that_an_encoder_breaks(broken: str, site: Site) -> None:
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

    site.install("bad", {"bad_net": text}, {"metagmvae.encoders": {"bad": "bad_net:build"}})
    with pytest.raises(AssertionError, match=broken):
        check_encoder("bad", (1, 8, 8))
