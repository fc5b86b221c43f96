"""Labelled images and queries of different groups: the rule by enumeration, and every kind of queries."""

import hashlib
from collections import Counter
from fractions import Fraction
from itertools import chain, combinations, permutations

import numpy as np
import pytest
from scipy import stats

from metagmvae.pipelines.grouped_labels import GroupedLabels, number_groups, one_group_classes
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.episodes import EpisodeSampler, left_out_line
from metagmvae.pipelines.sampling.group_draw import GroupDraw, group_sizes, most_queries
from metagmvae.pipelines.sampling.query_sets import QuerySampler


def grouped(rows):
    """Labels from (class, group) of each row."""
    classes, groups = np.array(rows).T
    return GroupedLabels(classes, groups, [f"class{c}" for c in range(classes.max() + 1)])


def subsets(items):
    return chain.from_iterable(combinations(items, n) for n in range(len(items) + 1))


def can_be_completed(labels, c, closed, shot, query):
    """By trying all sets of groups that contain the closed ones: S images of class c inside, Q outside."""
    open_groups = set(labels.groups[labels.classes == c].tolist()) - closed
    for further in map(set, subsets(sorted(open_groups))):
        inside = sum(g in closed | further for g in labels.groups[labels.classes == c].tolist())
        if inside >= shot and sum(labels.classes == c) - inside >= query:
            return True
    return False


def literal_distribution(labels, way, shot, query):
    """Probability of each (classes, supports) by following the rule of the module image by image; exact."""
    possible = [c for c in np.unique(labels.classes).tolist() if can_be_completed(labels, c, set(), shot, query)]
    found = Counter()

    def continue_with(classes, support, closed, probability):
        k = next((k for k in range(way) if len(support[k]) < shot), None)
        if k is None:
            found[classes, tuple(frozenset(rows) for rows in support)] += probability
            return
        allowed = []
        for row in np.flatnonzero(labels.classes == classes[k]).tolist():
            after = closed | {int(labels.groups[row])}
            if row not in support[k] and (
                after == closed or all(can_be_completed(labels, c, after, shot, query) for c in classes)
            ):
                allowed.append((row, after))
        for row, after in allowed:  # none: the draw is lost, and everything is drawn again
            extended = [*support[:k], [*support[k], row], *support[k + 1 :]]
            continue_with(classes, extended, after, probability / len(allowed))

    orders = list(permutations(possible, way))
    for classes in orders:
        continue_with(classes, [[] for _ in classes], set(), Fraction(1, len(orders)))
    total = sum(found.values())
    return {outcome: probability / total for outcome, probability in found.items()}


CASES = {
    "groups of their class": ([(0, 0), (0, 1), (0, 1), (1, 2), (1, 3), (1, 4), (1, 4)], 2, 1, 1),
    "groups in both classes": ([(0, 0), (0, 1), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 2)], 2, 2, 1),
    "three classes on a path": ([(0, 0), (0, 1), (1, 1), (1, 2), (1, 2), (2, 2), (2, 3)], 2, 1, 1),
    "some draws are lost": ([(0, 0), (0, 1), (1, 2), (1, 3), (2, 1), (2, 2)], 3, 1, 1),
    "a large group that must stay": ([(0, 0)] * 4 + [(0, 1)] * 2 + [(0, 2)] + [(1, 3)] * 3 + [(1, 4)] * 3, 2, 2, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_every_support_has_the_probability_of_the_rule(case):
    rows, way, shot, query = CASES[case]
    labels = grouped(rows)
    expected = literal_distribution(labels, way, shot, query)
    sampler = EpisodeSampler(labels, way=way, shot=shot, query=query, seed=3)
    count = 6000
    drawn = Counter()
    for index in range(count):
        episode = sampler.episode(index)
        supports = tuple(frozenset(rows.tolist()) for rows in episode.support)
        drawn[tuple(episode.classes.tolist()), supports] += 1
    assert drawn.keys() == expected.keys()  # each is reached, and no other
    observed = [drawn[outcome] for outcome in expected]
    assert stats.chisquare(observed, [count * float(p) for p in expected.values()]).pvalue > 1e-3


def test_draws_are_lost_in_the_case_that_is_about_them():
    rows, way, shot, query = CASES["some draws are lost"]
    draw = GroupDraw(grouped(rows), shot=shot, query=query)
    rng = np.random.default_rng(0)
    assert {draw._support(rng, [0, 1, 2], way) is None for _ in range(50)} == {True, False}


@pytest.mark.parametrize("seed", range(60))
def test_no_draw_is_lost_where_classes_share_no_groups(seed):
    rng = np.random.default_rng(seed)
    sizes = [1, 4, 5, 10] if seed == 0 else rng.integers(1, 9, 4).tolist()
    inside = sum(sizes[g] for g in rng.permutation(4)[: rng.integers(1, 4)])
    shot, query = (6, 14) if seed == 0 else (inside, sum(sizes) - inside)  # the tightest numbers of some division
    rows = [(c, 4 * c + g) for c in range(2) for g, size in enumerate(sizes) for _ in range(size)]
    draw = GroupDraw(grouped(rows), shot=shot, query=query)
    assert draw.left_out == []
    assert not any(draw._support(rng, [0, 1], 2) is None for _ in range(20))


def test_queries_are_uniform_among_the_images_of_other_groups():
    labels = grouped([(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (1, 3), (1, 4)])
    sampler = EpisodeSampler(labels, way=2, shot=1, query=1, seed=0)
    drawn = Counter()
    for index in range(6000):
        episode = sampler.episode(index)
        k = episode.classes.tolist().index(0)
        drawn[int(episode.support[k, 0]), int(episode.query[k, 0])] += 1
    pairs = {(s, q): 1 / 5 for s in range(5) for q in range(5) if labels.groups[s] != labels.groups[q]}
    expected = {pair: p / sum(other[0] == pair[0] for other in pairs) for pair, p in pairs.items()}
    assert drawn.keys() == expected.keys()
    observed = [drawn[pair] for pair in expected]
    assert stats.chisquare(observed, [6000 * p for p in expected.values()]).pvalue > 1e-3


def test_a_group_for_each_image_gives_the_episodes_of_a_dataset_without_groups():
    classes = [0] * 4 + [1] * 5
    labels = grouped(list(zip(classes, range(9), strict=True)))
    expected = literal_distribution(labels, 2, 2, 2)
    assert set(expected.values()) == {Fraction(1, 2 * 6 * 10)}  # two orders, C(4, 2) and C(5, 2) supports


def random_labels(rng):
    """Some classes of some groups, shared by classes in part."""
    number = int(rng.integers(3, 7))
    shared = [[(c, int(g)) for g in rng.integers(0, 6, 14)] for c in range(number)]
    own = [[(c, 6 + 3 * c + int(g)) for g in rng.integers(0, 3, 14)] for c in range(number)]
    return grouped([row for c in range(number) for row in (shared, own)[c % 2][c]])


@pytest.mark.parametrize("kind", [{}, {"unbalanced": True}, {"dirichlet": 0.5}, {"open_classes": 1}])
@pytest.mark.parametrize("seed", range(6))
def test_no_group_has_labelled_images_and_queries(kind, seed):
    labels = random_labels(np.random.default_rng(seed))
    sampler = QuerySampler(labels, way=2, shot=2, query=3, seed=seed, **kind)
    assert sampler.episodes.groups == "apart"
    support_EKS, query_EP, truth_EP = sampler.batch(0, 40)
    for support_KS, query_P, truth_P in zip(support_EKS, query_EP, truth_EP, strict=True):
        assert not set(labels.groups[support_KS.ravel()]) & set(labels.groups[query_P])
        classes_K = labels.classes[support_KS[:, 0]]
        assert (labels.classes[support_KS] == classes_K[:, None]).all()
        assert len(set(support_KS.ravel())) == 4
        assert len(set(query_P)) == len(query_P) == sampler.queries
        known = truth_P < 2
        assert (labels.classes[query_P[known]] == classes_K[truth_P[known]]).all()
        assert not np.isin(labels.classes[query_P[~known]], classes_K).any()
    again = QuerySampler(labels, way=2, shot=2, query=3, seed=seed, **kind).batch(17, 1)
    assert all(np.array_equal(a[0], b[17]) for a, b in zip(again, (support_EKS, query_EP, truth_EP), strict=True))


def test_mixed_groups_are_the_episodes_of_the_classes_alone():
    labels = random_labels(np.random.default_rng(0))
    mixed = QuerySampler(labels, way=2, shot=2, query=3, seed=1, mix_groups=True)
    plain = QuerySampler(labels.classes, way=2, shot=2, query=3, seed=1)
    assert (mixed.episodes.groups, plain.episodes.groups) == ("mixed", None)
    assert all(map(np.array_equal, mixed.batch(0, 20), plain.batch(0, 20)))


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ({}, "c9cbcbe8ed03439e"),
        ({"dirichlet": 0.5}, "05ebad1248595057"),
        ({"open_classes": 2}, "3c76230841d16038"),
        ({"dirichlet": 2.0, "open_classes": 1}, "acc258b957b2ae65"),
    ],
)
def test_episodes_without_groups_stay_what_they_were(kind, digest):
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(9), 25))
    drawn = QuerySampler(labels, way=5, shot=3, query=7, seed=11, **kind).batch(0, 30)
    content = b"".join(np.ascontiguousarray(part, np.int64).tobytes() for part in drawn)
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_classes_whose_groups_do_not_suffice_are_left_out_by_name():
    rows = [(c, 2 * c + n % 2) for c in range(3) for n in range(8)] + [(3, 9)] * 8 + [(4, 10)] * 6 + [(4, 11)] * 2
    sampler = EpisodeSampler(grouped(rows), way=3, shot=2, query=4, seed=0)
    assert sampler.left_out == ("class3",)
    assert {int(c) for i in range(30) for c in sampler.episode(i).classes} == {0, 1, 2, 4}
    sampler = EpisodeSampler(grouped(rows), way=3, shot=3, query=4, seed=0)
    assert sampler.left_out == ("class3", "class4")  # 2 of one group are no 3 shots, and 6 leave only 2 queries
    assert {int(c) for i in range(30) for c in sampler.episode(i).classes} == {0, 1, 2}
    assert left_out_line("evaluation", 3, 4, sampler.left_out) == (
        "evaluation with 3 shots leaves out classes without 3 labelled and 4 other images of different groups: class3, "
        "class4"
    )
    small = [*rows, (5, 12)]  # of one image: left out too, but a small class of several groups is refused
    assert EpisodeSampler(grouped(small), way=3, shot=2, query=4, seed=0).left_out == ("class3", "class5")
    with pytest.raises(DataError, match="shot 2 and query 4 need 6 images per class, but class class5 has 2; lower"):
        EpisodeSampler(grouped([*small, (5, 13)]), way=3, shot=2, query=4, seed=0)
    with pytest.raises(DataError, match=r"way 4 exceeds the 3 classes .* 3 labelled and 4 other .*not class3, class4"):
        EpisodeSampler(grouped(rows), way=4, shot=3, query=4, seed=0)


def test_what_cannot_be_drawn_is_one_line():
    three = grouped([(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 0)])  # two sides cannot divide three pairs
    sampler = EpisodeSampler(three, way=3, shot=1, query=1, seed=0)
    with pytest.raises(DataError, match=r"1,000 draws gave no episode .* share the 3 groups of the split; lower one"):
        sampler.episode(0)
    assert EpisodeSampler(three, way=2, shot=1, query=1, seed=0).episode(0).support.shape == (2, 1)
    with pytest.raises(DataError, match="mix_groups: the dataset has no groups; omit this option"):
        EpisodeSampler(three.classes, way=2, shot=1, query=1, seed=0, mix_groups=True)


@pytest.mark.parametrize("seed", range(40))
def test_the_most_queries_by_trying_all_sets_of_groups(seed):
    rng = np.random.default_rng(seed)
    sizes, shot = rng.integers(1, 8, rng.integers(1, 7)).tolist(), int(rng.integers(1, 9))
    rests = [sum(sizes) - sum(inside) for inside in subsets(sizes) if sum(inside) >= shot]
    assert most_queries(sizes, shot) == max(rests, default=-1)
    rows = [(0, g) for g, size in enumerate(sizes) for _ in range(size)]
    for query in (1, max(rests, default=0), max(rests, default=0) + 1):
        possible = bool(rests) and query <= max(rests)
        assert (GroupDraw(grouped(rows), shot=shot, query=query).left_out == []) == possible


def test_group_sizes_leave_out_classes_of_one_group():
    labels = grouped([(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (2, 0), (2, 2)])
    assert group_sizes(labels) == {0: [2, 1], 2: [1, 1]}
    assert group_sizes(labels.classes) == {0: [1, 1, 1], 1: [1, 1], 2: [1, 1]}
    assert number_groups(["p", "q", "p", "a"]) == [0, 1, 0, 2]
    splits, names = ["train", "test", "test", "test"], ["a", "a", "a", "b"]
    assert one_group_classes(splits, names, ["1", "2", "3", "4"]) == "b (test)"
