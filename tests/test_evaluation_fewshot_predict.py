"""Prediction, episodes and packages: each against a slow or separate way to the same numbers."""

import json

import numpy as np
import pytest
import torch

from metagmvae.configs.schema import AdaptSettings, ModelSettings, Settings, TrainSettings
from metagmvae.evaluation.fewshot import evaluate_episodes
from metagmvae.evaluation.fewshot.baselines import nearest_class_mean
from metagmvae.evaluation.fewshot.evaluate_episodes import cross_way, evaluate, evaluate_features
from metagmvae.evaluation.fewshot.metrics import calibration_error, mean_ci95
from metagmvae.evaluation.fewshot.predict import encode_images, predict_episodes
from metagmvae.pipelines.records import DataError
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.objectives.mixture import class_log_posterior, fit_semi_supervised
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.checkpoint import CheckpointError, save_state
from metagmvae.training.trainer.package import LoadedModel, load_model, load_package, save_package

SHAPE = (1, 12, 12)
SETTINGS = Settings(model=ModelSettings(latent=6, channels=8, width=16, heads=2, layers=1))
ADAPT = AdaptSettings(samples=5, iterations=3)
CPU = torch.device("cpu")
TASK = {"way": 4, "shot": 2, "query": 3}


@pytest.fixture(scope="module")
def model():
    return build_model(SETTINGS.model, SHAPE, seed=3).eval()


@pytest.fixture(scope="module")
def data():
    """Eight classes of eight images: a pattern for each, and noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (8, 1, *SHAPE))
    images = np.clip(patterns + rng.normal(0, 60, (8, 8, *SHAPE)), 0, 255).astype(np.uint8)
    return images.reshape(-1, *SHAPE), np.repeat(np.arange(8), 8)


@pytest.fixture(scope="module")
def features(model, data):
    return encode_images(model, data[0], CPU)


def test_each_image_is_encoded_by_itself(model, data):
    images = data[0]
    whole = encode_images(model, images, CPU)
    torch.testing.assert_close(encode_images(model, images, CPU, batch=7), whole)
    torch.testing.assert_close(encode_images(model, images[[5]], CPU)[0], whole[5])


def test_prediction_is_eq_10_and_11_point_by_point(model, features):
    support, query = features[:6].view(1, 3, 2, -1), features[None, 6:11]
    got = predict_episodes(model, ADAPT, support, query, seed_by_episode=[4])[0]
    with torch.no_grad():
        mean, log_variance = model.posterior(features[None, :11])
    noise = torch.randn(11, 5, 6, generator=keyed_generator(CPU, "predict", 4))
    z = mean[0][:, None] + torch.exp(0.5 * log_variance[0])[:, None] * noise
    labelled = torch.stack([torch.cat([z[2 * k], z[2 * k + 1]]) for k in range(3)])[None]
    mixture = fit_semi_supervised(labelled, z[6:].flatten(0, 1)[None], iterations=3)
    for q in range(5):
        expected = sum(class_log_posterior(mixture, z[6 + q, n][None, None])[0, 0].exp() for n in range(5)) / 5
        torch.testing.assert_close(got[q], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(5))


def test_an_inductive_answer_does_not_depend_on_other_queries(model, features):
    support, query = features[:6].view(1, 3, 2, -1), features[None, 6:11]
    together = predict_episodes(model, ADAPT, support, query, mode="inductive", seed_by_episode=[0])
    changed = query.clone()
    changed[0, 1:] = features[20:24]
    other = predict_episodes(model, ADAPT, support, changed, mode="inductive", seed_by_episode=[0])
    torch.testing.assert_close(other[0, 0], together[0, 0])
    assert not torch.allclose(other[0, 1], together[0, 1])
    transductive = [predict_episodes(model, ADAPT, support, q, seed_by_episode=[0])[0, 0] for q in (query, changed)]
    assert not torch.allclose(*transductive)


@pytest.mark.parametrize("mode", ["transductive", "inductive"])
def test_results_do_not_depend_on_how_episodes_are_batched(model, features, data, mode, monkeypatch):
    run = {**TASK, "episodes": 7, "seed": 2, "mode": mode}
    batched = evaluate_features(model, ADAPT, features, data[1], **run)
    monkeypatch.setattr(evaluate_episodes, "episodes_at_once", lambda *_: 1)
    alone = evaluate_features(model, ADAPT, features, data[1], **run)
    assert np.array_equal(batched.accuracies, alone.accuracies)
    assert np.array_equal(evaluate(model, ADAPT, *data, **run).accuracies, alone.accuracies)


def test_results_are_kept_by_episode(model, features, data, tmp_path):
    import pyarrow.parquet as pq

    results = evaluate_features(model, ADAPT, features, data[1], **TASK, episodes=5)
    results.write_parquet(tmp_path / "r.parquet")
    table = pq.read_table(tmp_path / "r.parquet")
    assert table["accuracy"].to_pylist() == results.accuracies.tolist()
    assert results.summary()["ci95"] == pytest.approx(1.96 * results.accuracies.std(ddof=1) / np.sqrt(5))


def test_one_model_judges_any_way_and_says_how_many_there_are(model, features, data):
    ways = cross_way(model, ADAPT, features, data[1], ways=(2, 8), query=2, episodes=3)
    assert [r.way for r in ways] == [2, 8]
    with pytest.raises(DataError, match="9 ways were asked for and there are 8 classes"):
        evaluate_features(model, ADAPT, features, data[1], way=9, shot=1)


def test_nearest_class_mean_finds_well_separated_classes(data):
    pixels = torch.as_tensor(data[0]).flatten(1)
    assert nearest_class_mean(pixels - pixels.float().mean(0), data[1], **TASK, episodes=20).mean > 0.9
    shuffled = np.random.default_rng(1).permutation(data[1])
    assert nearest_class_mean(pixels, shuffled, **TASK, episodes=50).mean < 0.45


def test_interval_and_calibration_against_closed_forms():
    mean, half = mean_ci95(np.array([0.0, 1.0]))
    assert (mean, half) == (0.5, pytest.approx(1.96 * np.sqrt(0.5) / np.sqrt(2)))
    sure = np.array([[1.0, 0.0]] * 4)
    assert calibration_error(sure, np.array([0, 0, 0, 1])) == pytest.approx(0.25)
    assert calibration_error(sure, np.zeros(4, int)) == 0.0


def test_a_package_comes_back_bit_for_bit_and_damage_is_named(model, tmp_path):
    loaded = LoadedModel(model, SETTINGS, SHAPE, {"step": 3})
    path = save_package(tmp_path / "p", loaded)
    again = load_package(path)
    assert again.settings == SETTINGS
    assert again.info == {"step": 3}
    for name, value in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    with pytest.raises(DataError, match="exists already"):
        save_package(path, loaded)
    raw = bytearray((path / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (path / "model.safetensors").write_bytes(raw)
    with pytest.raises(DataError, match="was altered"):
        load_model(path)
    card = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps(card | {"version": 99}))
    with pytest.raises(DataError, match="not a model package of version 2"):
        load_model(path)


def test_a_run_gives_its_best_model_of_each_shot_where_it_selects(tmp_path):
    settings = SETTINGS.model_copy(update={"train": TrainSettings(selection="best")})
    weights = [build_model(SETTINGS.model, SHAPE, seed).state_dict() for seed in range(3)]
    best = {
        f"5w{shot}s": {"accuracy": 0.5, "ci95": 0.1, "step": 7 * shot, "model": weights[number]}
        for number, shot in enumerate((1, 5))
    }
    state = {
        "kind": "meta-gmvae",
        "projector": {},
        "settings": settings.model_dump_json(),
        "image_shape": list(SHAPE),
        "data_fingerprint": "d",
        "stage": "meta",
        "step": 60,
        "model": weights[2],
        "optimizer": {},
        "schedule": {},
        "rng": {},
        "best": best,
        "elapsed": 0.0,
    }
    save_state(tmp_path / "checkpoint.pt", state)
    for shot, number in ((1, 0), (5, 1), (20, 2), (None, 0)):
        head = load_model(tmp_path, shot=shot).model.state_dict()["head.weight"]
        assert torch.equal(head, weights[number]["head.weight"])
    assert load_model(tmp_path, shot=5).info["step"] == 35
    with pytest.raises(DataError, match="holds neither"):
        load_model(tmp_path.parent / "nowhere-made") if (tmp_path.parent / "nowhere-made").mkdir() is None else None
    (tmp_path / "checkpoint.pt").write_bytes(b"PK not one")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_model(tmp_path)
