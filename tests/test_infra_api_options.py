"""Options of what other packages add: settings, sweeps, checks, and the objectives and baselines that they add."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from added_packages import Site

from metagmvae.configs.load import (
    SettingsError,
    differences,
    fingerprint,
    load_settings,
    settings_from_json,
    to_json,
    to_toml,
)
from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import ModelSettings, PretrainSettings, Settings
from metagmvae.configs.search_space import load_space, with_values
from metagmvae.evaluation.fewshot.baselines import BASELINES, all_baselines
from metagmvae.infra.api.extension_testing import check_baseline, check_objective
from metagmvae.infra.registry import resolve
from metagmvae.infra.tracking.store import Store
from metagmvae.infra.tune.code_version import changed_parts, extension_fingerprint
from metagmvae.infra.tune.request import SweepRequest, _make_plan
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.models.encoders import EncoderError, configured_encoder
from metagmvae.training.pretraining.objectives_by_name import find_objective
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.package import LoadedModel, load_package, save_package

Install = Callable[..., None]

MODULE = """
from torch import nn
from metagmvae.evaluation.fewshot.baselines import Baseline, nearest_class_mean_scores
from metagmvae.training.methods.meta_step import MetaGMVAEMethod
from metagmvae.training.pretraining.contrastive import ContrastiveStep

class Own(ContrastiveStep):
    def __init__(self, *base, margin: float = 0.5, hard: bool = False):
        super().__init__(*base)
        self.margin = margin

def method(*, margin: float = 0.5, hard: bool = False):
    made = MetaGMVAEMethod()
    made.margin = margin
    return made

def needy(*, margin):
    return MetaGMVAEMethod()

def encoder(shape, *, margin: float = 0.5, hard: bool = False):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], round(10 * margin)))

mean = Baseline(nearest_class_mean_scores, "inductive")
"""
POINTS = {
    "metagmvae.methods": {"own": "own_ideas:method", "needy": "own_ideas:needy"},
    "metagmvae.encoders": {"own": "own_ideas:encoder"},
    "metagmvae.objectives": {"own": "own_ideas:Own"},
    "metagmvae.baselines": {"own mean": "own_ideas:mean"},
}


@pytest.fixture
def package(site: Site) -> Install:
    """Writes the module `own_ideas` and its entry points, and makes them importable."""

    def write(text: str = MODULE, points: dict[str, dict[str, str]] | None = None) -> None:
        site.install("own-ideas", {"own_ideas": text}, points or POINTS)

    return write


def test_options_reach_what_they_are_options_of(package: Install) -> None:
    package()
    method: Any = find_method(MethodSettings(name="own", options={"margin": 2}))
    assert method.margin == 2
    encoder = configured_encoder(ModelSettings(encoder="own", options={"margin": 0.7}), (1, 8, 8))
    assert encoder.feature_dim == 7
    assert configured_encoder(ModelSettings(encoder="own"), (1, 8, 8)).feature_dim == 5
    step: Any = check_objective("own", (1, 28, 28), options={"margin": 0.25}, temperature=0.5)
    assert step.margin == 0.25
    assert check_baseline("own mean").mode == "inductive"
    assert list(all_baselines()) == [*BASELINES, "own mean"]


WRONG = {
    "margn": ({"margn": 1}, "margn: no such option of own; did you mean 'margin'?"),
    "type": ({"margin": "big"}, "margin is 'big'; give a value like the default, 0.5"),
    "bool for float": ({"margin": True}, "margin is True; give a value like the default, 0.5"),
    "int for bool": ({"hard": 1}, "hard is 1; give a value like the default, False"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_option_is_one_line_with_its_key(wrong: str, package: Install) -> None:
    package()
    options, message = WRONG[wrong]
    with pytest.raises(DataError, match=re.escape(f"method.options.{message}")):
        find_method(MethodSettings(name="own", options=options))
    with pytest.raises(DataError, match=re.escape(f"pretrain.options.{message}")):
        find_objective(PretrainSettings(objective="own", options=options))
    with pytest.raises(EncoderError, match=re.escape(f"model.options.{message}")):
        configured_encoder(ModelSettings(encoder="own", options=options), (1, 8, 8))


def test_an_option_without_default_is_needed(package: Install) -> None:
    package()
    with pytest.raises(DataError, match=r"^method\.options\.margin is missing: needy has no default for it$"):
        find_method(MethodSettings(name="needy"))
    find_method(MethodSettings(name="needy", options={"margin": "any"}))


def test_parts_of_this_package_have_no_options() -> None:
    with pytest.raises(DataError, match=r"^method\.options\.x: no such option of protonets, which has none$"):
        find_method(MethodSettings(name="protonets", options={"x": 1}))
    with pytest.raises(DataError, match=r"^pretrain\.options\.x: no such option of nt-xent, which has none$"):
        find_objective(PretrainSettings(options={"x": 1}))
    for name in ("conv4", "resnet18"):
        with pytest.raises(EncoderError, match=rf"model\.options\.x: no such option of {name}, which has none$"):
            configured_encoder(ModelSettings(encoder=name, options={"x": 1}), (3, 64, 64))


def test_an_unknown_or_broken_objective_is_one_line(package: Install) -> None:
    package("own = 3", {"metagmvae.objectives": {"own": "own_ideas:own"}})
    with pytest.raises(DataError, match=r"^pretrain\.objective \(own\): its package adds 3 instead of a subclass of"):
        find_objective(PretrainSettings(objective="own"))
    with pytest.raises(DataError, match=r"^pretrain\.objective \(nt-xnt\): no such objective; did you mean 'nt-xent'"):
        find_objective(PretrainSettings(objective="nt-xnt"))


def test_a_broken_baseline_is_one_line(package: Install) -> None:
    package("own = print", {"metagmvae.baselines": {"own": "own_ideas:own"}})
    with pytest.raises(DataError, match=r"own: its package adds builtin_function_or_method instead of a Baseline"):
        all_baselines()


def test_a_baseline_cannot_take_the_name_of_another(package: Install) -> None:
    package(MODULE, {"metagmvae.baselines": {"Laplacian": "own_ideas:mean"}})
    with pytest.raises(DataError, match=r"Laplacian: is a baseline of metagmvae; give it another name"):
        all_baselines()


def test_options_are_settings() -> None:
    plain = load_settings("omniglot-cpu")
    own = load_settings("omniglot-cpu", ["method.name=own", 'method.options.kind="full"', "method.options.rate=0.5"])
    assert own.method.options == {"kind": "full", "rate": 0.5}
    assert settings_from_json(to_json(own)) == own
    assert "options" in json.loads(to_json(plain))["method"]
    other = with_values(own, {"method.options.rate": 0.25})
    assert other.method.options == {"kind": "full", "rate": 0.25}
    assert fingerprint(other) != fingerprint(own)
    without = own.model_copy(update={"method": own.method.model_copy(update={"options": {}})})
    assert "method.options.rate: 0.5, None" in differences(own, without)
    assert "method.options.rate: None, 0.5" in differences(without, own)


def test_options_survive_toml(tmp_path: Path) -> None:
    options = {"kind": 'a "quoted" word', "rate": 1e-5, "deep": True, "count": 3}
    own = Settings.model_validate({"model": {"options": options}, "pretrain": {"options": {"x": -1}}})
    (tmp_path / "own.toml").write_text(to_toml(own))
    assert load_settings(tmp_path / "own.toml") == own


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.options.x=[1]", "method.options: x = [1]: give a finite number, true, false or a text in quotes"),
        ("method.options.x=nan", "method.options: x = nan: give a finite number"),
        ("method.options.A=1", "method.options: 'A' is no name of an option"),
        ("method.options.u=s3://k:secret@h/b", "u: settings are stored with every run and must not hold a password"),
    ],
)
def test_a_wrong_value_of_an_option_is_one_line(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_settings("omniglot-cpu", [override])


@pytest.mark.parametrize("form", ["method.options.rate = {}", "[method.options]\nrate = {}"])
def test_options_are_searched(form: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(form.format("{ loguniform = [0.1, 10.0] }"))
    space = load_space(tmp_path / "own.toml")
    settings = with_values(load_settings("omniglot-cpu", ["method.name=own"]), {"method.options.rate": 2.0})
    assert space.values_of(settings) == {"method.options.rate": 2.0}


BROKEN = {
    "draws from the global generator": "return (x := super().compute(views)) and (x[0] + 0 * torch.rand(()), {})",
    "no finite scalar with gradient": "return super().compute(views)[0].detach(), {}",
    "metrics have a gradient": "loss, _ = super().compute(views); return loss, {'loss': loss}",
    "does not reach the encoder": "return next(self.auxiliary.parameters()).sum(), {}",
    "ends with other weights": "self.calls += 1; return super().compute(views)[0] * self.calls, {}",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_kit_names_the_rule_that_an_objective_breaks(broken: str, package: Install) -> None:
    text = f"""
import torch
from metagmvae.training.pretraining.contrastive import ContrastiveStep
class Own(ContrastiveStep):
    calls = 0
    def compute(self, views):
        {BROKEN[broken]}
"""
    package(text, {"metagmvae.objectives": {"own": "own_ideas:Own"}})
    with pytest.raises(AssertionError, match=broken):
        check_objective("own", (1, 28, 28), projector=(8,))


SCORES = {
    "scores have the shape": "return score(s, q).mT",
    "separated classes are not told apart": "return -score(s, q)",
    "a query depends on the others": "return score(s, q) + q.shape[1]",
    "scores are NaN": "return score(s, q) * float('nan')",
}


@pytest.mark.parametrize("broken", SCORES)
def test_the_kit_names_the_rule_that_a_baseline_breaks(broken: str, package: Install) -> None:
    text = f"""
from metagmvae.evaluation.fewshot.baselines import Baseline, nearest_class_mean_scores as score
def own(s, q):
    {SCORES[broken]}
mine = Baseline(own, "inductive")
"""
    package(text, {"metagmvae.baselines": {"own": "own_ideas:mine"}})
    with pytest.raises(AssertionError, match=broken):
        check_baseline("own")
    with pytest.raises(DataError, match="no such baseline; known: nearest class mean, "):
        check_baseline("other")


def test_a_model_says_that_its_package_is_missing(
    package: Install, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package()
    own: dict[str, dict[str, Any]] = {
        "method.name (own): no such method; known: ": {"method": {"name": "own"}},
        "model.encoder (own): no such encoder; encoders": {"model": {"encoder": "own", "options": {"margin": 0.7}}},
    }
    folders = {}
    for number, (message, sections) in enumerate(own.items()):
        settings = Settings.model_validate(sections)
        model = build_model(settings.model, (1, 28, 28), 0, settings.method)
        folders[message] = save_package(tmp_path / str(number), LoadedModel(model, settings, (1, 28, 28), {}))
        assert load_package(folders[message]).settings == settings
    site.remove("own_ideas")
    monkeypatch.setattr(resolve, "_fetch_version", lambda store, ref, folder: folders[message])
    for message, folder in folders.items():
        for load, name in (
            (lambda folder=folder: load_package(folder), str(folder)),
            (lambda: resolve.load_from_store(Store(None, "sqlite:///x", None), "models:/own/1"), "models:/own/1"),
        ):
            with pytest.raises(DataError) as caught:
                load()
            text = str(caught.value)
            assert text.startswith(f"{name}: {message}"), text
            assert text.endswith("; if another package adds this part of the model, install it")
            assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("method.options.margn", r"method\.options\.margn: no such option of own; did you mean 'margin'"),
        ("model.options.hard", r"model\.options\.hard is 0\.25; give a value like the default, False"),
        ("pretrain.options.margins", r"pretrain\.options\.margins: no such option of own"),
    ],
)
def test_a_sweep_over_a_wrong_option_does_not_start(
    key: str, wrong: str, package: Install, dataset: Dataset, tmp_path: Path
) -> None:
    package()
    (tmp_path / "space.toml").write_text(f"{key} = {{ uniform = [0.25, 0.75] }}\n")
    own = ["method.name=own", "model.encoder=own", "pretrain.objective=own", "pretrain.steps=4", "pretrain.batch=8"]
    more = ["validation.way=2", "validation.query=5", "train.steps=2000", f"data.uri={dataset.uri}"]
    base = load_settings("omniglot-5way", [*own, *more])
    request = SweepRequest(base, load_space(tmp_path / "space.toml"), tmp_path / "sweep")
    with pytest.raises(ValueError, match=wrong):
        _make_plan(request, dataset)
    right = tmp_path / "right.toml"
    right.write_text(f"{key.partition('.')[0]}.options.margin = {{ uniform = [0.25, 0.75] }}\n")
    assert _make_plan(SweepRequest(base, load_space(right), tmp_path / "sweep"), dataset).base == base


def test_a_sweep_notices_that_the_package_has_changed(package: Install, tmp_path: Path) -> None:
    package()
    own = Settings.model_validate({"method": {"name": "own"}, "model": {"encoder": "own"}})
    before = extension_fingerprint(own)
    assert list(before) == ["metagmvae.methods: own", "metagmvae.encoders: own"]
    assert extension_fingerprint(own) == before
    assert extension_fingerprint(Settings()) == {}
    (tmp_path / "site" / "own_ideas.py").write_text(MODULE + "# changed")
    assert changed_parts(extension_fingerprint(own), before) == ["metagmvae.encoders: own", "metagmvae.methods: own"]
