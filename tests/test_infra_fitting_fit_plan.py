"""What `metagmvae fit` finds and decides, the budget, and the numbers of steps."""

import numpy as np
import pytest
from PIL import Image

from metagmvae.configs.load import load_settings
from metagmvae.infra.fitting.fit_plan import (
    episode_sizes,
    format_seconds,
    parse_budget,
)
from metagmvae.infra.fitting.fit_schedule import VIEWS, FitSchedule, affordable_average, sizes_for
from metagmvae.infra.fitting.make_plan import held_out_classes, make_plan
from metagmvae.infra.runs.training_speed import Speed, measure_episode_s
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.glyphs import open_glyphs


def photos(root, classes, images, flat=False):
    rng = np.random.default_rng(0)
    for k in range(classes):
        for number in range(images):
            path = root / (f"{k}-{number}.png" if flat else f"c{k:02d}/{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((40, 40), Image.Resampling.BICUBIC).save(path)
    return root


def plan(root, labelled=None, **options):
    return make_plan(root, labelled, 60.0, 0, **{"unlabelled": False} | options)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1h", 3600), ("1h30m", 5400), ("1.5m", 90), (" 2M ", 120)]
)
def test_a_budget_is_a_time(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "-5m", "0s", "8000h", "1e3s", "nan", "infs", "5 parsecs", "5m\n6"])
def test_anything_else_is_refused(text):
    with pytest.raises(DataError, match="--budget") as caught:
        parse_budget(text)
    assert "\n" not in str(caught.value)


def test_times_for_people():
    assert [format_seconds(s) for s in (45, 119, 1200, 9000)] == ["45 s", "119 s", "20 min", "2 h 30 min"]


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [
        ([600] * 20, (5, 5)),
        ([20] * 1623, (325, 325)),
        ([30] * 12, (3, 3)),
        ([30] * 6, (2, 2)),
        ([30] * 5, (0, 0)),  # too few classes
        ([5] * 6, (0, 0)),  # 10 images would be left to train on
        ([1] * 100, (0, 0)),  # no episode has one image per class
        ([8] * 40, (5, 5)),
        ([], (0, 0)),
    ],
)
def test_the_number_of_held_out_classes(sizes, held_out):
    assert held_out_classes(sizes) == held_out


@pytest.mark.parametrize(
    ("sizes", "task"),
    [([600] * 5, (5, [1, 5], 15)), ([12, 30], (2, [1, 5], 7)), ([3, 9, 9], (3, [1], 2)), ([2, 2], (2, [1], 1))],
)
def test_episodes_fit_the_smallest_class(sizes, task):
    assert episode_sizes([[1] * size for size in sizes]) == task
    way, shots, query = task
    assert max(shots) + query <= min(sizes)
    assert way <= len(sizes)


def test_photographs_in_class_folders(tmp_path):
    found = plan(photos(tmp_path / "in", 8, 12))
    assert (found.images, found.classes, found.channels, found.size) == (96, 8, 3, 40)
    assert (found.preset, found.invert, found.data_channels) == ("photos-cpu", False, 3)
    assert (found.validation_classes, found.test_classes) == (2, 2)
    assert "8 class folders" in found.found[0]
    assert "2 classes are held out for validation and 2 for test" in found.will_do[1]


def test_folders_can_be_ignored_and_a_flat_folder_has_no_classes(tmp_path):
    for found in (
        plan(photos(tmp_path / "in", 8, 12), unlabelled=True),
        plan(photos(tmp_path / "flat", 8, 12, flat=True)),
        plan(photos(tmp_path / "one", 1, 40)),
    ):
        assert (found.classes, found.validation_classes, found.test_classes) == (0, 0, 0)
        assert "augmented views" in found.will_do[1]


def test_folders_of_the_splits_are_kept(tmp_path):
    for split, classes in (("train", "abcd"), ("test", "ef")):
        for name in classes:
            photos(tmp_path / split / name, 1, 8, flat=True)
    found = plan(tmp_path)
    assert found.split_folders
    assert (found.classes, found.validation_classes, found.test_classes) == (6, 0, 0)


def test_dark_drawings_are_inverted_and_grey(tmp_path):
    source = open_glyphs(classes=(1, 0, 0), drawings=40)
    for number, pixels in enumerate(source.load_block("train", range(40))[:, 0]):
        red = np.stack([255 - pixels // 8, 255 - pixels, 255 - pixels], axis=2)
        Image.fromarray(red).save(tmp_path / f"{number}.png")
    found = plan(tmp_path)
    assert (found.preset, found.strokes, found.invert, found.size) == ("strokes-cpu", True, True, 28)
    assert (found.channels, found.data_channels) == (3, 1)


def test_too_few_images(tmp_path):
    with pytest.raises(DataError, match="has 31 images, but at least 32"):
        plan(photos(tmp_path, 1, 31))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "no such folder or archive"),
        (("1.png", "2.png"), "two or more class folders"),
        (("a/1.png", "a/2.png"), "two or more class folders"),
        (("a/1.png", "a/2.png", "b/1.png"), "class b has 1 image"),
        (("train/a/1.png", "test/b/1.png"), "two or more class folders"),
    ],
)
def test_labelled_pictures_are_checked(tmp_path, files, words):
    for name in files:
        (tmp_path / "labelled" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30), (9, 9, 200)).save(tmp_path / "labelled" / name)
    with pytest.raises(DataError, match=words):
        plan(photos(tmp_path / "in", 4, 10), tmp_path / "labelled")


def test_sizes_for_few_images():
    settings = load_settings("strokes-cpu")
    assert sizes_for(settings, 100_000) == (256, 300, 20)
    assert sizes_for(settings, 60) == (30, 60, 12)
    assert sizes_for(settings, 4) == (2, 4, 1)
    with pytest.raises(DataError, match="at least 4"):
        sizes_for(settings, 3)


def schedule(**changes):
    values = {
        "device": "cpu",
        "threads": 2,
        "pretrain_step_s": 0.1,
        "meta_step_s": 0.1,
        "encode_s": 0.001,
        "used_s": 10.0,
        "reserved_s": 100.0,
        "pretrain_steps": 1000,
        "pretrain_batch": 256,
        "meta_steps": 100,
        "set_size": 300,
        "components": 20,
        "average": "crops",
        "checkpoint_every": 100,
        "episodes": 600,
        "fits": True,
    }
    return FitSchedule(**values | changes)


def test_episodes_follow_the_time_that_is_left():
    assert schedule().affordable_episodes(left_s=68.0, episode_s=0.2) == 600
    assert schedule().affordable_episodes(left_s=48.0, episode_s=0.2) == 200
    assert schedule().affordable_episodes(left_s=48.0, episode_s=0.1) == 600
    assert schedule().affordable_episodes(left_s=-5.0, episode_s=0.2) == 100
    assert schedule(episodes=50).affordable_episodes(left_s=1e6, episode_s=0.2) == 50


def test_the_speed_of_the_baselines_is_measured():
    assert 0 < measure_episode_s(2, 1, 2) < 60


def test_the_overrides_are_settings():
    settings = load_settings("photos-cpu", schedule().overrides)
    assert (settings.pretrain.steps, settings.train.steps, settings.train.components) == (1000, 100, 20)


@pytest.mark.parametrize(
    ("average", "seconds", "expected"),
    [
        ("crops", 12.0, ("crops", 12.0)),
        ("crops", 11.0, ("mirror", 2.0)),  # and not the views for strokes
        ("crops", 1.5, ("none", 1.0)),
        ("affine", 5.0, ("affine", 5.0)),
        ("affine", 4.0, ("none", 1.0)),  # strokes have no mirror image of the same class
        ("none", 0.1, ("none", 1.0)),
    ],
)
def test_fewer_views_are_averaged_where_time_is_short(average, seconds, expected):
    """The views of the settings take as many seconds as they are."""
    settings = load_settings("photos-cpu", [f"model.average={average}"])
    speed = Speed("cpu", 1.0, 1.0, float(VIEWS[average]))
    assert affordable_average(settings, speed, seconds) == expected


@pytest.mark.parametrize(
    ("classes", "task"),
    [
        ([[20, 20], [40, 3]], (2, [1], 15)),  # 5 labelled images of the second class leave 3 queries
        ([[20, 20], [8, 12]], (2, [1, 5], 12)),  # those of the group of 8
        ([[2, 2], [1, 1, 1]], (2, [1], 2)),
    ],
)
def test_episodes_fit_the_groups_of_each_class(classes, task):
    assert episode_sizes(classes) == task
