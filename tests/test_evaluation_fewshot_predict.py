"""Prediction and evaluation of episodes: each against a slow or separate computation of the same numbers."""

import copy

import numpy as np
import pytest
import torch

from metagmvae.configs.schema import AdaptSettings, ModelSettings, Settings
from metagmvae.evaluation.fewshot.baselines import nearest_class_mean
from metagmvae.evaluation.fewshot.evaluate_episodes import evaluate_features, evaluate_images
from metagmvae.evaluation.fewshot.predict import log_posteriors
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.objectives.mixture import class_log_posterior, fit_semi_supervised
from metagmvae.training.trainer.builders import build_model

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
    """Eight classes of eight images: one pattern per class, plus noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (8, 1, *SHAPE))
    images = np.clip(patterns + rng.normal(0, 60, (8, 8, *SHAPE)), 0, 255).astype(np.uint8)
    return images.reshape(-1, *SHAPE), np.repeat(np.arange(8), 8)


@pytest.fixture(scope="module")
def features(model, data):
    return encode_images(model, data[0], CPU)


@pytest.fixture(scope="module")
def sharp(model):
    """A model whose latents are so far apart that the probabilities differ between images."""
    sharp = copy.deepcopy(model)
    with torch.no_grad():
        sharp.head.weight[:6] *= 2000  # the means
    return sharp


def probabilities(*args, **options):
    return log_posteriors(*args, **options).exp().float()


def test_encoding_does_not_depend_on_the_batch(model, data):
    images = data[0]
    h = encode_images(model, images, CPU)
    torch.testing.assert_close(encode_images(model, images, CPU, batch=7), h)
    for count in range(1, 9):
        assert torch.equal(encode_images(model, images[:count], CPU), h[:count])


def test_prediction_equals_eq_10_and_11_point_by_point(model, features):
    support, query = features[:6].view(1, 3, 2, -1), features[None, 6:11]
    actual = probabilities(model, ADAPT, support, query, seed_by_episode=[4])[0]
    with torch.no_grad():
        mean, log_variance = model.posterior(features[None, :11])
    noise = torch.randn(11, 5, 6, generator=keyed_generator(CPU, "predict", 4))
    z = mean[0][:, None] + torch.exp(0.5 * log_variance[0])[:, None] * noise
    labelled = torch.stack([torch.cat([z[2 * k], z[2 * k + 1]]) for k in range(3)])[None]
    mixture = fit_semi_supervised(labelled, z[6:].flatten(0, 1)[None], iterations=3)
    for q in range(5):
        expected = sum(class_log_posterior(mixture, z[6 + q, n][None, None])[0, 0].exp() for n in range(5)) / 5
        torch.testing.assert_close(actual[q], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.sum(dim=1), torch.ones(5))


def test_inductive_prediction_does_not_depend_on_other_queries(sharp, features):
    support, query = features[:6].view(1, 3, 2, -1), features[None, 6:11]
    together = probabilities(sharp, ADAPT, support, query, mode="inductive", seed_by_episode=[0])
    changed = query.clone()
    changed[0, 1:] = features[20:24]
    other = probabilities(sharp, ADAPT, support, changed, mode="inductive", seed_by_episode=[0])
    torch.testing.assert_close(other[0, 0], together[0, 0])
    assert not torch.allclose(other[0, 1], together[0, 1])
    transductive = [probabilities(sharp, ADAPT, support, q, seed_by_episode=[0])[0, 0] for q in (query, changed)]
    assert not torch.allclose(*transductive)


@pytest.mark.parametrize("covariance", ["diagonal", "identity"])
@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_prediction_does_not_depend_on_names_and_order(sharp, features, mode, covariance):
    """The same queries with classes renamed and the support reordered; inductive: also alone and in another order."""
    adapt = ADAPT.model_copy(update={"e_step": covariance, "final_covariance": covariance})
    support, labels, queries = features[:9], np.repeat([0, 1, 2], [4, 3, 2]), features[9:16]

    def predict(rows, renamed=(0, 1, 2), queries=queries):
        names = np.asarray(renamed)[labels[rows]]
        return predict_queries(sharp, adapt, support[rows], names, queries, mode=mode, seed=5)[:, list(renamed)]

    rows, shuffled = np.arange(9), np.random.default_rng(1).permutation(9)
    expected = predict(rows)
    assert (expected.amax(dim=0) - expected.amin(dim=0) > 0.05).all()
    assert torch.equal(predict(shuffled), expected)
    assert torch.equal(predict(rows, renamed=(2, 0, 1)), expected)
    if mode == "inductive":
        backwards = torch.arange(6, -1, -1)
        assert torch.equal(predict(rows, queries=queries[backwards])[backwards], expected)
        for p in range(7):
            assert torch.equal(predict(rows, queries=queries[p : p + 1])[0], expected[p])


@pytest.mark.parametrize(
    ("mode", "fits", "calls"), [("inductive", False, 7), ("inductive", True, 1), ("transductive", False, 1)]
)
def test_inductive_queries_come_in_calls_of_their_own_unless_each_would_fit_the_support(
    model, features, mode, fits, calls, monkeypatch
):
    seen = []
    log_posteriors = model.log_posteriors
    monkeypatch.setattr(model, "fits_support", fits)
    monkeypatch.setattr(
        model, "log_posteriors", lambda *args, **options: seen.append(1) or log_posteriors(*args, **options)
    )
    predict_queries(model, ADAPT, features[:6], np.repeat([0, 1, 2], 2), features[9:16], mode=mode)
    assert len(seen) == calls


@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_episodes_and_single_tasks_agree(sharp, features, mode):
    """Transductive: for a support that is sorted by content, as `predict_queries` sorts it."""
    support, labels, queries = features[:6], np.repeat([0, 1, 2], 2), features[9:16]
    single = predict_queries(sharp, ADAPT, support, labels, queries, mode=mode, seed=5)
    content = [row.numpy().tobytes() for row in support]
    classes = [sorted(rows, key=content.__getitem__) for rows in ([0, 1], [2, 3], [4, 5])]
    order = sorted(range(3), key=lambda k: content[classes[k][0]])
    rows = torch.as_tensor([classes[k] for k in order])

    def episode(rows):
        return probabilities(sharp, ADAPT, support[rows][None], queries[None], mode=mode, seed_by_episode=[5])[0]

    # Rounding is amplified, because the latents are far apart.
    torch.testing.assert_close(episode(rows), single[:, order], rtol=0, atol=1e-3)
    if mode == "inductive":
        torch.testing.assert_close(episode(rows.flip(0, 1)), single[:, order[::-1]], rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", ["transductive", "inductive"])
def test_accuracies_do_not_depend_on_the_batching_of_episodes(model, features, data, mode, monkeypatch):
    task = {**TASK, "episodes": 7, "seed": 2, "mode": mode}
    batched = evaluate_features(model, ADAPT, features, data[1], **task)
    monkeypatch.setattr(type(model), "episodes_per_batch", lambda *_: 1)
    one_by_one = evaluate_features(model, ADAPT, features, data[1], **task)
    assert np.array_equal(batched.accuracies, one_by_one.accuracies)
    assert np.array_equal(evaluate_images(model, ADAPT, *data, **task).accuracies, one_by_one.accuracies)


def test_results_are_written_per_episode(model, features, data, tmp_path):
    import pyarrow.parquet as pq

    results = evaluate_features(model, ADAPT, features, data[1], **TASK, episodes=5)
    results.write_parquet(tmp_path / "r.parquet")
    table = pq.read_table(tmp_path / "r.parquet")
    assert table["accuracy"].to_pylist() == results.accuracies.tolist()
    assert results.summary()["ci95"] == pytest.approx(1.96 * results.accuracies.std(ddof=1) / np.sqrt(5))


def test_the_way_of_an_episode_may_differ_from_that_of_training(model, features, data):
    for way in (2, 8):
        result = evaluate_features(model, ADAPT, features, data[1], way=way, shot=1, query=2, episodes=3)
        assert (result.way, result.accuracies.shape) == (way, (3,))
    with pytest.raises(DataError, match="way 9 exceeds the 8 classes"):
        evaluate_features(model, ADAPT, features, data[1], way=9, shot=1)


def test_nearest_class_mean_classifies_well_separated_classes(data):
    pixels = torch.as_tensor(data[0]).flatten(1)
    assert nearest_class_mean(pixels - pixels.float().mean(0), data[1], **TASK, episodes=20).mean > 0.9
    shuffled = np.random.default_rng(1).permutation(data[1])
    assert nearest_class_mean(pixels, shuffled, **TASK, episodes=50).mean < 0.45


def test_unbalanced_queries_are_half_of_the_classes_and_one_query_of_each_other(sharp, features, data):
    """4 ways, 3 queries: 3 + 3 + 1 + 1. A query has the same answer as among balanced queries, in inductive mode."""
    task = {**TASK, "seed": 2}
    options = {"episodes": 5, "mode": "inductive"}
    result = evaluate_features(sharp, ADAPT, features, data[1], **task, **options, unbalanced=True)
    support, query = (torch.as_tensor(rows) for rows in EpisodeSampler(data[1], **task).batch(0, 5))
    answers = probabilities(
        sharp, ADAPT, features[support], features[query.flatten(1)], mode="inductive", seed_by_episode=range(5)
    )
    predicted = answers.argmax(dim=2).view(5, 4, 3).tolist()
    for accuracy, classes in zip(result.accuracies, predicted, strict=True):
        hits = [k == 0 for k in classes[0]] + [k == 1 for k in classes[1]] + [classes[2][0] == 2, classes[3][0] == 3]
        assert accuracy == sum(hits) / 8
    assert result.summary()["unbalanced"] is True
    assert "unbalanced" not in evaluate_features(sharp, ADAPT, features, data[1], **task, episodes=1).summary()
    baseline = nearest_class_mean(features, data[1], **task, episodes=5, unbalanced=True)
    assert baseline.unbalanced
    assert set(np.round(baseline.accuracies * 8, 9) % 1) == {0}
