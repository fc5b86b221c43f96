"""Model packages: a trained model as a folder with its weights (safetensors) and a JSON file for everything else."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from metagmvae.configs.limits import ExtensionName
from metagmvae.configs.load import mistake_text
from metagmvae.configs.schema import AdaptSettings, Settings
from metagmvae.pipelines.files import check_document, first_line, read_json, sha256_file, write_json
from metagmvae.pipelines.output_target import cannot_write
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.vectors import describe_shape
from metagmvae.training.models.encoders import EncoderError, EncoderModel
from metagmvae.training.models.meta_learner import MetaLearner
from metagmvae.training.models.posterior_calibration import (
    UNCALIBRATED,
    CalibrationMap,
    PosteriorCalibration,
    read_calibration,
)
from metagmvae.training.trainer.builders import build_encoder_model, build_model
from metagmvae.training.trainer.checkpoint import CHECKPOINT, load_state
from metagmvae.training.trainer.checkpoint_checks import ImageShape
from metagmvae.training.trainer.model_sizes import check_sizes

VERSION = 2
WEIGHTS = "model.safetensors"
CARD = "model.json"


class _Card(BaseModel):
    """The keys of `model.json` that every package has."""

    model_config = ConfigDict(strict=True)

    kind: ExtensionName
    settings: dict[str, Any]
    image_shape: ImageShape
    weights_sha256: str
    info: dict[str, Any]


@dataclass(frozen=True)
class LoadedModel:
    """A trained model in evaluation mode, its settings, and where it comes from."""

    model: EncoderModel
    """The model of a method (`MetaLearner`), or an encoder-only model."""
    settings: Settings
    image_shape: tuple[int, int, int]
    info: dict[str, Any]
    """Data fingerprint, stage, step, and the validation accuracy by which it was selected."""
    preprocessing: Preprocessing | None = None
    """What `metagmvae prepare` did to the training images; `pipelines.sources.image_decoding.apply_preprocessing` does
    the same to others. None: not recorded, because an older version wrote the data set or the model."""
    calibration: PosteriorCalibration | None = None
    """The maps that calibrate its probabilities; None: not calibrated."""

    def __repr__(self) -> str:
        """What the model is, without the layers of its network."""
        takes = describe_shape(self.image_shape, vectors=self.model.takes_vectors)
        calibrated = "" if self.calibration is None else ", calibrated"
        return f"<LoadedModel {self.settings.name}: {type(self.model).__name__} of {takes}{calibrated}>"

    @property
    def negative(self) -> bool:
        """Whether its images are inverted, so that figures invert them again; without a record, grey ones are."""
        return self.image_shape[0] == 1 if self.preprocessing is None else self.preprocessing.invert

    def calibration_map(self, adapt: AdaptSettings, mode: str, way: int, shot: float) -> CalibrationMap:
        """Return the map for a task, as `PosteriorCalibration.nearest_map`; `UNCALIBRATED` if the model has none."""
        return UNCALIBRATED if self.calibration is None else self.calibration.nearest_map(adapt, mode, way, shot)


def save_package(path: str | Path, loaded: LoadedModel) -> Path:
    """Write a model package atomically.

    Raises:
        DataError: the path already exists, or cannot be written; `NoSpaceError` if the disk is full.
    """
    path = Path(path)
    if path.exists():
        raise DataError(f"{path}: already exists; choose a new folder for the model package")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise cannot_write(path, error, "choose another folder") from error
    try:
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in loaded.model.state_dict().items()}
        (folder / WEIGHTS).write_bytes(save(weights))  # `save_file` has its own error for a full disk
        card = {
            "version": VERSION,
            "kind": loaded.settings.method.name if isinstance(loaded.model, MetaLearner) else "encoder",
            "settings": json.loads(loaded.settings.model_dump_json()),
            "image_shape": list(loaded.image_shape),
            "weights_sha256": sha256_file(folder / WEIGHTS),
            "info": loaded.info,
        }
        if loaded.preprocessing is not None:
            card["preprocessing"] = loaded.preprocessing.model_dump(mode="json")
        if loaded.calibration is not None:
            card["calibration"] = loaded.calibration.model_dump(mode="json")
        (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        folder.chmod(0o755)
        folder.rename(path)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error, "choose another folder") from error
        raise
    return path


def load_package(path: str | Path) -> LoadedModel:
    """Read a model package. It contains no code.

    Raises:
        DataError: it is no model package, is damaged, or is of another version.
    """
    path = Path(path)
    card = read_json(path / CARD)
    if not isinstance(card, dict) or card.get("version") != VERSION:
        raise DataError(f"{path / CARD}: not a model package of version {VERSION}")
    check_document(_Card, card, path / CARD, "use another copy")
    try:
        if sha256_file(path / WEIGHTS) != card["weights_sha256"]:
            raise DataError(f"{path / WEIGHTS}: changed after it was written (sha256 differs); use another copy")
        weights = load_file(str(path / WEIGHTS))
        settings = json.dumps(card["settings"])
        loaded = _assemble(weights, settings, card, card["info"], path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path / WEIGHTS}: cannot be read ({first_line(error)}); use another copy") from error
    if card.get("calibration") is None:
        return loaded
    record = check_document(
        PosteriorCalibration, card["calibration"], f"{path / CARD}: calibration", "use another copy"
    )
    return replace(loaded, calibration=record)


def calibrate_package(path: Path, calibration: PosteriorCalibration) -> None:
    """Replace the calibration of a model package, in `model.json`.

    Raises:
        DataError: the file cannot be read or written.
    """
    card = read_json(path / CARD)
    card["calibration"] = calibration.model_dump(mode="json")
    write_json(path / CARD, card)


def load_model(path: str | Path, shot: int | None = None) -> LoadedModel:
    """Read a model from a package folder, a checkpoint file, or a run folder.

    Which model of a run is loaded depends on its `train.selection`:
    - "last": the last one.
    - "best": the best one for `shot` on the validation episodes, or for the fewest shots if `shot` is None; the last
      one if the validation did not include `shot`.
    - "best-first-shot": the best one for the first of `validation.shots`, whatever `shot` is.

    Raises:
        DataError, CheckpointError: there is no model, or it cannot be read.
    """
    path = Path(path)
    if (path / CARD).is_file():
        return load_package(path)
    if path.is_dir() and not (path / CHECKPOINT).is_file():
        raise DataError(f"{path}: contains neither {CARD} (model package) nor {CHECKPOINT} (run)")
    state = load_state(path / CHECKPOINT if path.is_dir() else path)
    info = {
        "data_fingerprint": state["data_fingerprint"],
        "stage": state["stage"],
        "step": state["step"],
        "elapsed_s": state["elapsed"],
    }
    weights = state["model"]
    try:
        best = _best_model(state, shot)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path}: damaged settings or best models ({error!r}); use another checkpoint") from error
    if best is not None:
        task, kept = best
        weights = kept["model"]
        info |= {
            "step": kept["step"],
            "selected_by": f"validation/{task}",
            "validation_accuracy": kept["accuracy"],
        }
    loaded = _assemble(weights, state["settings"], state, info, path)
    return replace(loaded, calibration=read_calibration(path if path.is_dir() else path.parent, loaded.model))


def require_learner(loaded: LoadedModel, name: object) -> MetaLearner:
    """The loaded model, which must be one that classifies; `name` is used in the error message.

    Raises:
        DataError: it is an encoder-only model.
    """
    if not isinstance(loaded.model, MetaLearner):
        raise DataError(
            f"{name}: is an encoder alone, and this needs a Meta-GMVAE or another method; write features with it "
            "(metagmvae features) and meta-train on them, or give --head to evaluate or classify"
        )
    return loaded.model


def _best_model(state: dict[str, Any], shot: int | None) -> tuple[str, dict[str, Any]] | None:
    """Task and entry of the best model that `load_model` loads; None if it loads the last model."""
    settings = json.loads(state["settings"])
    selection = settings["train"]["selection"]
    if not state["best"] or selection == "last":
        return None
    by_shot = {int(task.split("w")[1].rstrip("s")): task for task in state["best"]}
    if selection == "best-first-shot":
        shot = settings["validation"]["shots"][0]
    task = by_shot.get(shot if shot is not None else min(by_shot))
    return None if task is None else (task, state["best"][task])


def _assemble(
    weights: dict[str, torch.Tensor], settings: str, record: dict[str, Any], info: dict[str, Any], path: Path
) -> LoadedModel:
    """Build the model; `record` is the card of a package or the state of a checkpoint."""
    try:
        parsed = Settings.model_validate_json(settings)
        if record["kind"] not in ("encoder", parsed.method.name):
            raise ValueError(f"kind is {record['kind']!r} and method.name {parsed.method.name!r}")
        channels, height, width = (int(size) for size in record["image_shape"])
        build: Callable[..., EncoderModel] = build_encoder_model
        if record["kind"] != "encoder":
            build = partial(build_model, method=parsed.method)
        check_sizes(build, parsed.model, (channels, height, width), weights)
        model = build(parsed.model, (channels, height, width), seed=0)
        model.load_state_dict(weights)
    except (DataError, EncoderError) as error:  # of a part by its name
        raise DataError(f"{path}: {error}; if another package adds this part of the model, install it") from error
    except (ValidationError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: settings and weights do not match ({reason}); use another checkpoint") from error
    model = model.to(memory_format=torch.channels_last)
    shape = (channels, height, width)
    return LoadedModel(model.eval(), parsed, shape, info, _recorded_preprocessing(record, shape, path))


def _recorded_preprocessing(
    record: dict[str, Any], image_shape: tuple[int, int, int], path: Path
) -> Preprocessing | None:
    if record.get("preprocessing") is None:
        return None
    try:
        preprocessing = Preprocessing.model_validate(record["preprocessing"])
    except ValidationError as error:
        raise DataError(f"{path}: preprocessing: {mistake_text(error.errors()[0])}; use another copy") from error
    if preprocessing.image_shape != image_shape:
        raise DataError(
            f"{path}: preprocessing gives images {preprocessing.image_shape} and the model takes {image_shape}; use "
            "another copy"
        )
    return preprocessing
