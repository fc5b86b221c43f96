"""The preprocessing of the images of a dataset, as recorded in `dataset.json`.

`pipelines.sources.image_decoding.apply_preprocessing` applies it to further images, so that a model is given images
that were prepared like its training images.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, Strict, model_validator


class Preprocessing(BaseModel):
    """What `metagmvae prepare` did to each image. The JSON form is `preprocessing.model_dump(mode="json")`.

    >>> Preprocessing.of_shape((1, 28, 28), invert=True).model_dump(mode="json", exclude_defaults=True)
    {'invert': True, 'channels': 1, 'size': [28, 28]}
    """

    # An unknown key is a step that this version cannot apply, so it is refused.
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    invert: bool
    """Whether each value was replaced by 255 - value (dark strokes on a bright background)."""
    channels: Literal[1, 3]
    """1 (grey) or 3 (RGB)."""
    size: Annotated[tuple[PositiveInt, PositiveInt], Strict(False)]
    """(height, width) in pixels; they are equal."""
    resample: Literal["lanczos"] = "lanczos"
    crop: Literal["center square", "none"] = "center square"
    """`center square`: the largest centred square is cut out before the image is resized. `none`: the whole image is
    resized to the square, which changes its aspect ratio."""
    sixteen_bit_white: PositiveInt = 65535
    """The value of images with more than 8 bits that becomes 255; 4095 if all of them have 12-bit values."""

    @classmethod
    def of_shape(cls, image_shape: tuple[int, int, int], *, invert: bool) -> Preprocessing:
        """The preprocessing that gives images of this shape, (C, H, W)."""
        channels, height, width = image_shape
        return cls.model_validate({"invert": invert, "channels": channels, "size": (height, width)})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the preprocessed images."""
        return (self.channels, *self.size)

    @model_validator(mode="after")
    def _check_square(self) -> Self:
        if self.size[0] != self.size[1]:
            raise ValueError(f"size is {self.size[0]} x {self.size[1]}; the images are square")
        return self
