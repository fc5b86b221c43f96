"""DeepCluster: classification of images by the cluster of their features (Caron, Bojanowski, Joulin and Douze, 2018).

"Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018, Section 3 and 4.1.

Notation: n training images or images of a batch, F feature size, k clusters.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.configs.schema import Settings
from metagmvae.pipelines.records import DataError, Rows
from metagmvae.pipelines.sampling.indexed import batches_per_epoch
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.training.device import distributed
from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.device.seeding import keyed_generator, to_device
from metagmvae.training.models.clustering import k_means
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.pretraining.step import PretrainMetrics, ViewStep

PCA_DIMENSIONS = 256
"""Most dimensions that are clustered, as in the source."""
NOISE = 1e-6
"""Directions whose variance is below this fraction of the largest are not whitened, but dropped."""
ITERATIONS = 20
"""Of k-means, as in the source."""


class DeepClusterModules(nn.Module):
    """Classifier of the clusters, and the clustering of the current epoch."""

    label_n: Tensor
    """Cluster of each training image, int32."""
    weight_k: Tensor
    """Weight of an image by its cluster; its mean over the training images is 1."""

    def __init__(self, feature_dim: int, clusters: int, images: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(feature_dim, clusters)
        self.register_buffer("label_n", torch.zeros(images, dtype=torch.int32))
        self.register_buffer("weight_k", torch.ones(clusters))

    @torch.no_grad()
    def set_clusters(self, labels_n: np.ndarray) -> None:
        """Store a clustering. Inverse cluster sizes as weights equal uniform sampling of the clusters."""
        sizes_k = np.bincount(labels_n, minlength=len(self.weight_k))
        filled = np.count_nonzero(sizes_k)
        self.label_n.copy_(torch.from_numpy(labels_n))
        # An empty cluster has no image, so its weight is not used.
        self.weight_k.copy_(torch.from_numpy(len(labels_n) / (filled * np.maximum(sizes_k, 1))))

    @torch.no_grad()
    def reset_classifier(self, generator: torch.Generator) -> None:
        """Initialise as in the source: weights from N(0, 0.01^2), biases 0."""
        self.classifier.weight.normal_(0.0, 0.01, generator=generator)
        self.classifier.bias.zero_()


class DeepClusterStep(ViewStep):
    """Cross-entropy of a linear classifier that predicts the cluster of an image from a random view of it.

    At the start of each epoch the features of all training images are reduced to 256 dimensions by PCA, whitened and
    scaled to unit length; k-means clusters them, and a new classifier starts. Rank 0 does the clustering for all ranks.
    """

    needs_rows = True
    auxiliary: DeepClusterModules

    @classmethod
    def build_auxiliary(cls, model: EncoderModel, settings: Settings, images: int) -> nn.Module:
        """Classifier and assignments."""
        return DeepClusterModules(model.feature_dim, settings.pretrain.clusters, images)

    @classmethod
    def check_images(cls, settings: Settings, images: int) -> None:
        """There must be an image for each cluster, too."""
        super().check_images(settings, images)
        clusters = settings.pretrain.clusters
        if clusters > images:
            raise DataError(f"pretrain.clusters ({clusters}) exceeds the {images} images of the split; lower it")

    def start_step(self, step: int, images: Rows | StreamedImages) -> Iterable[nn.Parameter]:
        """Cluster all training images at the start of an epoch; returns the parameters of the new classifier."""
        assert not isinstance(images, StreamedImages)  # refused by the settings
        epoch, position = divmod(step - 1, batches_per_epoch(len(images), self.pretrain.batch))
        if position:
            return ()
        if distributed.rank() == 0:
            seed = int(torch.randint(2**31, (), generator=self._epoch_generator("clusters", epoch)))
            self.auxiliary.set_clusters(self._cluster(images, seed))
        distributed.broadcast_buffers(self.auxiliary)
        self.auxiliary.reset_classifier(self._epoch_generator("classifier", epoch))
        return self.auxiliary.classifier.parameters()

    def prepare(self, images: object, step: int, rows: object) -> tuple[Tensor, ...]:
        """Views of the images, (n, C, H, W), their clusters, (n,), and the row weights, (n,)."""
        x = self.view(self._images(images), self._generator("views", step))
        labels = self.auxiliary.label_n[to_device(rows, x.device)].long()
        return self._in_format(x), labels, self.auxiliary.weight_k[labels]

    def compute(self, x: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, PretrainMetrics]:
        """Weighted cross-entropy, and the fraction of images whose cluster is predicted."""
        with self._autocast(x.device):
            logits = at_least_float32(self.auxiliary.classifier(self.encoder(x)))
        loss = (weights * F.cross_entropy(logits, labels, reduction="none")).mean()
        return loss, {"cluster_accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}

    def _cluster(self, images: Rows, seed: int) -> np.ndarray:
        model = EncoderModel(self.encoder, self.image_shape)
        device, cpu = next(self.encoder.parameters()).device, torch.device("cpu")
        features = encode_images(model, images, device, raw=True, channels_last=self.settings.channels_last, to=cpu)
        self.encoder.train()
        labels_n, _ = k_means(whiten(features.numpy()), self.pretrain.clusters, seed, iterations=ITERATIONS)
        return labels_n

    def _epoch_generator(self, purpose: str, epoch: int) -> torch.Generator:
        """Equal on all ranks."""
        return keyed_generator(torch.device("cpu"), self.settings.seed, purpose, epoch)


def whiten(features_nF: np.ndarray, dimensions: int = PCA_DIMENSIONS) -> np.ndarray:
    """The leading principal components, scaled to unit variance, and then each row to unit length: (n, <= dimensions).

    Raises:
        ValueError: the features are equal for all images.
    """
    centred = features_nF - features_nF.mean(axis=0)
    variance, basis = np.linalg.eigh((centred.T @ centred).astype(np.float64) / len(centred))
    leading = np.flatnonzero(variance > NOISE * variance[-1])[::-1][:dimensions]
    if not len(leading):
        raise ValueError("the features of all images are equal, so they have no clusters; lower pretrain.learning_rate")
    components = centred @ (basis[:, leading] / np.sqrt(variance[leading])).astype(np.float32)
    length = np.linalg.norm(components, axis=1, keepdims=True)
    return components / np.where(length > 0, length, 1)
