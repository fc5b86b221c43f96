"""`calibrate`: fits on validation episodes, stores the result with the model, and never changes a prediction."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow_template
import numpy as np
import pytest
import torch
from calibrations import fits
from called_commands import answer_of, refusal_of
from command_words import TINY, set_words

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.predict import calibrated
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.infra.cli import main
from metagmvae.infra.registry.pyfunc_model import Predictor
from metagmvae.infra.workflows.estimator import FewShotClassifier
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.posterior_calibration import (
    CALIBRATION,
    UNCALIBRATED,
    CalibrationMap,
)
from metagmvae.training.trainer.package import CARD, load_model, save_package

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run that was calibrated at the end of its training, with few episodes."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = TINY | {"data.uri": data, "run.out": out, "validation.calibration_episodes": 3}
    assert main(["train", "omniglot-cpu", *set_words(settings), "--json"]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_training_ends_with_a_calibration(run, data):
    record = load_model(run).calibration
    assert (record.fitted_on, record.split, record.backgrounds) == ("labelled classes", "validation", ())
    assert record.data_fingerprint == Dataset.open(data).fingerprint
    assert [(fit.mode, fit.way, fit.shot) for fit in record.temperatures] == [
        (mode, 5, shot) for shot in (1, 5) for mode in ("transductive", "inductive")
    ]
    assert all(fit.nll <= fit.nll_uncalibrated for fit in record.temperatures)


def test_no_calibration_if_the_settings_say_so(data, tmp_path):
    settings = TINY | {"data.uri": data, "run.out": tmp_path / "run", "validation.calibration_episodes": 0}
    assert main(["train", "omniglot-cpu", *set_words(settings), "--json"]) == 0
    assert not (tmp_path / "run" / CALIBRATION).exists()
    assert load_model(tmp_path / "run").calibration is None


def test_the_command_replaces_the_calibration_of_a_run(run, data):
    answer = answer_of("calibrate", run, "--data", data, "--shot", 2, "--episodes", 4, "--query", 5)
    assert Path(answer["calibration"]) == run / CALIBRATION
    assert {(row["mode"], row["shot"], row["queries"]) for row in answer["temperatures"]} == {
        ("transductive", 2, 100),
        ("inductive", 2, 100),
    }
    assert {row["mode"] for row in answer["backgrounds"]} == {"transductive", "inductive"}
    stored = load_model(run).calibration
    assert [fit.temperature for fit in stored.temperatures] == [row["temperature"] for row in answer["temperatures"]]
    assert load_model(run / "checkpoint.pt").calibration == stored
    again = answer_of("calibrate", run, "--data", data, "--shot", 2, "--episodes", 4, "--query", 5)
    assert again == answer


def test_the_calibration_of_other_weights_is_not_applied(run, tmp_path):
    other = mlflow_template.new_run(tmp_path / "other")
    shutil.copy(run / CALIBRATION, other / CALIBRATION)
    assert load_model(run).calibration is not None
    assert load_model(other).calibration is None


def test_each_best_model_of_a_run_has_its_own(data, tmp_path):
    run = mlflow_template.new_run(tmp_path / "run", best_by_shot=(1, 5))
    answer_of("calibrate", run, "--data", data, "--episodes", 2, "--query", 3, "--no-unknown")
    one, five = (load_model(run, shot=shot).calibration for shot in (1, 5))
    assert one is not None
    assert five is not None
    assert one != five


def test_packages_keep_it_and_old_packages_have_none(run, data, tmp_path):
    old = save_package(tmp_path / "old", replace(load_model(run), calibration=None))
    assert "calibration" not in json.loads((old / CARD).read_text())
    assert load_model(old).calibration is None
    assert load_model(old).calibration_map(AdaptSettings(), "inductive", 5, 1) == UNCALIBRATED
    kept = save_package(tmp_path / "kept", load_model(run))
    assert load_model(kept).calibration == load_model(run).calibration
    before = (old / "model.safetensors").read_bytes()
    answer = answer_of("calibrate", old, "--data", data, "--episodes", 2, "--no-unknown")
    assert answer["calibration"] == str(old / CARD)
    assert len(load_model(old).calibration.temperatures) == 4
    assert (old / "model.safetensors").read_bytes() == before


def test_out_writes_a_package_and_leaves_the_model_alone(run, data, tmp_path):
    before = (run / CALIBRATION).read_bytes()
    words = ["calibrate", run, "--data", data, "--episodes", 2, "--no-unknown", "--out", tmp_path / "new"]
    answer_of(*words)
    assert load_model(tmp_path / "new").calibration.temperatures
    assert (run / CALIBRATION).read_bytes() == before
    assert "already exists" in refusal_of(*words)


def test_damaged_records_are_one_line_that_names_the_key(run, tmp_path):
    package = save_package(tmp_path / "package", load_model(run))
    card = json.loads((package / CARD).read_text())
    card["calibration"]["temperatures"][0]["temperature"] = -1
    (package / CARD).write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"model.json: calibration: temperatures.0.temperature = -1"):
        load_model(package)
    (run / CALIBRATION).write_text('{"models": []}')
    with pytest.raises(ValueError, match=r"calibration.json: models = \[\]"):
        load_model(run)


@pytest.mark.parametrize(("mode", "factor"), [("transductive", 1.0), ("inductive", 10.0)])
def test_estimator_server_and_evaluate_apply_the_same_map(run, data, mode, factor):
    """Support of 2 classes with 1 and 3 images: 2 shots on average, nearest in ratio to 1."""
    loaded = load_model(run)
    adapt = loaded.settings.adapt
    loaded = replace(loaded, calibration=fits(3.0, adapt=adapt))
    images = np.random.default_rng(0).integers(0, 256, (9, *loaded.image_shape), dtype=np.uint8)
    labels = np.array([0, 1, 1, 1])
    h = encode_images(loaded.model, images, CPU)
    log_p = predict_queries(loaded.model, adapt, h[:4], labels, h[4:], mode=mode).double().log()
    expected = calibrated(log_p, CalibrationMap(temperature=3.0 * factor, uniform=0.02)).numpy()
    classifier = FewShotClassifier(loaded, mode=mode).fit(images[:4], labels)
    np.testing.assert_allclose(classifier.predict_proba(images[4:]), expected, rtol=1e-5)
    server = Predictor()
    server.loaded, server.device = loaded, CPU
    request = {"images": images, "label": np.array([*labels, *[-1] * 5])}
    np.testing.assert_allclose(server.predict(None, request, {"mode": mode}), expected, rtol=1e-5)
    plain = FewShotClassifier(replace(loaded, calibration=None), mode=mode).fit(images[:4], labels)
    assert (plain.predict(images[4:]) == classifier.predict(images[4:])).all()
    assert not np.allclose(plain.predict_proba(images[4:]), expected, rtol=0.01)
    changed = FewShotClassifier(loaded, mode=mode, temperature=7.0).fit(images[:4], labels)
    reference = FewShotClassifier(replace(loaded, calibration=None), mode=mode, temperature=7.0).fit(images[:4], labels)
    np.testing.assert_array_equal(changed.predict_proba(images[4:]), reference.predict_proba(images[4:]))


def test_evaluate_shows_calibration_and_keeps_the_accuracy(run, data, tmp_path, capsys):
    words = ["evaluate", run, "--data", data, "--episodes", 6, "--record", tmp_path / "r.json"]
    answer = answer_of(*words, "--html", tmp_path / "page.html")
    fitted = load_model(run).calibration.temperatures[0]
    assert (answer["temperature"], answer["uniform"]) == (fitted.temperature, fitted.uniform)
    assert 0 <= answer["ece"] <= 1
    assert answer["ece_uncalibrated"] != answer["ece"]
    bins = answer["reliability"]
    assert sum(row["queries"] for row in bins) == 6 * 75
    gaps = [row["queries"] * abs(row["accuracy"] - row["confidence"]) for row in bins]
    assert sum(gaps) / (6 * 75) == pytest.approx(answer["ece"])
    assert json.loads((tmp_path / "r.json").read_text())["reliability"] == bins
    page = (tmp_path / "page.html").read_text()
    assert f"{100 * answer['ece']:.2f}" in page
    assert "Reliability diagram" in page
    (run / CALIBRATION).unlink()
    plain = answer_of(*words)
    assert (plain["accuracy"], plain["temperature"]) == (answer["accuracy"], 1.0)
    assert plain["ece"] == plain["ece_uncalibrated"] == answer["ece_uncalibrated"]
    assert main([*map(str, words)]) == 0
    assert "accuracy #, confidence |" in capsys.readouterr().out


def test_dirichlet_queries_and_changed_adaptation(run, data, tmp_path):
    words = ["evaluate", run, "--data", data, "--episodes", 4, "--query", 3, "--baselines"]
    record = tmp_path / "r.json"
    answer = answer_of(*words, "--queries", "dirichlet:0.5", "--record", record)
    assert (answer["dirichlet"], answer["capped_episodes"]) == (0.5, 0)
    assert all(row["dirichlet"] == 0.5 for row in answer["baselines"])
    assert "kept" not in answer
    changed = ["--set", "adapt.proportions=estimated", "--set", "adapt.proportions_prior=0"]
    other = answer_of(*words, "--queries", "dirichlet:0.5", *changed)
    assert other["temperature"] == 1.0
    assert "kept" not in answer_of(*words, *changed)
    for options, message in (
        (["--queries", "uniform"], "--queries uniform: give balanced, or dirichlet:ALPHA"),
        (["--queries", "dirichlet:-1"], "--queries dirichlet:-1"),
        (["--queries", "dirichlet:nan"], "--queries dirichlet:nan"),
        (["--queries", "dirichlet:1", "--unbalanced"], "give one of them"),
        (["--set", "model.latent=3"], "a trained model only takes other settings of adapt"),
        (["--set", "adapt.proportions=some"], "adapt.proportions"),
        (["--open", "-1"], "--open -1"),
        (["--open", "1", "--ways", "2", "3"], "--open: cannot be combined with --ways"),
        (["--open", "1"], "has no level for queries of no labelled class"),
    ):
        assert message in refusal_of("evaluate", run, "--data", data, *options)


def test_open_queries(run, data, tmp_path):
    answer_of("calibrate", run, "--data", data, "--shot", 1, "--episodes", 3, "--query", 5)
    words = ["evaluate", run, "--data", data, "--episodes", 5, "--query", 4, "--way", 3, "--open", 2, "--baselines"]
    answer = answer_of(*words, "--record", tmp_path / "r.json")
    names = [(row["model"], row["mode"]) for row in answer["rows"]]
    assert names[:4] == [
        (name, mode)
        for mode in ("transductive", "inductive")
        for name in ("meta-gmvae", "meta-gmvae without background component")
    ]
    assert len(names) == 8
    for row in answer["rows"]:
        assert 0 <= row["open_accuracy"] <= 1
        assert 0 <= row["auroc"] <= 1
        assert row["open_classes"] == 2
    assert "kept" not in answer
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == answer["rows"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--episodes", "0"], "--episodes 0: must be at least 1"),
        (["--shot", "1", "0"], "--shot 0: must be at least 1"),
        (["--way", "1"], "--way 1: must be at least 2"),
        (["--split", "dev"], "dev"),
    ],
)
def test_wrong_requests_leave_nothing_behind(run, data, options, message):
    before = (run / CALIBRATION).read_bytes()
    assert message in refusal_of("calibrate", run, "--data", data, *options)
    assert (run / CALIBRATION).read_bytes() == before


def test_without_validation_classes_training_images_are_augmented(trained, data, tmp_path):
    """A dataset whose validation split has another name than the settings say has none for this model."""
    from metagmvae.evaluation.uncertainty.fit_calibration import CalibrationPlan, fit_calibration

    loaded = load_model(trained)
    settings = loaded.settings.model_copy(
        update={"data": loaded.settings.data.model_copy(update={"validation_split": "none"})}
    )
    plan = CalibrationPlan((5,), (1, 4), 3, 4, background=False)
    record = fit_calibration(replace(loaded, settings=settings), Dataset.open(data), plan, device=CPU)
    assert (record.fitted_on, record.split) == ("augmented images", "train")
    assert {(fit.shot, fit.queries) for fit in record.temperatures} == {(1, 4 * 5 * 3), (4, 4 * 5 * 3)}


def test_what_the_classes_do_not_allow_is_lowered_and_said(run, data, capsys):
    """The validation split has 6 classes of 20 images."""
    words = ["calibrate", run, "--data", data, "--way", 9, "--shot", 18, "--query", 5, "--episodes", 2, "--no-unknown"]
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["temperatures"]
    assert {(row["way"], row["shot"], row["queries"]) for row in rows} == {(6, 18, 2 * 6 * 2)}
    lines = [line for line in printed.err.splitlines() if "instead of" in line]
    assert any("way 6 instead of 9" in line for line in lines)
    assert any("query 2 instead of 5" in line for line in lines)
    assert not any("shot" in line for line in lines)
    assert "no level" not in printed.err  # none was asked for
    words[words.index("--no-unknown") :] = []
    assert main([*map(str, words), "--json"]) == 0
    printed = capsys.readouterr()
    assert "backgrounds" not in json.loads(printed.out)
    assert printed.err.count("no level for `classify --unknown` was fitted with way 6: the split has 6 classes") == 1
