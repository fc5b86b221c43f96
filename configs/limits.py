"""Types of settings with their bounds. Upper bounds refuse mistakes and hostile files, not experiments."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any
from urllib.request import url2pathname

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from metagmvae.configs.credentials import redact, take_credentials

MAX_COUNT = 10**9
"""Largest number of steps, episodes or seconds."""
MAX_SIZE = 2**16
"""Largest size of a layer, a batch or a set."""
MAX_THREADS = 1024
"""Of PyTorch in one process; many more end it with a segmentation fault."""
MAX_PCA_LATENT = 256
"""Largest latent size for PCA initialisation: the ReLU decoder of Table 8 needs two of its 512 units per component."""

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]
Repetitions = Annotated[int, Field(gt=0, le=10_000)]
"""Iterations of EM, or Monte Carlo samples."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ExtensionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,60}$")]
"""Name of a method or objective, of this package or of another one (`pipelines.extensions`)."""
Temperature = Annotated[float, Field(ge=1e-3, le=1e6, allow_inf_nan=False)]
"""Divides log-likelihoods and similarities: below 0.001 they exceed the range of float32."""


def _check_folder(path: str) -> str:
    if not path or "\0" in path:
        raise ValueError(f"{path!r} is no folder; give its path")
    if path.startswith(("file:///", "file://localhost/")):
        return url2pathname(path.removeprefix("file://").removeprefix("localhost"))
    if "://" in path:
        raise ValueError(f"{path!r} is a URI; it must be a path on this machine")
    return path


Folder = Annotated[str, AfterValidator(_check_folder)]
DataUri = Annotated[str, AfterValidator(take_credentials)]
"""URI of a dataset; credentials in it stay in the memory of this process."""


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if not re.fullmatch("[a-z][a-z0-9_]*", name):
            raise ValueError(f"{name!r} is no name of an option: lower-case letters, digits and _, a letter first")
        if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} = {value!r}: give a finite number, true, false or a text in quotes")
        if isinstance(value, str) and redact(value) != value:
            raise ValueError(f"{name}: settings are stored with every run and must not hold a password")
    return options


Options = Annotated[dict[str, Any], AfterValidator(_check_options)]
"""Options by name of what another package adds; that package names and checks them (`pipelines.extensions`)."""


class Section(BaseModel):
    """Base class of all sections: immutable, strict types, no unknown keys, no passwords."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    @field_validator("*", mode="after", check_fields=False)
    @classmethod
    def _refuse_credentials(cls, value: Any) -> Any:
        if isinstance(value, str) and redact(value) != value:
            raise ValueError(
                "settings are stored with every run and must not hold a password; give it in an environment variable "
                "(for tracking.uri: MLFLOW_TRACKING_URI)"
            )
        return value
