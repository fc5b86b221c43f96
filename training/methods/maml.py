"""Model-agnostic meta-learning (Finn, Abbeel and Levine, ICML 2017): an initialisation from which a few steps suffice.

    theta_i = theta - alpha * grad L_support(theta), repeated;    minimise over theta: mean_i L_query(theta_i)   (Eq. 1)

L_support is the mean cross-entropy. The published code takes K times the mean, on features of Omniglot that are means
over positions; the squared length of those of Conv4 here is about 50 times as large, so that its rates would diverge
with K times the mean. As there, batch normalisation always uses the statistics of the images that are in the network
together: the support, or the queries.

Notation: n images, b tasks or E episodes, K ways, S labelled images and Q queries per class, T labelled images,
P queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import AdaptSettings, ModelSettings
from metagmvae.pipelines.records import DataError
from metagmvae.training.device.memory_format import channels_last
from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.methods.task_learner import TaskLearner, log_probabilities, query_loss
from metagmvae.training.models.meta_learner import PredictionMode

Parameters = dict[str, Tensor]
"""Parameters of body and classifier by name."""

MAX_FEATURE_EPISODES = 64
"""Maximum number of episodes in a batch on features."""


class MAML(TaskLearner):
    """Body and linear classifier, fitted to the support of each task by gradient descent.

    The classifier has `method.way` outputs. Tasks of fewer classes use the first of them, as in the published code of
    CACTUs; tasks of more classes are refused.
    """

    fits_support = True

    def __init__(self, model: ModelSettings, method: MethodSettings, image_shape: tuple[int, int, int]) -> None:
        super().__init__(model, method, image_shape)
        self.model_settings = model
        self.classifier = nn.Linear(self.body_dim, method.way)
        # Running statistics could not be updated under vmap, and nothing would read them.
        replace_all_batch_norm_modules_(self.body)
        self.normalises = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.body.modules())
        self._last_fit: tuple[tuple[Any, ...], Tensor, Parameters] | None = None

    @property
    def most_classes(self) -> int | None:
        """Number of outputs of the classifier."""
        return self.settings.way

    @property
    def compiled_networks(self) -> list[nn.Module]:
        """The encoder, if it is not the body: `torch.func.grad` runs a compiled network uncompiled, in silence."""
        return [] if self.own_body is None else [self.encoder]

    def forward(self, x: Tensor) -> Tensor:
        """What the body reads, (n, ...) -> logits of the classes, (n, `method.way`)."""
        return at_least_float32(self.classifier(self.body(x)))

    def initial_parameters(self) -> Parameters:
        """Parameters of body and classifier, which the steps start from."""
        body = "encoder." if self.own_body is None else "own_body."
        return {name: p for name, p in self.named_parameters() if name.startswith((body, "classifier."))}

    def episode_parameters(self, way: int, seed_by_episode: Sequence[int]) -> Parameters:
        """The parameters that each test episode starts from, with a leading dimension E; here the same for all.

        Raises:
            DataError: there are more classes than outputs.
        """
        if self.most_classes is not None and way > self.most_classes:
            raise DataError(
                f"the model classifies up to {self.settings.way} classes (method.way of its training), and the task "
                f"has {way}; use fewer classes, or train a model with a larger method.way"
            )
        count = len(seed_by_episode)
        return {name: p.expand(count, *p.shape) for name, p in self.initial_parameters().items()}

    def logits(self, parameters: Parameters, x: Tensor, way: int) -> Tensor:
        """Logits of K classes with these parameters, (n, ...) -> (n, K)."""
        if self.channels_last and x.ndim == 4:
            x = channels_last(x)
            # `over_tasks` stacks kernels channels-first, and those of a new network are so too.
            parameters = {name: _kernels_in_channels_last(p) for name, p in parameters.items()}
        return functional_call(self, parameters, (x,))[:, :way]

    def fit(self, parameters: Parameters, support_T: Tensor, label_T: Tensor, way: int, steps: int) -> Parameters:
        """Return the parameters after some steps of gradient descent on the support of one task, differentiably."""

        def loss(parameters: Parameters) -> Tensor:
            return F.cross_entropy(self.logits(parameters, support_T, way), label_T)

        for _ in range(steps):
            gradients = grad(loss)(parameters)
            rate = self.settings.inner_rate
            parameters = {name: value - rate * gradients[name] for name, value in parameters.items()}
        return parameters

    def fit_first_order(self, parameters: Parameters, *task: Any) -> Parameters:
        """As `fit`; in the backward pass the steps count as constants (first-order MAML, section 5.2)."""
        with torch.no_grad():
            fitted = self.fit({name: p.detach() for name, p in parameters.items()}, *task)
        return {name: p + (fitted[name] - p.detach()) for name, p in parameters.items()}

    def task_loss(self, support_bKS: Tensor, query_bKQ: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean negative log-likelihood of the queries after the steps on the support, and their accuracy."""
        K, S = support_bKS.shape[1:3]
        label_T = torch.arange(K, device=support_bKS.device).repeat_interleave(S)
        parameters, settings = self.initial_parameters(), self.settings
        fit = self.fit_first_order if settings.first_order else self.fit

        def query_logits(support_T: Tensor, query_P: Tensor) -> Tensor:
            return self.logits(fit(parameters, support_T, label_T, K, settings.inner_steps), query_P, K)

        return query_loss(self.over_tasks(query_logits, support_bKS.flatten(1, 2), query_bKQ.flatten(1, 2)))

    def log_posteriors(
        self,
        adapt: AdaptSettings,
        support_ET: Tensor,
        label_T: Tensor,
        query_EP: Tensor,
        *,
        mode: PredictionMode,
        seed_by_episode: Sequence[int],
        background: float | None = None,
    ) -> Tensor:
        """Log-probabilities after `method.test_steps` steps, as `MetaLearner.log_posteriors`, from images or features.

        Transductive: the queries of an episode are normalised together, as in the published code. Inductive: each
        query is in the network with the support. On features, without normalisation, both are the same up to rounding.

        Raises:
            DataError: there are more classes than the classifier has outputs, or a probability is not a number.
        """
        way = int(label_T.max()) + 1

        def query_logits(fitted: Parameters, support_T: Tensor, query_P: Tensor) -> Tensor:
            if mode == "transductive":
                return self.logits(fitted, query_P, way)
            together_with = support_T if self.normalises else support_T[:0]
            alone = [torch.cat([together_with, query]) for query in query_P.split(1)]
            return torch.stack([self.logits(fitted, x, way)[-1] for x in alone])

        # Evaluation calls this in inference mode, whose tensors have no gradients.
        with torch.inference_mode(False), torch.no_grad():
            support_ET = support_ET.clone()
            fitted_E = self._fitted(support_ET, label_T.to(support_ET.device).clone(), way, seed_by_episode)
            logits_EPK = self.over_tasks(query_logits, fitted_E, support_ET, query_EP.clone())
        return log_probabilities(logits_EPK)

    def _fitted(self, support_ET: Tensor, label_T: Tensor, way: int, seed_by_episode: Sequence[int]) -> Parameters:
        """Parameters after `method.test_steps` steps on each support, with a leading dimension E.

        Those of a single support are kept for the next call with the same one, because a stream of queries comes in
        many calls. What the weights are is seen by the memory that they are in, and the count of changes that torch
        keeps of it.
        """
        weights = [(p.data_ptr(), p._version) for p in self.parameters()]
        key = (self.settings, weights, label_T.tolist(), list(seed_by_episode))
        last = self._last_fit
        if last is not None and last[0] == key and torch.equal(last[1], support_ET):
            return last[2]

        def fit(parameters: Parameters, support_T: Tensor) -> Parameters:
            return self.fit(parameters, support_T, label_T, way, self.settings.test_steps)

        fitted_E: Parameters = self.over_tasks(fit, self.episode_parameters(way, seed_by_episode), support_ET)
        if len(support_ET) == 1:
            self._last_fit = key, support_ET, fitted_E
        return fitted_E

    def over_tasks(self, function: Callable[..., Any], *arguments: Tensor | Parameters) -> Any:
        """Apply a function to every task: all arguments have a leading dimension of tasks, and the result has too.

        On features one call computes all tasks (vmap). On images they are computed one after the other, because the
        second derivative of batch normalisation under vmap is wrong (torch 2.14: errors as large as the gradient, also
        of max pooling after a folded normalisation); on a CPU it is also faster than the grouped convolutions of vmap,
        by a fifth, and on one GPU a training step is a CUDA graph, so that the many kernels cost little.
        """
        if self.on_features:
            return vmap(function)(*arguments)
        tasks = range(len(next(argument for argument in arguments if isinstance(argument, Tensor))))
        results = [function(*(_task(argument, task) for argument in arguments)) for task in tasks]
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}

    def episodes_per_batch(self, adapt: AdaptSettings, points: int, device: torch.device) -> int:
        """Return how many episodes fit one call; one on images, of which each is computed alone."""
        return MAX_FEATURE_EPISODES if self.on_features else 1


def _kernels_in_channels_last(parameter: Tensor) -> Tensor:
    return parameter.contiguous(memory_format=torch.channels_last) if parameter.ndim == 4 else parameter


def _task(values: Tensor | Parameters, task: int) -> Any:
    if isinstance(values, Tensor):
        return values[task]
    return {name: value[task] for name, value in values.items()}
