"""Checks that the tests of another package call for the sources and encoders that it adds (entry points).

Each raises an AssertionError that names the rule and what breaks it.
"""

from __future__ import annotations

import pickle
import tempfile
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.verify import verify_dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import ImageSource, open_source
from metagmvae.training.models.encoders import build_encoder

IMAGES = 6
"""Images of a batch in the check of an encoder."""


def check_source(name: str, source: str | None = None, **options: Any) -> ImageSource:
    """Check a source as `metagmvae prepare NAME --source SOURCE` opens it; use a small one, all images are decoded.

    Keys are unique and relative; classes of different splits differ; opening it again gives the same records and
    fingerprint; records can be sent to other processes; images are uint8 of one shape; the written data set holds them.

    Returns:
        The opened source, for further checks.

    Raises:
        AssertionError: a rule is broken.
        DataError: the source refuses the data.
    """
    opened, again = (open_source(name, source, **options) for _ in range(2))
    records, records_again = (
        {split: [(record.key, record.class_name) for record in rows] for split, rows in each.splits.items()}
        for each in (opened, again)
    )
    check_rule(any(records.values()), "has no images")
    check_rule(records == records_again, "opened again, it gives other records or another order")
    check_rule(opened.fingerprint == again.fingerprint, "opened again, it has another fingerprint")
    counts = Counter(key for rows in records.values() for key, _ in rows)
    key, count = counts.most_common(1)[0]
    check_rule(count == 1, f"the key {key!r} occurs {count} times; keys are unique over all splits")
    absolute = next((key for key in counts if Path(key).is_absolute()), None)
    check_rule(absolute is None, f"the key {absolute!r} is an absolute path; keys are the same on all machines")
    for first, second in combinations(records, 2):
        shared = {label for _, label in records[first]} & {label for _, label in records[second]}
        check_rule(not shared, f"{first} and {second} share classes: {sorted(shared)[:3]}")
    check_rule(len(pickle.dumps(opened)) > 0, "cannot be sent to other processes")
    for split, rows in opened.splits.items():
        for number, record in enumerate(rows):
            image = record.load()
            found = f"{image.dtype} {image.shape}"
            right = image.dtype == np.uint8 and image.shape == opened.image_shape
            check_rule(right, f"{split}, {record.key}: is {found}, not uint8 {opened.image_shape}")
            check_rule(
                number >= IMAGES or np.array_equal(image, record.load()), f"{record.key}: loads other pixels again"
            )
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(opened, Path(folder) / "data")
        problems = verify_dataset(Path(folder) / "data")
        check_rule(not problems, f"its data set is damaged: {problems[:1]}")
        dataset = Dataset.open(Path(folder) / "data")
        for split, rows in opened.splits.items():
            by_key = {record.key: record for record in rows}
            for image, row in zip(dataset.images(split)[:], dataset.index(split).to_pylist(), strict=True):
                record = by_key[row["key"]]
                check_rule(np.array_equal(image, record.load()), f"{record.key}: the data set holds other pixels")
                check_rule(row["class_name"] == record.class_name, f"{record.key}: the data set holds another class")
    return opened


def check_encoder(name: str, image_shape: tuple[int, int, int]) -> nn.Module:
    """Check an encoder as `model.encoder = NAME` builds it for images (C, H, W).

    It maps images in [0, 1] to finite features, those of an image do not depend on the others in evaluation mode, the
    seed decides the initial weights, the state dictionary decides the features, and all parameters have gradients.

    Returns:
        The encoder, for further checks.

    Raises:
        AssertionError: a rule is broken.
        EncoderError: it cannot be built.
    """
    encoder, same = (_seeded(name, image_shape, seed=0).eval() for _ in range(2))
    images = torch.rand(IMAGES, *image_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        h_nF = encoder(images)
        check_rule(isinstance(h_nF, Tensor) and h_nF.ndim == 2, "does not return features (n, F)")
        check_rule(len(h_nF) == IMAGES, f"returns {len(h_nF)} rows for {IMAGES} images")
        check_rule(h_nF.shape[1] == encoder.feature_dim, f"feature_dim is {encoder.feature_dim}, not {h_nF.shape[1]}")
        check_rule(bool(torch.isfinite(h_nF).all()), "features are not finite")
        check_rule(bool(h_nF.std(dim=0).max() > 0), "all images have equal features")
        check_rule(torch.equal(encoder(images), h_nF), "features are random in evaluation mode")
        check_rule(
            torch.equal(same(images), h_nF), "two with the same seed differ; draw weights from torch's generator only"
        )
        alone = torch.cat([encoder(image[None]) for image in images])
        check_rule(
            torch.allclose(alone, h_nF, atol=1e-4), "features of an image depend on the others in evaluation mode"
        )
        other = _seeded(name, image_shape, seed=2).eval()
        other.load_state_dict(encoder.state_dict())
        check_rule(
            torch.equal(other(images), h_nF), "its state_dict does not hold everything that decides the features"
        )
    encoder.train()
    trained_nF = encoder(images)
    check_rule(trained_nF.requires_grad, "parameters without a gradient: all")
    trained_nF.square().sum().backward()
    unused = [key for key, value in encoder.named_parameters() if value.requires_grad and value.grad is None]
    check_rule(not unused, f"parameters without a gradient: {unused[:3]}")
    return encoder.eval()


def _seeded(name: str, image_shape: tuple[int, int, int], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(name, image_shape, channels=64)


def check_rule(holds: bool, broken: str) -> None:
    """Raise an AssertionError with the rule that is broken, unless it holds."""
    if not holds:
        raise AssertionError(broken)
