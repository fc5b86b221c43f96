"""All figures of one trained model on one data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from metagmvae.evaluation.fewshot.encoding import encode_split
from metagmvae.evaluation.figures import plots
from metagmvae.evaluation.figures.mixture_modes import ModeFinder
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.records import Rows
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.package import LoadedModel

POOL_SIZE = 4096
"""Images among which the nearest one to a generated feature vector is searched."""
RECONSTRUCTION_SET = 200
"""Images in the set that is reconstructed; the first 16 of them are shown."""
WAYS = 5
QUERIES = 10


def draw_gallery(
    loaded: LoadedModel, dataset: Dataset, split: str, out: Path, lines: Sequence[Mapping[str, Any]] = ()
) -> list[Path]:
    """Write all figures that the model, the data and the metric lines allow; return the files.

    An encoder-only model gives curves only. A data set of features gives curves and the latent map, because features
    cannot be shown as images.

    Args:
        loaded: the model.
        dataset: its training split gives the unlabelled set, `split` the labelled episode.
        split: whose classes are shown, for example `validation`.
        out: folder; existing files in it are replaced.
        lines: metric lines of the run, for the curves; empty: no curves.

    Raises:
        DataError: the images have another shape than those of the model, or the split has too few classes or images.
    """
    dataset.split(split)
    figures: dict[str, Figure] = {}
    if isinstance(loaded.model, MetaGMVAE):
        device = next(loaded.model.parameters()).device
        h_nF = encode_split(loaded.model, dataset, split, device)
        if dataset.kind == "images":
            figures |= _mode_figures(loaded, loaded.model, dataset, split)
        figures["latent-map"] = _latent_map(loaded.model, h_nF, dataset.labels(split), loaded.settings.name)
    name, files = loaded.settings.name, []
    if lines:
        figures["curves"] = plots.curves(lines, name)
        files.append(out / "curves.json")
        write_json(files[-1], {"name": name, "validation": _validation_lines(lines)})
    for stem, figure in figures.items():
        files.append(out / f"{stem}.png")
        plots.save(figure, files[-1])
    return files


def episode_figures(loaded: LoadedModel, dataset: Dataset, split: str) -> dict[str, Figure]:
    """Return figures of one episode by caption: its mixture modes (for images only) and its latent map.

    Raises:
        DataError: as in `draw_gallery`.
    """
    model = loaded.model
    assert isinstance(model, MetaGMVAE)  # which the caller has checked
    labels, figures = dataset.labels(split), {}
    if dataset.kind == "images":
        images = dataset.images(split)
        finder = _mode_finder(model, images)
        caption = "Modes of an episode: support, images that EM assigns to each mode, generated images"
        figures[caption] = _episode_modes(finder, loaded, images, labels)
    h_nF = encode_split(model, dataset, split, next(model.parameters()).device)
    figures["Latents of an episode by t-SNE; stars are the support"] = _latent_map(
        model, h_nF, labels, loaded.settings.name
    )
    return figures


def _mode_figures(loaded: LoadedModel, model: MetaGMVAE, dataset: Dataset, split: str) -> dict[str, Figure]:
    """Draw reconstructions, the modes of an unlabelled training set, and the modes of an episode."""
    name, train = loaded.settings.name, loaded.settings.train
    train_split = loaded.settings.data.train_split
    unlabelled = dataset.images(train_split if train_split in dataset.splits else split)
    images, labels = dataset.images(split), dataset.labels(split)
    finder = _mode_finder(model, unlabelled)
    modes = finder.training_modes(_first(unlabelled, train.set_size), train)[: 2 * WAYS]
    title = f"{name}: modes of an unlabelled training set (Eq. 7)"
    return {
        "reconstructions": _reconstructions(finder, images),
        "modes-meta-training": plots.mode_grid(modes, title, finder.generated_title),
        "modes-meta-test": _episode_modes(finder, loaded, images, labels),
    }


def _mode_finder(model: MetaGMVAE, images: Rows) -> ModeFinder:
    return ModeFinder(model, _first(images, POOL_SIZE))


def _first(images: Rows, count: int) -> np.ndarray:
    return np.asarray(images[np.arange(min(count, len(images)))])


def _validation_lines(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return step, training time in seconds and validation metrics of the lines that have validation metrics."""
    clock = ("global_step", "elapsed_s")
    return [
        {key: value for key, value in line.items() if key in clock or key.startswith("validation/")}
        for line in lines
        if any(key.startswith("validation/") for key in line)
    ]


def _reconstructions(finder: ModeFinder, images: Rows) -> Figure:
    image_set = _first(images, RECONSTRUCTION_SET)
    title = finder.generated_title.replace("generated", "decoded")
    return plots.reconstructions(image_set[:16], finder.reconstruct(image_set)[:16], title)


def _episode_modes(finder: ModeFinder, loaded: LoadedModel, images: Rows, labels: np.ndarray) -> Figure:
    sampler = EpisodeSampler(labels, way=_ways(labels), shot=1, query=QUERIES, seed=0)
    episode = sampler.episode(0)
    support, query = images[episode.support.reshape(-1)], images[episode.query.reshape(-1)]
    modes = finder.test_modes(support[:, None], query, loaded.settings.adapt)
    title = f"{loaded.settings.name}: modes of a {sampler.way}-way 1-shot episode (Eq. 10)"
    return plots.mode_grid(modes, title, finder.generated_title)


def _ways(labels: np.ndarray) -> int:
    return min(WAYS, len(np.unique(labels)))


def _latent_map(model: MetaGMVAE, h_nF: Tensor, labels: np.ndarray, name: str) -> Figure:
    """Draw the posterior means of an episode by t-SNE, for the same classes with 1 and with 5 shots."""
    from sklearn.manifold import TSNE

    panels = []
    for shot in (1, 5):
        episode = EpisodeSampler(labels, way=_ways(labels), shot=shot, query=QUERIES, seed=0).episode(0)
        rows = np.concatenate([episode.support.reshape(-1), episode.query.reshape(-1)])
        with torch.inference_mode():
            h_1TF = h_nF[torch.as_tensor(rows, device=h_nF.device)][None]
            mean_TD = model.posterior(h_1TF)[0][0].cpu().numpy()
        perplexity = min(15.0, (len(rows) - 1) / 3)
        xy = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(mean_TD)
        label = np.concatenate([np.repeat(np.arange(len(r)), r.shape[1]) for r in (episode.support, episode.query)])
        panels.append((f"{shot} shot", xy, label, np.arange(len(rows)) < episode.support.size))
    return plots.latent_map(panels, f"{name}: latents of an episode (stars: support)")
