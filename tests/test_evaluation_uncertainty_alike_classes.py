"""Classes that cannot be told apart: constructed glyphs of known symmetry, the randomisation test, the oracles."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from metagmvae.evaluation.uncertainty.alike_classes import (
    AlikePair,
    alike_groups,
    ceiling_accuracies,
    check_enough_images,
    class_scores,
    drawing_names,
    equal_distribution_p,
    expected_ceiling,
    find_alike,
)
from metagmvae.pipelines.records import DataError

SIDE, DRAWINGS = 9, 12


def glyph(lines: list[tuple[int, int]]) -> np.ndarray:
    image = np.zeros((SIDE, SIDE))
    for row, column in lines:
        image[row, column] = 1
    return image


RING = glyph([(r, c) for r in range(2, 7) for c in range(2, 7) if max(abs(r - 4), abs(c - 4)) == 2])
BAR = glyph([(4, c) for c in range(1, 8)])
LETTER_L = glyph([(r, 2) for r in range(1, 8)] + [(7, c) for c in range(2, 6)])


def rotated_set(characters: dict[str, np.ndarray]) -> tuple[torch.Tensor, np.ndarray, list[str], list[str]]:
    """Noisy drawings in four rotations: pixels, class ids, names of the drawings and of the classes."""
    rng, x, labels, keys, classes = np.random.default_rng(0), [], [], [], []
    for name, image in characters.items():
        drawn = image + 0.3 * rng.normal(size=(DRAWINGS, SIDE, SIDE))
        for turns in range(4):
            classes.append(f"{name}@{90 * turns:03d}")
            x += list(np.rot90(drawn, turns, axes=(1, 2)).reshape(DRAWINGS, -1))
            labels += [len(classes) - 1] * DRAWINGS
            keys += [f"{name}/{i}.png@{90 * turns:03d}" for i in range(DRAWINGS)]
    order = np.random.default_rng(1).permutation(len(x))
    names = drawing_names([keys[i] for i in order])
    return torch.tensor(np.array(x)[order], dtype=torch.float32), np.array(labels)[order], names, classes


def test_glyphs_of_known_symmetry():
    """A ring is the same in four rotations, a bar in two, an L in one; a second bar looks like the first."""
    x, labels, drawings, classes = rotated_set({"ring": RING, "bar": BAR, "bar2": BAR, "l": LETTER_L})
    scores = class_scores(x, labels, drawings)
    pairs = find_alike(x, labels, drawings, scores)
    group = alike_groups(len(classes), pairs)
    found = {frozenset(classes[i] for i in np.flatnonzero(group == g)) for g in np.unique(group)}
    bars = [frozenset(f"{name}@{a:03d}" for name in ("bar", "bar2") for a in pair) for pair in ((0, 180), (90, 270))]
    rings = frozenset(f"ring@{a:03d}" for a in (0, 90, 180, 270))
    assert found == {rings, *bars, *(frozenset([f"l@{a:03d}"]) for a in (0, 90, 180, 270))}
    assert all(pair.p > 0.05 and pair.correct <= 0.9 for pair in pairs)
    for pair in pairs:
        images = np.flatnonzero(np.isin(labels, (pair.first, pair.second)))
        other = pair.first + pair.second - labels
        assert pair.correct == pytest.approx(
            np.mean([float(scores[i, labels[i]] > scores[i, other[i]]) for i in images])
        )


def test_scores_leave_the_drawing_out():
    x, labels, drawings, classes = rotated_set({"bar": BAR, "l": LETTER_L})
    scores, unit = class_scores(x, labels, drawings), F.normalize(x, dim=1)
    for i in range(0, len(x), 7):
        for c in range(len(classes)):
            others = [j for j in range(len(x)) if labels[j] == c and drawings[j] != drawings[i]]
            expected = F.normalize(unit[others].sum(dim=0), dim=0) @ unit[i]
            torch.testing.assert_close(scores[i, c], expected)


@pytest.mark.parametrize("in_pairs", [True, False])
def test_p_values_are_uniform_for_equal_distributions_and_small_for_others(in_pairs: bool):
    rng, same, other = np.random.default_rng(0), [], []
    for trial in range(60):
        x, y = torch.tensor(rng.normal(size=(2, 10, 3)))
        same.append(equal_distribution_p(x, y, in_pairs, (trial,)))
        other.append(equal_distribution_p(x, y + 2, in_pairs, (trial,)))
    assert 0.35 < np.mean(same) < 0.65
    assert np.mean(np.array(same) <= 0.2) < 0.4
    assert max(other) <= 0.05


def test_spread_alone_tells_classes_apart():
    """Equal means, different variances: no nearest mean sees it, the discrepancy does."""
    rng = np.random.default_rng(0)
    x, y = torch.tensor(rng.normal(size=(30, 3))), torch.tensor(5 * rng.normal(size=(30, 3)))
    assert equal_distribution_p(x, y, False, (0,)) < 0.01


def test_p_value_against_a_literal_loop():
    """All exchanges of pairs of four points each, enumerated, against the random ones."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(4, 2)), rng.normal(size=(4, 2)) + 0.7
    points = np.concatenate([x, y])
    squared = ((points[:, None] - points) ** 2).sum(axis=2)
    width = np.sort(squared[~np.eye(8, dtype=bool)])[27]  # the lower median of 56 values, as torch.median

    def discrepancy(first: list[int], second: list[int]) -> float:
        k = np.exp(-squared / (2 * width))
        within = [np.mean([k[i, j] for i in part for j in part if i != j]) for part in (first, second)]
        return sum(within) - 2 * np.mean([k[i, j] for i in first for j in second])

    observed, count = discrepancy([0, 1, 2, 3], [4, 5, 6, 7]), 0
    for flips in range(16):
        first = [i + 4 * (flips >> i & 1) for i in range(4)]
        count += discrepancy(first, [i for i in range(8) if i not in first]) >= observed - 1e-12
    p = equal_distribution_p(torch.tensor(x), torch.tensor(y), True, (0,))
    assert p == pytest.approx(count / 16, abs=0.04)


def test_ceiling_of_the_guessing_oracle():
    """Its mean over all episodes is the enumerated one, and that over many drawn episodes is near it."""
    groups = alike_groups(6, [AlikePair(0, 1, 0.5, 1.0), AlikePair(1, 4, 0.5, 1.0), AlikePair(2, 3, 0.5, 1.0)])
    assert len(set(groups[[0, 1, 4]])) == 1
    assert groups[2] == groups[3]
    assert len(set(groups)) == 3
    episodes = [len({groups[c] for c in classes}) / 3 for classes in combinations(range(6), 3)]
    assert expected_ceiling(groups, 3) == pytest.approx(np.mean(episodes))
    labels = np.repeat(np.arange(6), 4)
    task = {"way": 3, "shot": 1, "query": 2, "episodes": 400, "seed": 0}
    right = torch.nn.functional.one_hot(torch.tensor(labels)).float()
    guess, nearest = ceiling_accuracies(labels, groups, right, task)
    assert guess.mean() == pytest.approx(np.mean(episodes), abs=0.03)
    assert (nearest == 1).all()
    assert (ceiling_accuracies(labels, groups, -right, task)[1] == 0).all()


def test_names_of_drawings():
    assert drawing_names(["a/1.png@090", "a/1.png@000", "b@45", "me@home"]) == ["a/1.png", "a/1.png", "b@45", "me@home"]


def test_a_class_of_one_image_is_refused():
    with pytest.raises(DataError, match="class 1 has one image"):
        check_enough_images(np.array([0, 0, 1, 2, 2]))


def test_numbers_in_the_guide_are_those_of_the_recorded_file():
    folder = Path(__file__).parents[1] / "evaluation" / "results"
    found, text = json.loads((folder / "ceiling-omniglot.json").read_text()), (folder / "omniglot.md").read_text()
    text = " ".join(text[text.index("## The ceiling") : text.index("## Unbalanced")].split())
    for part in (
        f"Of the {found['classes']:,} rotated classes (323 characters) {found['alike_classes']} are alike",
        f"in {found['alike_pairs']} pairs. {found['rotation_pairs']} pairs are rotations of one character",
        f"{found['alike_pairs'] - found['rotation_pairs']} pairs are different characters",
    ):
        assert part in text
    assert [(row["way"], row["shot"]) for row in found["rows"]] == [(5, 1), (5, 5), (20, 1), (20, 5)]
    oracle, expected, nearest = (
        [f"{100 * row[key]:.2f}" for row in found["rows"]] for key in ("oracle", "expected", "all_images_labelled")
    )
    assert f"{oracle[0]}% at (5,1) and (5,5) and {oracle[2]}% at (20,1) and (20,5)" in text
    assert oracle[::2] == oracle[1::2]
    assert f"means are {expected[0]}% and {expected[2]}%" in text
    assert f"{', '.join(nearest[:3])} and {nearest[3]}%" in text
