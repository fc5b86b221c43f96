"""Training from scratch: a new network for every episode, trained on its labelled images alone (Hsu et al., ICLR 2019).

Their code does it as the meta-test of MAML from a random initialisation, and so does this one.

Notation: E episodes, K ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import ModelSettings
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.methods.maml import MAML, Parameters


class Scratch(MAML):
    """Body and linear classifier of MAML, newly initialised for every episode, so for any number of classes.

    The parameters of the model itself are not used: they are a template of names, shapes and device.
    """

    def __init__(self, model: ModelSettings, method: MethodSettings, image_shape: tuple[int, int, int]) -> None:
        # The kind of tasks plays no part, but with "clusters" there would be a second network beside the encoder.
        super().__init__(model, method.model_copy(update={"tasks": "labels"}), image_shape)

    @property
    def most_classes(self) -> int | None:
        """None: the classifier of an episode has as many outputs as there are classes."""
        return None

    def episode_parameters(self, way: int, seed_by_episode: Sequence[int]) -> Parameters:
        """Newly initialised parameters, a function of the seed of the episode, with a leading dimension E."""
        networks = [self._new_parameters(way, seed) for seed in seed_by_episode]
        return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}

    def _new_parameters(self, way: int, seed: int) -> Parameters:
        settings = self.settings.model_copy(update={"way": way})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(torch.device("cpu"), "scratch", seed).initial_seed())
            network = Scratch(self.model_settings, settings, self.image_shape)
        like = next(self.parameters())
        return {name: value.detach().to(like) for name, value in network.initial_parameters().items()}
