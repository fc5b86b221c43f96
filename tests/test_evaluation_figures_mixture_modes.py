"""Mixture modes follow EM, and each figure shows its arguments."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from metagmvae.configs.schema import AdaptSettings, ModelSettings, TrainSettings
from metagmvae.evaluation.figures import plots
from metagmvae.evaluation.figures.mixture_modes import MixtureMode, ModeFinder
from metagmvae.training.methods.frozen_features import fit_feature_scaling
from metagmvae.training.trainer.builders import build_model

SHAPE = (1, 28, 28)
PIXELS = ModelSettings(channels=8, width=32, latent=6)


def glyph_like(count: int, seed: int = 0) -> np.ndarray:
    """Images of three classes (row % 3) that any encoder separates: a bar on the left, in the middle, on the right."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 30, (count, *SHAPE), dtype=np.uint8)
    for row in range(count):
        images[row, :, 4:24, 3 + 8 * (row % 3) : 7 + 8 * (row % 3)] = 255
    return images


def row_of(image: np.ndarray, among: np.ndarray) -> int:
    (rows,) = np.nonzero((among == image).all(axis=(1, 2, 3)))
    assert len(rows) == 1
    return int(rows[0])


@pytest.mark.parametrize("reconstruct", ["pixels", "features"])
def test_test_modes_assign_each_query_once_and_to_its_class(reconstruct):
    model = build_model(PIXELS.model_copy(update={"reconstruct": reconstruct}), SHAPE, 0)
    images = glyph_like(33)
    if reconstruct == "features":
        with torch.no_grad():
            model.eval()
            fit_feature_scaling(model, model.encoder(model.scale_images(torch.as_tensor(images))).numpy())
    support, query = images[:3, None], images[3:]
    finder = ModeFinder(model, images, shown=30)
    modes = finder.test_modes(support, query, AdaptSettings(samples=4, iterations=3, e_step="identity"))
    assert [np.array_equal(mode.support, support[k]) for k, mode in enumerate(modes)] == [True] * 3
    rows = sorted(row_of(image, query) for mode in modes for image in mode.obtained)
    assert rows == list(range(30))
    if reconstruct == "features":
        for mode in modes:
            assert all(row_of(image, images) >= 0 for image in mode.generated)
        for k, mode in enumerate(modes):
            classes = [row_of(image, query) % 3 for image in mode.obtained]
            assert classes.count(k) > len(classes) / 2
    else:
        assert all(mode.generated.shape == (30, *SHAPE) for mode in modes)
        assert all(mode.generated.min() >= 0 and mode.generated.max() <= 1 for mode in modes)


def test_training_modes_assign_each_image_once_and_are_sorted_by_size():
    model = build_model(PIXELS, SHAPE, 0)
    images = glyph_like(24)
    train = TrainSettings(set_size=24, samples=4, components=4, em_iterations=5)
    modes = ModeFinder(model, images, shown=24).training_modes(images, train)
    assert sorted(row_of(image, images) for mode in modes for image in mode.obtained) == list(range(24))
    sizes = [len(mode.obtained) for mode in modes]
    assert sizes == sorted(sizes, reverse=True)
    again = ModeFinder(model, images, shown=24).training_modes(images, train)
    assert all(np.array_equal(a.generated, b.generated) for a, b in zip(modes, again, strict=True))


@pytest.mark.parametrize("negative", [False, True])
def test_mode_grid_places_each_image(tmp_path, negative):
    """Images of negatives are shown as they were before; missing ones are white."""
    white, black = (np.full(SHAPE, 255 * (bright != negative), np.uint8) for bright in (True, False))
    modes = [
        MixtureMode(black[None], np.stack([white, black]), np.stack([black / 255.0])),
        MixtureMode(white[None], np.stack([black]), np.stack([white / 255.0])),
    ]
    figure = plots.mode_grids([("title", modes)], "generated", negative=negative)
    assert [axes.get_title() for axes in figure.axes] == ["support", "obtained by EM", "generated"]
    obtained = figure.axes[1].images[0].get_array()
    step = 28 + plots.GAP
    assert obtained[14, 14] == 1
    assert obtained[14, step + 14] == 0
    assert obtained[step + 14, 14] == 0
    assert obtained[step + 14, step + 14] == 1
    assert figure.axes[1].images[0].cmap.name == "gray"
    plots.save(figure, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > image.height > 100


def test_curves_plot_the_metric_lines():
    lines = [
        {"stage": "pretrain", "global_step": 1, "loss": 5.0},
        {"stage": "meta", "global_step": 2, "loss": 3.0},
        {"stage": "meta", "global_step": 3, "loss": 2.0, "validation/5w1s": 0.5, "validation/5w1s_ci95": 0.1},
    ]
    pretrain, meta, accuracy = plots.curves(lines, "run").axes
    assert pretrain.lines[0].get_xydata().tolist() == [[1, 5]]
    assert meta.lines[0].get_xydata().tolist() == [[2, 3], [3, 2]]
    assert accuracy.lines[0].get_xydata().tolist() == [[3, 50]]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["5w1s"]


def test_tasks_are_in_the_order_of_their_numbers():
    shown = ["validation/probe", "validation/5w1s", "validation/5w5s", "validation/5w20s", "validation/20w1s"]
    line = dict.fromkeys([*reversed(shown), "validation/5w1s_ci95", "loss"], 0.5)
    assert plots.validated_tasks([line]) == shown


def test_predictions_are_drawn_beside_the_predicted_class():
    images = glyph_like(6)
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    figure = plots.predictions([images[:1], images[1:2]], ["left", "middle"], images[3:], probabilities)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["", "90%", "60%", "", "80%", ""]
    assert [axes.texts[0].get_text() for axes in figure.axes[::3]] == ["left", "middle"]
    assert np.array_equal(figure.axes[2].images[0].get_array(), images[5][0] / 255)
    figure = plots.predictions([images[:1], images[1:2]], ["a", "b"], images[3:], probabilities, negative=True)
    assert np.array_equal(figure.axes[2].images[0].get_array(), 1 - images[5][0] / 255)


def test_a_long_name_of_a_class_stands_beside_its_images():
    images, name = glyph_like(2), "a name that is long"
    figure = plots.predictions([images[:1], images[1:]], [name, name], images[:1], np.array([[0.9, 0.1]]))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    labels = [axes.texts[0].get_window_extent(renderer) for axes in figure.axes[::2]]
    assert all(label.x0 >= 0 for label in labels)
    assert all(label.x1 <= axes.get_window_extent(renderer).x0 for label in labels for axes in figure.axes)


def test_dollar_signs_in_a_name_are_drawn_literally(tmp_path):
    lines = [{"stage": "meta", "global_step": step, "loss": 1.0} for step in (1, 2)]
    figure = plots.curves(lines, "costs $5 and $\\frac")  # parsed as mathematics, this would be an error
    plots.save(figure, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert not figure._suptitle.get_parse_math()
