"""All figures of one trained model on one data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metagmvae.evaluation.fewshot.encoding import encode_split
from metagmvae.evaluation.figures import plots
from metagmvae.evaluation.figures.mixture_modes import ModeFinder
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.package import LoadedModel, require_meta_gmvae

POOL = 4096
"""Images that generated features are shown by, the nearest of them."""
SHOWN_WAYS = 5
QUERIES = 10


def draw_gallery(
    loaded: LoadedModel, dataset: Dataset, split: str, out: Path, lines: Sequence[Mapping[str, Any]] = ()
) -> list[Path]:
    """Write every figure that the model, the data and the metric lines allow; return the files.

    Of an encoder alone there are curves; of features, which nobody can look at, curves and the latent map.

    Args:
        loaded: the model.
        dataset: its training split gives the unlabelled set, `split` the labelled episode.
        split: whose classes are shown, say `validation`.
        out: folder; files in it are replaced.
        lines: metric lines of the run, for the curves.

    Raises:
        DataError: the images have another shape than the model's, or the split has too few classes or images.
    """
    dataset.split(split)
    drawn: dict[str, Any] = {}
    if isinstance(loaded.model, MetaGMVAE):
        device = next(loaded.model.parameters()).device
        h_nF = encode_split(loaded.model, dataset, split, device)
        if dataset.kind == "images":
            drawn |= _modes(loaded, loaded.model, dataset, split)
        drawn["latent-map"] = _latent_map(loaded.model, h_nF, dataset.labels(split), loaded.settings.name)
    name, files = loaded.settings.name, []
    if lines:
        drawn["curves"] = plots.curves(lines, name)
        files.append(out / "curves.json")
        write_json(files[-1], {"name": name, "validation": _validations(lines)})
    for stem, figure in drawn.items():
        files.append(out / f"{stem}.png")
        plots.save(figure, files[-1])
    return files


def episode_figures(loaded: LoadedModel, dataset: Dataset, split: str) -> dict[str, Any]:
    """By what they show: the modes of an episode and the latent map of the same classes, as far as the data allow.

    Raises:
        DataError: as `draw_gallery`.
    """
    model = require_meta_gmvae(loaded, dataset.uri)
    labels, drawn = dataset.labels(split), {}
    if dataset.kind == "images":
        images = dataset.images(split)
        finder = ModeFinder(model, np.asarray(images[: min(POOL, len(images))]))
        kind = "nearest to decoded features" if model.reconstruct == "features" else "generated"
        drawn["An episode: support, images that EM puts into each mode, and generated ones"] = _episode(
            finder, loaded, images, labels, kind
        )
    h_nF = encode_split(model, dataset, split, next(model.parameters()).device)
    drawn["Latents of an episode by t-SNE; stars are the support"] = _latent_map(
        model, h_nF, labels, loaded.settings.name
    )
    return drawn


def _modes(loaded: LoadedModel, model: MetaGMVAE, dataset: Dataset, split: str) -> dict[str, Any]:
    """Reconstructions, and the modes of an unlabelled set and of an episode."""
    name, train = loaded.settings.name, loaded.settings.train
    train_split = loaded.settings.data.train_split
    unlabelled = dataset.images(train_split if train_split in dataset.splits else split)
    images, labels = dataset.images(split), dataset.labels(split)
    finder = ModeFinder(model, np.asarray(unlabelled[: min(POOL, len(unlabelled))]))
    kind = "nearest to decoded features" if model.reconstruct == "features" else "generated"
    size = min(train.set_size, len(unlabelled))
    modes = finder.training_modes(np.asarray(unlabelled[:size]), train)[: 2 * SHOWN_WAYS]
    title = f"{name}: modes of an unlabelled training set (Eq. 7)"
    return {
        "reconstructions": _reconstructions(finder, images, kind),
        "modes-meta-training": plots.mode_grid(modes, title, kind),
        "modes-meta-test": _episode(finder, loaded, images, labels, kind),
    }


def _validations(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What validation said, when: steps, seconds trained, accuracies."""
    kept = ("global_step", "elapsed_s")
    return [
        {key: value for key, value in line.items() if key in kept or key.startswith("validation/")}
        for line in lines
        if any(key.startswith("validation/") for key in line)
    ]


def _reconstructions(finder: ModeFinder, images: Any, kind: str) -> Any:
    some = np.asarray(images[: min(200, len(images))])
    return plots.reconstructions(some[:16], finder.reconstruct(some)[:16], kind.replace("generated", "decoded"))


def _episode(finder: ModeFinder, loaded: LoadedModel, images: Any, labels: np.ndarray, kind: str) -> Any:
    sampler = EpisodeSampler(labels, way=_ways(labels), shot=1, query=QUERIES, seed=0)
    episode = sampler.episode(0)
    support, query = images[episode.support.reshape(-1)], images[episode.query.reshape(-1)]
    modes = finder.test_modes(support[:, None], query, loaded.settings.adapt)
    title = f"{loaded.settings.name}: modes of a {sampler.way}-way 1-shot episode (Eq. 10)"
    return plots.mode_grid(modes, title, kind)


def _ways(labels: np.ndarray) -> int:
    return min(SHOWN_WAYS, len(np.unique(labels)))


def _latent_map(model: MetaGMVAE, h_nF: Tensor, labels: np.ndarray, name: str) -> Any:
    """The same classes with 1 and with 5 shots: posterior means given the whole episode, by t-SNE."""
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
