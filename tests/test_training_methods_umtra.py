"""UMTRA: the queries are random views of their own images, keyed by task."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from metagmvae.training.augment.strokes import stroke_view
from metagmvae.training.device.seeding import episode_generators
from metagmvae.training.methods.umtra import augmented_queries

CPU = torch.device("cpu")


def generators(tasks: list[int], seed: int = 0) -> list[torch.Generator]:
    return episode_generators(CPU, seed, "tasks", tasks)


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """A view whose random number is seen in the result: the image plus a small number for each."""
    return x + 1e-3 * torch.rand(len(x), 1, 1, 1, generator=generator)


def test_a_query_is_a_view_of_the_image_of_its_class() -> None:
    x = torch.arange(6.0).reshape(2, 3, 1, 1, 1, 1).expand(2, 3, 1, 1, 4, 4)
    queries = augmented_queries(x, shifted, generators([0, 1]), queries=5)
    assert queries.shape == (2, 3, 5, 1, 4, 4)
    assert torch.equal(queries.floor(), x.expand(2, 3, 5, 1, 4, 4))
    noise = (queries - x)[..., 0, 0, 0]
    assert len(noise.unique()) == 2 * 3 * 5  # no view is drawn twice


@pytest.mark.parametrize("view", [shifted, partial(stroke_view, elastic=0.12)], ids=["shifted", "strokes"])
def test_a_task_depends_on_its_key_and_not_on_the_batch(view: object) -> None:
    x = torch.rand(3, 2, 1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    together = augmented_queries(x, view, generators([4, 5, 6]), queries=2)  # type: ignore[arg-type]
    for position, task in enumerate((4, 5, 6)):
        alone = augmented_queries(x[position : position + 1], view, generators([task]), queries=2)  # type: ignore[arg-type]
        assert torch.equal(alone[0], together[position])
    other = augmented_queries(x, view, generators([7, 8, 9]), queries=2)  # type: ignore[arg-type]
    assert not torch.equal(other, together)


def test_one_generator_for_each_task() -> None:
    with pytest.raises(ValueError, match="zip"):
        augmented_queries(torch.rand(2, 2, 1, 1, 4, 4), shifted, generators([0]), queries=1)
