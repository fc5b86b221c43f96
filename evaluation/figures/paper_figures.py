"""Figures 3 and 4 of the paper for a trained model: mixture modes as images, and latents by t-SNE.

Notation: M points of an unlabelled set, K classes, S shots, P queries, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from metagmvae.evaluation.fewshot.encoding import check_encoder, check_shape, scale_features
from metagmvae.evaluation.figures import plots
from metagmvae.evaluation.figures.mixture_modes import FittedSet, MixtureMode, ModeFinder, fit_episode, fit_training_set
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.vectors import image_remedy
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.trainer.package import LoadedModel

POOL_SIZE = 8192
"""Images among which those nearest to the mean of a mode are searched, where a model decodes features."""
WAYS = 5
QUERIES = 10
TRAINING_MODES = 10
"""Most modes of an unlabelled set that are shown as images."""
PERPLEXITY = 15.0
FIGURES = {3: "modes", 4: "latents"}
"""Number in the paper -> name of the file."""


@dataclass(frozen=True)
class _Sets:
    """Rows of an unlabelled set of the training split, and of a labelled episode of another split."""

    model: MetaGMVAE
    dataset: Dataset
    train_split: str
    split: str
    training: np.ndarray
    """(M,)."""
    support: np.ndarray
    """(K, S)."""
    query: np.ndarray
    """(P,)."""
    query_label: np.ndarray
    """(P,)."""

    def images(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Return images, uint8 (n, C, H, W)."""
        return np.asarray(self.dataset.images(split)[rows])

    def features(self, split: str, rows: np.ndarray) -> Tensor:
        """Return scaled features (n, F)."""
        device = next(self.model.parameters()).device
        if self.dataset.kind == "images":
            return encode_images(self.model, self.images(split, rows), device)
        self.model.eval()
        raw = torch.from_numpy(np.asarray(self.dataset.rows(split)[rows])).float().to(device)
        return scale_features(self.model, raw)


def draw_paper_figure(number: int, loaded: LoadedModel, dataset: Dataset, split: str, out: Path) -> Path:
    """Write Fig. 3 or 4 and return the file.

    Raises:
        DataError: the model is no Meta-GMVAE, the dataset does not suit it or has no images (Fig. 3), the split does
            not exist or has too few classes or images; nothing is written.
    """
    figure = paper_figure(number, loaded, dataset, split)
    path = out / f"{FIGURES[number]}.png"
    plots.save(figure, path)
    return path


def paper_figure(number: int, loaded: LoadedModel, dataset: Dataset, split: str) -> Figure:
    """Draw Fig. 3 (samples of each mode, at meta-training and at meta-test) or Fig. 4 (latents by t-SNE).

    Raises:
        DataError: as `draw_paper_figure`.
    """
    sets = _sets(loaded, dataset, split, shot=1)
    return _modes(loaded, sets) if number == 3 else _latents(loaded, sets)


def episode_figures(loaded: LoadedModel, dataset: Dataset, split: str) -> dict[str, Figure]:
    """Return the parts of Fig. 3 and 4 that show a labelled episode, by caption; without images only the second.

    Raises:
        DataError: as `draw_paper_figure`.
    """
    sets = _sets(loaded, dataset, split, shot=1)
    figures = {}
    if dataset.kind == "images":
        caption = "Modes of an episode: support, images that EM assigns to each mode, generated images"
        title, modes, generated = _test_grid(loaded, sets)
        title = f"{loaded.settings.name}: {title}"
        figures[caption] = plots.mode_grids([(title, modes)], generated, negative=loaded.negative)
    panels = [_test_panel(loaded, sets)]
    if len(_large_classes(dataset.labels(split), 5)) > 1:
        panels.append(_test_panel(loaded, _sets(loaded, dataset, split, shot=5)))
    figures["Latents of an episode by t-SNE"] = plots.latent_map(panels, f"{loaded.settings.name}: latents of episodes")
    return figures


def _sets(loaded: LoadedModel, dataset: Dataset, split: str, shot: int) -> _Sets:
    """Draw the rows: of classes with more than `shot` images, and fewer queries if the smallest of them is small."""
    model, data = loaded.model, loaded.settings.data
    if not isinstance(model, MetaGMVAE):
        raise DataError(f"{loaded.settings.name}: figures 3 and 4 show the mixture of a Meta-GMVAE, and this is none")
    check_shape(model, dataset)
    if dataset.kind == "features":
        check_encoder(model, dataset)
    train_split = data.train_split if data.train_split in dataset.splits else split
    labels = dataset.labels(split)
    large = _large_classes(labels, shot)
    if len(large) < 2:
        raise DataError(f"{dataset.uri}: figures need two classes of {split} with {shot + 1} images; it has fewer")
    rows = np.flatnonzero(np.isin(labels, list(large)))
    way, query = min(WAYS, len(large)), min(QUERIES, min(large.values()) - shot)
    episode = EpisodeSampler(labels[rows], way=way, shot=shot, query=query, seed=0).episode(0)
    available = int(dataset.split(train_split)["samples"])
    training = np.arange(min(loaded.settings.train.set_size, available))  # stored in random order
    query_label = np.repeat(np.arange(way), episode.query.shape[1])
    drawn = (rows[episode.support], rows[episode.query.reshape(-1)])
    return _Sets(model, dataset, train_split, split, training, *drawn, query_label)


def _large_classes(labels: np.ndarray, shot: int) -> dict[int, int]:
    """Images of each class that has more than `shot`."""
    sizes = zip(*np.unique(labels, return_counts=True), strict=True)
    return {int(label): int(size) for label, size in sizes if size > shot}


def _modes(loaded: LoadedModel, sets: _Sets) -> Figure:
    if sets.dataset.kind != "images":
        held, remedy = sets.dataset.content, image_remedy(sets.dataset.content)
        raise DataError(f"{sets.dataset.uri}: holds {held}, and figure 3 shows images: {remedy}")
    finder = ModeFinder(sets.model, _pool(sets, sets.train_split, sets.training))
    images = sets.images(sets.train_split, sets.training)
    modes = finder.training_modes(images, loaded.settings.train)[:TRAINING_MODES]
    shown = f"the {TRAINING_MODES} largest of " if loaded.settings.train.components > TRAINING_MODES else ""
    title = f"meta-training: {shown}{loaded.settings.train.components} modes of {len(images)} unlabelled images (Eq. 7)"
    test_title, test_modes, generated = _test_grid(loaded, sets)
    grids = [(f"{loaded.settings.name}, {title}", modes), (test_title, test_modes)]
    return plots.mode_grids(grids, generated, negative=loaded.negative)


def _test_grid(loaded: LoadedModel, sets: _Sets) -> tuple[str, list[MixtureMode], str]:
    """Return title and modes of the episode, and what its generated images are."""
    episode = np.concatenate([sets.support.reshape(-1), sets.query])
    finder = ModeFinder(sets.model, _pool(sets, sets.split, episode))
    support = sets.images(sets.split, sets.support.reshape(-1))
    K, S = sets.support.shape
    support = support.reshape(K, S, *support.shape[1:])
    modes = finder.test_modes(support, sets.images(sets.split, sets.query), loaded.settings.adapt)
    return f"meta-test: modes of a {K}-way {S}-shot episode (Eq. 10)", modes, finder.generated_title


def _pool(sets: _Sets, split: str, without: np.ndarray) -> np.ndarray:
    """Return random images of a split, none of the shown ones; empty for a model that generates pixels."""
    if sets.model.reconstruct != "features":
        return sets.images(split, np.arange(0))
    rows = np.setdiff1d(np.arange(int(sets.dataset.split(split)["samples"])), without)
    return sets.images(split, np.sort(keyed_rng("pool", 0).permutation(rows)[:POOL_SIZE]))


def _latents(loaded: LoadedModel, sets: _Sets) -> Figure:
    train = loaded.settings.train
    fitted = fit_training_set(sets.model, sets.features(sets.train_split, sets.training), train)
    label = fitted.resp_PK.argmax(dim=1).cpu().numpy()
    title = f"meta-training: {len(label)} unlabelled images,\n{train.components} modes"
    panels = [_panel(title, fitted, label, np.zeros(len(label), dtype=bool)), _test_panel(loaded, sets)]
    return plots.latent_map(panels, f"{loaded.settings.name}: latents by t-SNE")


def _test_panel(loaded: LoadedModel, sets: _Sets) -> plots.LatentPanel:
    K, S = sets.support.shape
    support_KSF = sets.features(sets.split, sets.support.reshape(-1)).unflatten(0, (K, S))
    fitted = fit_episode(sets.model, support_KSF, sets.features(sets.split, sets.query), loaded.settings.adapt)
    label = np.concatenate([np.repeat(np.arange(K), S), sets.query_label])
    title = f"meta-test: {K}-way {S}-shot episode,\ncoloured by class"
    return _panel(title, fitted, label, np.arange(len(label)) < K * S)


def _panel(title: str, fitted: FittedSet, label: np.ndarray, is_support: np.ndarray) -> plots.LatentPanel:
    """Place the latents and the means of the modes that have points."""
    from sklearn.manifold import TSNE

    used = np.unique(label)
    points = torch.cat([fitted.latent_TD, fitted.mean_KD[torch.as_tensor(used)]]).double().cpu().numpy()
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    xy = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(points)
    return plots.LatentPanel(title, xy[: len(label)], label, is_support, xy[len(label) :])
