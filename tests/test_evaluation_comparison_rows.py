"""Rows of a comparison: marks, differing settings, means over trainings, paired differences; rows of the paper."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from metagmvae.evaluation.comparison.paper import PUBLISHED, published_rows
from metagmvae.evaluation.comparison.rows import (
    ComparisonError,
    EvalProtocol,
    Row,
    Score,
    add_training_means,
    check_comparable,
    decisive_settings,
    differing_settings,
    mark_rows,
)
from metagmvae.evaluation.comparison.table import compare
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.pipelines.records import DataError

TEST = EvalProtocol("transductive", "test", "f" * 64, 15, 50, 0)


def row(name: str, shift: float = 0.0, protocol: EvalProtocol = TEST, noise: int = 0, **settings: object) -> Row:
    hard = np.random.default_rng(0).uniform(0.3, 0.8, 50)  # the same episodes for all rows
    each = EpisodeResults(
        5, 1, 15, 0, "transductive", hard + shift + np.random.default_rng(noise).normal(0, 0.01, 50), 1.0
    )
    known = {"train.steps": 40, "train.seed": noise} | settings
    return Row(name, "run", name, protocol, {(5, 1): Score(each.mean, each.ci95, each)}, 10.0, 40, known)


def test_pretraining_settings_are_left_out_without_pretraining():
    tree = {"name": "a", "train": {"steps": 3, "log_every": 1}, "pretrain": {"steps": 0, "temperature": 0.1}}
    assert decisive_settings(tree) == {"train.steps": 3, "pretrain.steps": 0}
    tree["pretrain"]["steps"] = 5
    assert decisive_settings(tree) == {"train.steps": 3, "pretrain.steps": 5, "pretrain.temperature": 0.1}


def test_rows_of_other_protocols_are_marked_with_their_differences():
    other = replace(TEST, split="validation", mode="inductive")
    paper = replace(row("paper"), kind="published", protocol=replace(TEST, data="their own", seed=None))
    rows = [paper, row("a"), row("b"), row("c", protocol=other), row("d", protocol=replace(TEST, data="e" * 64))]
    marks, meaning = mark_rows(rows)
    # The reference is the first row that is not of the paper.
    assert marks == ["a", "", "", "b", "c"]
    assert meaning["a"] == "data their own, not ffffffff; seed unrecorded, not 0"
    assert meaning["b"] == "mode inductive, not transductive; split validation, not test"
    assert meaning["c"] == "data eeeeeeee, not ffffffff"
    check_comparable([paper, row("a"), row("b")])
    with pytest.raises(ComparisonError, match=r"c was not evaluated like a .*split validation, not test"):
        check_comparable(rows)


def test_more_protocols_than_letters_have_distinct_marks():
    rows = [row(str(seed), protocol=replace(TEST, seed=seed)) for seed in range(30)]
    marks, meaning = mark_rows(rows)
    assert marks[0] == ""
    assert (marks[26], marks[27]) == ("z", "aa")
    assert len(set(marks)) == len(meaning) + 1 == 30


def test_unrecorded_settings_do_not_differ():
    rows = [row("a"), row("b", **{"train.steps": 80}), row("c", **{"model.width": 8}), replace(row("d"), settings={})]
    assert differing_settings(rows) == {"train.steps": [40, 80, 40, None]}


def test_an_option_that_one_row_lacks_differs():
    rows = [row("a", **{"model.options.depth": 1}), row("b"), replace(row("c"), settings={})]
    assert differing_settings(rows) == {"model.options.depth": [1, None, None]}
    assert differing_settings([rows[0], rows[2]]) == {}


def test_mean_over_trainings_has_a_student_interval():
    members = [row(f"net-seed{seed}", 0.01 * seed, noise=seed) for seed in range(3)]
    rows, notes = add_training_means([*members, row("other")])
    assert [r.name for r in rows] == ["net-seed0", "net-seed1", "net-seed2", "net (3 trainings)", "other"]
    assert notes == []
    values = [m.scores[5, 1].accuracy for m in members]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    score = rows[3].scores[5, 1]
    assert (score.accuracy - score.ci95, score.accuracy + score.ci95) == pytest.approx((low, high))
    assert rows[3].settings["train.seed"] == "0, 1, 2"
    unlike = [members[0], replace(members[1], settings={"train.steps": 80, "train.seed": 1})]
    rows, notes = add_training_means(unlike)
    assert rows == unlike
    assert "other settings differ too (train.steps)" in notes[0]
    apart = [members[0], replace(members[1], protocol=replace(TEST, split="validation"))]
    assert add_training_means(apart) == (apart, [])


def test_pairs_share_episodes_and_seeds():
    slow = [row(f"slow-seed{seed}", 0.0, noise=seed) for seed in range(3)]
    fast = [row(f"fast-seed{seed}", 0.05, noise=seed + 10) for seed in range(2)]
    alone = row("alone", -0.1, noise=7)
    elsewhere = row("elsewhere", protocol=replace(TEST, split="validation"))
    answer = compare([*slow, *fast, alone, elsewhere])
    assert [(c.challenger, c.champion) for c in answer.differences] == [
        ("fast (2 trainings)", "slow (3 trainings)"),
        ("alone", "slow (3 trainings)"),
    ]
    first, second = answer.differences
    assert (first.paired.verdict, second.paired.verdict) == ("better", "worse")
    by_episode = [
        np.mean([r.scores[5, 1].by_episode.accuracies[i] for r in fast])
        - np.mean([r.scores[5, 1].by_episode.accuracies[i] for r in slow])
        for i in range(50)
    ]
    assert first.paired.difference == pytest.approx(np.mean(by_episode))
    assert first.paired.t_test == pytest.approx(stats.ttest_1samp(by_episode, 0).pvalue)
    pairs = [fast[s].scores[5, 1].accuracy - slow[s].scores[5, 1].accuracy for s in range(2)]
    assert first.over_trainings[0] == pytest.approx(np.mean(pairs))
    assert (first.trainings, second.trainings) == (2, 3)
    # Without another model, trainings of the same name are compared with each other.
    only = compare(slow).differences
    assert [(c.challenger, c.champion, c.trainings) for c in only] == [
        ("slow-seed1", "slow-seed0", 0),
        ("slow-seed2", "slow-seed0", 0),
    ]


def test_one_episode_gives_no_paired_difference():
    rows = []
    for name, accuracy in (("a", 0.2), ("b", 0.8)):
        episode = EpisodeResults(5, 1, 15, 0, "transductive", np.array([accuracy]), 1.0)
        rows.append(replace(row(name), scores={(5, 1): Score(accuracy, 0.0, episode)}))
    assert compare(rows).differences == ()


def test_published_rows_are_found_by_name_and_tables_1_and_2_agree():
    table_1 = {r.key: r for r in published_rows("paper:omniglot")}
    assert table_1["meta-gmvae"].percent[20, 1] == 82.21
    assert table_1["meta-gmvae"].ci95[5, 5] == 0.20
    (cross,) = published_rows("paper:omniglot/meta-gmvae-20way-1shot")
    assert cross.percent[20, 1] == table_1["meta-gmvae"].percent[20, 1]
    assert len(cross.percent) == 8
    assert len({r.ref for r in PUBLISHED}) == len(PUBLISHED) == 33
    with pytest.raises(DataError, match="did you mean 'paper:omniglot/umtra'"):
        published_rows("paper:omniglot/umtr")
    with pytest.raises(DataError, match="no such row of the paper"):
        published_rows("paper:nothing")
