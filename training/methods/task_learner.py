"""The common part of the methods that learn from few-shot tasks: the network, and how a model reads images.

Notation: n images, C x H x W image shape, F feature size, b tasks, K ways, S labelled images and Q queries per class.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import ModelSettings
from metagmvae.pipelines.records import DataError
from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.models.encoders import configured_encoder
from metagmvae.training.models.feature_scaling import FeatureScale
from metagmvae.training.models.meta_learner import MetaLearner

HIDDEN = 256
"""Width of the perceptron that is meta-trained on features (`method.network = "mlp"`)."""


class TaskLearner(MetaLearner):
    """A model whose network `body` is trained on few-shot tasks.

    With classes from labels or single images, the body is the encoder. With classes from clusters of the encoder's
    features, it is a new network like the encoder, which reads images. With `method.network = "mlp"` it is a perceptron
    with one hidden layer on the scaled features of the frozen encoder.
    """

    channels_last = True
    """Memory format of images and kernels where a method copies them; training sets it to `train.channels_last`."""

    def __init__(self, model: ModelSettings, method: MethodSettings, image_shape: tuple[int, int, int]) -> None:
        super().__init__(configured_encoder(model, image_shape), image_shape)
        self.settings = method
        self.on_features = method.network == "mlp"
        self.scale = FeatureScale(self.feature_dim) if self.on_features else nn.Identity()
        self.own_body: nn.Module | None = None
        if self.on_features:
            self.own_body = nn.Sequential(nn.Linear(self.feature_dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN))
        elif method.tasks == "clusters":
            self.own_body = configured_encoder(model, image_shape)
        self.body_dim: int = HIDDEN if self.on_features else self.feature_dim

    @property
    def reads_features(self) -> bool:
        """Whether the body reads the features of the encoder instead of images."""
        return self.on_features

    @property
    def body(self) -> nn.Module:
        """The network that is meta-trained, (n, C, H, W) in [0, 1] or (n, F) -> (n, `body_dim`)."""
        return self.encoder if self.own_body is None else self.own_body

    @property
    def compiled_networks(self) -> list[nn.Module]:
        """Encoder and body."""
        return [self.encoder, *([] if self.own_body is None else [self.own_body])]

    def body_inputs(self, x: Tensor) -> Tensor:
        """What the body reads, of images in [0, 1], (n, C, H, W): the images, or their scaled features, (n, F)."""
        return self.scale(at_least_float32(self.encoder(x))) if self.on_features else x

    def encode_images(self, x: Tensor) -> Tensor:
        """What `log_posteriors` reads, of images in [0, 1], (n, C, H, W); here what the body reads."""
        return self.body_inputs(x)

    def scale_features(self, h: Tensor) -> Tensor:
        """What `encode_images` returns for images with these raw features, (n, F); only if it `reads_features`."""
        return self.scale(at_least_float32(h))

    def freeze(self) -> None:
        """Exclude the encoder from training, where it is not the body."""
        self.encoder.requires_grad_(self.own_body is None)

    @abstractmethod
    def task_loss(self, support_bKS: Tensor, query_bKQ: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of b training tasks, and further metrics without gradient.

        Args:
            support_bKS: images in [0, 1] or scaled features of the labelled images, (b, K, S, ...).
            query_bKQ: those of the queries, (b, K, Q, ...).
        """


def query_loss(logits_bPK: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy and accuracy of the queries of b tasks, which stand class by class, P / K of each."""
    b, P, K = logits_bPK.shape
    target_bP = torch.arange(K, device=logits_bPK.device).repeat_interleave(P // K).expand(b, -1)
    accuracy = (logits_bPK.argmax(dim=2) == target_bP).float().mean()
    return F.cross_entropy(logits_bPK.flatten(0, 1), target_bP.flatten()), {"accuracy": accuracy}


def log_probabilities(logits_EPK: Tensor) -> Tensor:
    """Return log softmax over the classes, float64, (E, P, K), as `MetaLearner.log_posteriors` returns it.

    Raises:
        DataError: a probability is not a number, because the weights or the data are not.
    """
    log_p_EPK = torch.log_softmax(logits_EPK.double(), dim=2)
    if torch.isnan(log_p_EPK).any():  # the argmax of NaN is the first class, which would pass for a prediction
        raise DataError("the model gives NaN instead of probabilities: its weights are wrong; use another checkpoint")
    return log_p_EPK
