"""An encoder alone as a model that classifies: answers, calibration, unknown queries, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings, Settings
from metagmvae.evaluation.encoders.head_model import HeadModel, answer_mode, fit_head, with_head, with_named_head
from metagmvae.evaluation.encoders.head_predictions import head_logits
from metagmvae.evaluation.encoders.heads import HEADS
from metagmvae.evaluation.fewshot.baseline_tuning import SEED_OFFSET, SplitFeatures
from metagmvae.evaluation.fewshot.baselines import soft_k_means
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.evaluation.uncertainty.fit_calibration import CalibrationPlan, fit_calibration
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.posterior_calibration import FittedHead, HeadSettings, PosteriorCalibration
from metagmvae.training.trainer.package import LoadedModel

ADAPT = AdaptSettings()
SHAPE = (1, 28, 28)
LABELS = np.array([1, 0, 2, 1, 0, 2, 2])
PLAN = CalibrationPlan((3,), (1, 4), query=5, episodes=20)


class Pixels(torch.nn.Module):
    """An encoder without weights: the mean of 4 x 4 pixels."""

    feature_dim = 49

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 4).flatten(1)


def model(head: str, *tasks: HeadSettings) -> HeadModel:
    return HeadModel(EncoderModel(Pixels(), SHAPE), FittedHead(name=head, tasks=tasks))


def task_features() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    h = rng.normal(size=(3, 49))[np.concatenate([LABELS, np.arange(9) % 3])] + 0.7 * rng.normal(size=(16, 49))
    return torch.as_tensor(h[:7]).float(), torch.as_tensor(h[7:]).float()


def encoder(head: str | None = None) -> LoadedModel:
    return with_head(LoadedModel(EncoderModel(Pixels(), SHAPE), Settings(name="pixels"), SHAPE, {}), head)


@pytest.mark.parametrize("head", HEADS)
def test_log_posteriors_are_those_of_the_head_with_the_settings_of_the_nearest_task(head: str) -> None:
    settings = {key: values[-1] for key, values in HEADS[head].grid.items()}
    far, near = HeadSettings(way=20, shot=9, settings={}), HeadSettings(way=3, shot=2, settings=settings)
    support, query = task_features()
    log_p = model(head, far, near).log_posteriors(
        ADAPT,
        torch.stack([support, support + 1]),
        torch.as_tensor(LABELS),
        torch.stack([query, query + 1]),
        mode="transductive",
        seed_by_episode=[0, 1],
    )
    assert (log_p.shape, log_p.dtype) == ((2, 9, 3), torch.float64)
    for episode, shift in enumerate((0, 1)):
        logits = head_logits(head, settings, support + shift, LABELS, query + shift).numpy()
        np.testing.assert_allclose(log_p[episode], log_softmax(logits, axis=1), atol=1e-6)
    assert near.settings == {} or not np.allclose(
        log_p[0], log_softmax(head_logits(head, {}, support, LABELS, query).numpy(), axis=1)
    )


@pytest.mark.parametrize("head", [head for head in HEADS if head != "optimal-transport"])
def test_a_high_level_makes_queries_unknown_and_a_low_one_changes_nothing(head: str) -> None:
    support, query = task_features()
    net, labels = model(head), torch.as_tensor(LABELS)
    assert net.has_background
    options = {"mode": "transductive", "seed_by_episode": [0]}
    plain = net.log_posteriors(ADAPT, support[None], labels, query[None], **options)[0]
    low, high = (
        net.log_posteriors(ADAPT, support[None], labels, query[None], background=level, **options)[0]
        for level in (-1e4, 1e4)
    )
    np.testing.assert_allclose(low[:, :3], plain, atol=1e-5)
    assert low[:, 3].max() < -1000
    np.testing.assert_allclose(high[:, 3], 0, atol=1e-6)


def test_far_queries_are_less_known_than_near_ones() -> None:
    """The level separates a query in no direction of a class for logistic regression, whose probabilities do not."""
    support = torch.eye(4)[[0, 0, 1, 1, 2, 2]] + 0.01 * torch.arange(6)[:, None]
    query = torch.eye(4)[[0, 1, 2, 3]]
    logits = head_logits("logistic-regression", {"strength": 100.0}, support, np.array([0, 0, 1, 1, 2, 2]), query)
    assert torch.logsumexp(logits, dim=1).argmin() == 3


def test_an_inductive_head_answers_each_query_as_alone_and_a_transductive_one_refuses() -> None:
    support, query = task_features()
    for head in ("nearest-mean", "logistic-regression"):
        net = model(head)
        together = predict_queries(net, ADAPT, support, LABELS, query, mode=answer_mode(net, "transductive"))
        alone = [predict_queries(net, ADAPT, support, LABELS, q[None], mode="inductive")[0] for q in query]
        np.testing.assert_allclose(together, torch.stack(alone), atol=1e-5)
    for head in ("soft-k-means", "optimal-transport", "laplacian", "em"):
        with pytest.raises(DataError, match=f"the head {head} classifies queries together"):
            predict_queries(model(head), ADAPT, support, LABELS, query, mode="inductive")


def test_not_a_number_and_too_few_queries_are_refused() -> None:
    support, query = task_features()
    with pytest.raises(DataError, match="features that are not finite"):
        predict_queries(model("nearest-mean"), ADAPT, support * torch.nan, LABELS, query)
    with pytest.raises(DataError, match="2 are fewer than the 3 classes"):
        predict_queries(model("optimal-transport"), ADAPT, support, LABELS, query[:2])


def test_settings_are_the_best_on_validation_episodes() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(6), 12)
    h_nF = torch.as_tensor(rng.normal(size=(6, 5))[labels] + 0.9 * rng.normal(size=(72, 5))).float()
    fitted = fit_head(model("soft-k-means"), SplitFeatures("validation", labels, {"scaled": h_nF}), [(4, 2, 6)], seed=5)
    task = {"way": 4, "shot": 2, "query": 6, "episodes": 300, "seed": 5 + SEED_OFFSET}
    temperatures = soft_k_means.grid["temperature"]
    accuracies = [soft_k_means(h_nF, labels, temperature=t, **task).mean for t in temperatures]
    assert fitted.settings(4, 2) == {"temperature": temperatures[int(np.argmax(accuracies))]}


@pytest.mark.parametrize("head", ["nearest-mean", "em"])
def test_calibration_of_a_head(head: str, dataset: Dataset) -> None:
    loaded = encoder(head)
    record = fit_calibration(loaded, dataset, PLAN, device=torch.device("cpu"))
    assert [(fit.way, fit.shot, fit.mode) for fit in record.temperatures] == [
        (3, shot, loaded.model.modes[0]) for shot in (1, 4)
    ]
    assert all(fit.nll <= fit.nll_uncalibrated for fit in record.temperatures)
    assert any(abs(fit.temperature - 1) > 0.05 for fit in record.temperatures)
    assert len(record.backgrounds) == 2
    assert max(fit.accuracy for fit in record.backgrounds) > 0.5, "half of the queries are unknown"
    assert record.head.name == head
    assert [bool(task.settings) for task in record.head.tasks] == [head == "em"] * 2


def test_the_equal_marginals_of_optimal_transport_leave_no_room_for_unknown_queries(dataset: Dataset) -> None:
    record = fit_calibration(encoder("optimal-transport"), dataset, PLAN, device=torch.device("cpu"))
    assert record.backgrounds == ()
    assert len(record.temperatures) == 2


def test_a_calibration_holds_for_its_head_only_and_old_ones_are_read(dataset: Dataset) -> None:
    loaded = encoder("em")
    record = fit_calibration(loaded, dataset, PLAN, device=torch.device("cpu"))
    plain = replace(loaded, model=EncoderModel(Pixels(), SHAPE), calibration=record)
    same, other = with_head(plain), with_head(plain, "nearest-mean")
    assert (same.model.head, same.calibration) == (record.head, record)
    assert (other.model.head, other.calibration) == (FittedHead(name="nearest-mean"), None)
    assert with_named_head(plain, None, "x") is plain
    named = with_head(with_named_head(plain, "laplacian", "x"))
    assert (named.model.head.name, named.calibration) == ("laplacian", None)
    old = json.loads(record.model_dump_json())
    del old["head"]
    assert PosteriorCalibration.model_validate_json(json.dumps(old)).head is None
    assert PosteriorCalibration.model_validate_json(record.model_dump_json()) == record


def test_wrong_heads_are_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"head 'emm': there is none of this name; give one of nearest-mean, "):
        encoder("emm")
    with pytest.raises(DataError, match="head em: is for an encoder alone, and x is not one"):
        with_named_head(encoder("em"), "em", "x")
