"""The published encoder that `metagmvae fit --encoder` compares the trained model with, on the same episodes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.evaluation.comparison.result_files import read_recorded
from metagmvae.evaluation.encoders.frozen_comparison import results_minus_frozen
from metagmvae.evaluation.encoders.named_encoder import is_encoder_name, named_encoder
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.infra.fitting.fit_call import FitCall, tasks_of
from metagmvae.infra.fitting.fit_evaluation import evaluated_on
from metagmvae.infra.fitting.fit_plan import FrozenEncoder
from metagmvae.infra.fitting.fit_state import RESULTS, RUN, FitRequest
from metagmvae.infra.runs.run_folder import RESULTS as RUN_RESULTS
from metagmvae.pipelines.files import read_json, sha256_file, write_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.trainer.package import LoadedModel

HEADS = ("nearest-mean", "soft-k-means")
"""An inductive head, and a transductive one, which sees the queries together as the trained model does."""
PROBED_IMAGES = 16
"""Images on which the speed of the encoder is measured."""


def requested_encoder(request: FitRequest) -> FrozenEncoder | None:
    """Return the encoder that is asked for; None if there is none. A file of weights is read, to fail early.

    Raises:
        DataError: there is no such encoder or file, or an option needs an encoder.
        EncoderError, WeightsError: the weights do not fit.
    """
    name = request.encoder
    if name is None:
        options = {"--weights": request.weights, "--image-size": request.image_size}
        if given := next((option for option, value in options.items() if value is not None), None):
            raise DataError(f"{given}: is for the encoder to compare with; add --encoder NAME, or omit it")
        return None
    if not is_encoder_name(name):
        raise DataError(f"--encoder {name}: not the name of an encoder; give timm:NAME, torchvision:NAME or resnet12")
    if request.weights is None:
        return FrozenEncoder(name=name, weights=None, weights_sha256=None, image_size=request.image_size)
    named_encoder(name, request.weights, image_size=request.image_size)
    weights = request.weights.absolute()
    digest = sha256_file(weights)
    return FrozenEncoder(name=name, weights=str(weights), weights_sha256=digest, image_size=request.image_size)


def load_frozen(encoder: FrozenEncoder, dataset: Dataset | None = None) -> LoadedModel:
    """Build the encoder for the images of a dataset; see `named_encoder`.

    Raises:
        EncoderError, WeightsError: its published weights cannot be loaded, or they do not fit.
    """
    weights = Path(encoder.weights) if encoder.weights else None
    return named_encoder(encoder.name, weights, dataset, encoder.image_size)


def measure_comparison_s(encoder: FrozenEncoder, dataset: Dataset) -> float:
    """Return the seconds that encoding the held-out images of a dataset will take, measured on a few images."""
    device = default_device()
    model = load_frozen(encoder, dataset).model.to(device)
    images = dataset.images("train")
    few = np.asarray(images[np.arange(min(PROBED_IMAGES, len(images)))])
    encode_images(model, few, device)  # the first pass is slower
    begin = time.perf_counter()
    encode_images(model, few, device)
    image_s = (time.perf_counter() - begin) / len(few)
    splits = dataset.manifest["splits"]
    return image_s * sum(splits[split]["samples"] for split in ("validation", "test") if split in splits)


def compare_encoder(call: FitCall, evaluated: Sequence[str]) -> list[dict[str, Any]]:
    """Compare the trained model with the frozen encoder wherever it was evaluated on classes.

    Args:
        call: of `metagmvae fit`.
        evaluated: keys of `evaluated_on`.

    Returns:
        The rows of `results_minus_frozen`, with `on`: where.
    """
    encoder, record = call.plan.encoder, call.out / RESULTS / "frozen-encoder.json"
    if encoder is None:
        return []
    if not record.exists():
        rows = []
        with call.timed("compare with the frozen encoder"):
            for where in evaluated:
                folder, split = evaluated_on(call.plan)[where]
                dataset = Dataset.open(call.out / folder)
                ours = _stored_results(call, dataset, split)
                frozen = load_frozen(encoder, dataset)
                differences = results_minus_frozen(ours, frozen, dataset, heads=HEADS, split=split)
                rows += [{"on": where, **row} for row in differences]
                _record_commands(call, encoder, dataset, split, ours)
            write_json(record, rows)
    stored: list[dict[str, Any]] = read_json(record)
    return stored


def _stored_results(call: FitCall, dataset: Dataset, split: str) -> list[EpisodeResults]:
    """The accuracy of each episode of the trained model, which `evaluate` keeps in the run folder."""
    way, shots, _ = tasks_of(dataset, split)
    results = []
    for shot in shots:
        (task,) = read_recorded(call.out / RUN / RUN_RESULTS / f"{split}-{way}way-{shot}shot-transductive.json")
        assert task.by_episode is not None  # `evaluate` writes both files
        results.append(task.by_episode)
    return results


def _record_commands(
    call: FitCall, encoder: FrozenEncoder, dataset: Dataset, split: str, ours: Sequence[EpisodeResults]
) -> None:
    """Record the commands that give the same differences, one for each head and task."""
    options = ["--weights", encoder.weights] if encoder.weights else []
    options += ["--image-size", str(encoder.image_size)] if encoder.image_size is not None else []
    for head in HEADS:
        for our in ours:
            task = {"way": our.way, "shot": our.shot, "query": our.query, "episodes": len(our.accuracies)}
            words = ["compare", encoder.name, str(call.out / RUN), "--data", str(dataset.uri), "--split", split]
            words += [word for key, value in task.items() for word in (f"--{key}", str(value))]
            call.record_command(*words, "--head", head, *options)
