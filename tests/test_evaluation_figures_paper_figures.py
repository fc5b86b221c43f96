"""Figures 3 and 4: every image and latent of the sets is drawn once, and modes are shown by other images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from called_commands import refusal_of
from PIL import Image

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.figures import paper_figures
from metagmvae.evaluation.figures.mixture_modes import ModeFinder, fit_episode
from metagmvae.evaluation.figures.paper_figures import draw_paper_figure, episode_figures, paper_figure
from metagmvae.infra.cli import main
from metagmvae.pipelines.arrays.image_arrays import open_images
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.trainer.builders import build_encoder_model, build_model
from metagmvae.training.trainer.package import LoadedModel

SIZES = ["model.channels=8", "model.width=32", "model.latent=6", "train.set_size=40", "adapt.samples=4"]


def loaded_model(*changes: str) -> LoadedModel:
    settings = load_settings("omniglot-5way", [*SIZES, *changes])
    model = build_model(settings.model, (1, 28, 28), seed=0)
    return LoadedModel(model.eval(), settings, (1, 28, 28), {})


@pytest.fixture(scope="module")
def pixel_model() -> LoadedModel:
    return loaded_model()


def offsets(axes):
    """Positions of the groups of points of a panel."""
    return [group.get_offsets() for group in axes.collections]


def test_figure_4_shows_every_point_once_with_the_means(dataset, pixel_model):
    training, test = paper_figure(4, pixel_model, dataset, "validation").axes
    *modes, centres = offsets(training)
    assert sum(map(len, modes)) == 40
    assert len(centres) == sum(len(mode) > 0 for mode in modes)
    *classes, centres = offsets(test)
    assert [len(points) for points in classes] == [10, 1] * 5
    assert len(centres) == 5
    means = np.array([np.vstack(classes[k : k + 2]).mean(axis=0) for k in range(0, 10, 2)])
    assert np.isfinite(means).all()


def test_latents_of_figure_4_are_those_of_the_model(dataset, pixel_model, monkeypatch):
    """t-SNE gets the posterior means of the episode, then the means of the classes."""
    given = []

    class Recorder:
        def __init__(self, **options):
            pass

        def fit_transform(self, points):
            given.append(points)
            return points[:, :2]

    monkeypatch.setattr("sklearn.manifold.TSNE", Recorder)
    paper_figure(4, pixel_model, dataset, "validation")
    sets = paper_figures._sets(pixel_model, dataset, "validation", shot=1)
    rows = np.concatenate([sets.support.reshape(-1), sets.query])
    labels = dataset.labels("validation")
    assert [labels[row] for row in sets.query] == [labels[sets.support[k, 0]] for k in sets.query_label]
    model = pixel_model.model
    h_TF = encode_images(model, dataset.images("validation")[rows], torch.device("cpu"))
    with torch.inference_mode():
        mean_TD = model.posterior(h_TF[None])[0][0]
    fitted = fit_episode(model, h_TF[:5, None], h_TF[5:], pixel_model.settings.adapt)
    expected = torch.cat([mean_TD, fitted.mean_KD]).numpy()
    assert given[1] == pytest.approx(expected, abs=1e-5)


def test_figure_3_has_real_and_generated_images_of_both_sets(dataset, pixel_model, tmp_path):
    path = draw_paper_figure(3, pixel_model, dataset, "validation", tmp_path)
    with Image.open(path) as image:
        assert image.width > 500 < image.height
    figure = paper_figure(3, pixel_model, dataset, "validation")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["obtained by EM", "generated", "support", "obtained by EM", "generated"]
    headings = [part.get_suptitle() for part in figure.subfigs]
    assert headings[0].startswith("omniglot-5way, meta-training: 5 modes of 40 unlabelled images")
    assert headings[1].startswith("meta-test: modes of a 5-way 1-shot episode")
    rows = [len(axes.get_yticklabels()) for axes in figure.axes]
    assert rows == [5, 0, 5, 0, 0]


def test_features_are_shown_by_the_nearest_other_images(dataset):
    """Against a plain loop over the pool."""
    loaded = loaded_model("model.reconstruct=features", "train.denoise=false", "model.features=raw")
    sets = paper_figures._sets(loaded, dataset, "validation", shot=1)
    shown = np.concatenate([sets.support.reshape(-1), sets.query])
    pool = paper_figures._pool(sets, "validation", shown)
    images = np.asarray(dataset.images("validation")[np.arange(120)])
    assert len(pool) == 120 - len(shown)
    assert not any((pool == image).all(axis=(1, 2, 3)).any() for image in images[shown])
    _, modes, heading = paper_figures._test_grid(loaded, sets)
    assert heading == "real images nearest to the decoded mean"
    finder = ModeFinder(loaded.model, pool)
    h_TF = encode_images(loaded.model, images[shown], torch.device("cpu"))
    fitted = fit_episode(loaded.model, h_TF[:5, None], h_TF[5:], loaded.settings.adapt)
    with torch.inference_mode():
        decoded_KF = loaded.model.decode(fitted.mean_KD).numpy()
    for k, mode in enumerate(modes):
        cosine = [
            float(np.dot(h, decoded_KF[k]) / np.linalg.norm(h) / np.linalg.norm(decoded_KF[k]))
            for h in finder.pool_nF.numpy()
        ]
        order = sorted(range(len(pool)), key=lambda row: -cosine[row])
        assert np.array_equal(mode.generated, pool[order[:8]])


def test_figures_of_an_episode_for_pages(dataset, pixel_model):
    captions = list(episode_figures(pixel_model, dataset, "validation"))
    assert [caption.split(":")[0] for caption in captions] == ["Modes of an episode", "Latents of an episode by t-SNE"]


def test_small_classes_have_fewer_queries_and_classes_of_one_image_none(pixel_model, tmp_path):
    """A page of results must not fail for its figures: 12, 3, 2 and 1 images of the classes."""
    labels = np.repeat([0, 1, 2, 3], [12, 3, 2, 1])
    images = np.random.default_rng(0).integers(0, 256, (18, 28, 28), dtype=np.uint8)
    write_dataset(open_images(images, labels), tmp_path / "data")
    small = Dataset.open(tmp_path / "data")
    sets, stored = paper_figures._sets(pixel_model, small, "train", shot=1), small.labels("train")
    assert (sets.support.shape, sets.query.shape) == ((3, 1), (3,))
    classes = stored[sets.support[:, 0]]
    assert sorted(classes) == [0, 1, 2]
    np.testing.assert_array_equal(stored[sets.query], classes[sets.query_label])
    assert not set(sets.support.reshape(-1)) & set(sets.query)
    assert len(episode_figures(pixel_model, small, "train")["Latents of an episode by t-SNE"].axes) == 1


def test_what_has_no_mixture_or_no_images_is_refused(dataset, pixel_model, tmp_path):
    encoder = replace(pixel_model, model=build_encoder_model(pixel_model.settings.model, (1, 28, 28), seed=0))
    with pytest.raises(DataError, match="show the mixture of a Meta-GMVAE"):
        draw_paper_figure(3, encoder, dataset, "validation", tmp_path)
    with pytest.raises(DataError, match="no split 'none'"):
        draw_paper_figure(4, pixel_model, dataset, "none", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_features_have_figure_4_only(data, tmp_path, capsys):
    import mlflow_template

    run, features = mlflow_template.new_run(tmp_path / "run"), tmp_path / "features"
    assert main(["features", str(run), "--data", str(data), "--out", str(features), "--json"]) == 0
    words = [str(run), "--data", str(features), "--out", str(tmp_path / "out")]
    assert main(["figure", "4", *words, "--json"]) == 0
    capsys.readouterr()
    assert main(["figure", "3", *words]) == 2
    assert "holds features, and figure 3 shows images: use the dataset of the images" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"latents.png"}
    assert Dataset.open(features).kind == "features"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["figure", "5", "nothing", "--data", "DATA"], "the figures of the paper with results are 3 and 4"),
        (["figure", "3", "nothing", "--data", "DATA"], "no such model"),
        (["figure", "3", "nothing"], "name it with --data"),
        (["figure", "3", "nothing", "--data", "DATA", "--split", "x"], "no split 'x'"),
    ],
)
def test_wrong_request_is_one_error_line(data, tmp_path, capsys, words, message):
    request = [word.replace("DATA", str(data)) for word in words]
    assert message in refusal_of(*request, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
