"""Images from Python callers for a model: files, images of Pillow, and arrays with their layout, scale and polarity.

Nothing is guessed in silence: a scale other than 0 to 255 is either named by the caller, warned about, or refused.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing

Shape = tuple[int, int, int]
PixelRange = tuple[float, float]
"""The values that mean black and white."""
EIGHT_BIT: PixelRange = (0.0, 255.0)
FRACTION: PixelRange = (0.0, 1.0)
DARKEST_WHITE = 128
"""On the scale 0 to 255 the brightest pixel of all images is at least this; smaller values are of another scale."""


class PixelWarning(UserWarning):
    """Pixels were scaled, or look as if they had another scale or polarity than the model expects."""


def decode_images(X: Any, preprocessing: Preprocessing | None) -> np.ndarray | None:
    """Decode and preprocess image files, as paths or bytes, and images of Pillow as `metagmvae classify` does.

    Args:
        X: a list of them; anything else is not of this kind.
        preprocessing: as the model records it.

    Returns:
        uint8, (n, C, H, W); None if X is not of this kind.

    Raises:
        DataError: an image cannot be read, the list also holds something else, or the model records no preprocessing.
    """
    kinds = (str, bytes, os.PathLike, Image.Image)
    if isinstance(X, kinds):
        raise DataError(f"X is one {type(X).__name__}; give a list of images, for example [image]")
    if not isinstance(X, list | tuple | np.ndarray) or not len(X) or not any(isinstance(x, kinds) for x in X):
        return None
    if preprocessing is None:
        raise DataError(
            "X holds files or images of Pillow, but the model does not record the preprocessing of its training "
            "images: give arrays that were preprocessed like them"
        )
    images = []
    for number, x in enumerate(X):
        if isinstance(x, Image.Image | bytes):
            images.append(apply_preprocessing(x, f"X[{number}]", preprocessing))
        elif isinstance(x, str | os.PathLike):
            images.append(apply_preprocessing(_file_content(Path(x)), os.fspath(x), preprocessing))
        else:
            raise DataError(f"X[{number}] is {type(x).__name__}; give only files and images of Pillow, or one array")
    return np.stack(images)


def _file_content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def image_rows(X: Any, image_shape: Shape, *, any_size: bool = False) -> tuple[Any, Shape]:
    """Flatten images of one of the usual layouts; return the rows (n, C * H * W) and (C, H, W).

    Args:
        X: (n, H, W) for one channel, (n, C, H, W), (n, H, W, C), or rows (n, C * H * W), which are returned as they
            are.
        image_shape: (C, H, W) of the model, which decides between the layouts.
        any_size: accept images of other sizes with 1 or 3 channels, which still have to be resized.

    Raises:
        DataError: X has another layout.
    """
    if np.ndim(X) <= 2:
        return X, image_shape
    array = np.asarray(X)
    stacked = array[:, None] if array.ndim == 3 else array
    for images in (stacked, np.moveaxis(stacked, -1, 1)):
        shape = images.shape[1:]
        if len(shape) == 3 and (shape == image_shape or (any_size and shape[0] in (1, 3) and min(shape[1:]) > 3)):
            return images.reshape(len(images), int(np.prod(shape))), shape
    channels, height, width = image_shape
    raise DataError(
        f"X has shape {array.shape}; the model takes images (n, {channels}, {height}, {width}), "
        f"(n, {height}, {width}, {channels}){f', (n, {height}, {width})' if channels == 1 else ''} or rows of "
        f"{channels * height * width} values"
    )


def find_pixel_range(X: np.ndarray) -> PixelRange:
    """Return the scale of the pixels of labelled images: 0 to 255, or 0 to 1 with a warning for booleans and floats.

    Raises:
        DataError: the values fit neither scale.
    """
    low, high = float(X.min()), float(X.max())
    if X.dtype.kind == "b" or (X.dtype.kind == "f" and low >= 0 and high <= 1):
        kind = "booleans" if X.dtype.kind == "b" else "floats from 0 to 1"
        _warn(f"X holds {kind}: taken as 0 for black and 1 for white; say so with pixel_range=(0, 1)")
        return FRACTION
    if low < 0 or high > EIGHT_BIT[1] or high < DARKEST_WHITE:
        raise DataError(
            f"X has values from {low:g} to {high:g}, which is not the scale 0 to 255: leave out a scaler in front of "
            "the classifier, or pass the values of black and white, for example pixel_range=(0, 15)"
        )
    check_whole(X)
    return EIGHT_BIT


def check_whole(X: np.ndarray) -> None:
    """Refuse fractions on the scale 0 to 255, which would be rounded without having been asked for.

    Raises:
        DataError: naming the first fraction.
    """
    if X.dtype.kind == "f" and (fractions := X[(X > 1) & (X % 1 != 0)]).size:
        raise DataError(
            f"X holds fractions such as {fractions[0]:g} on the scale 0 to 255: round them to uint8, or pass "
            "pixel_range=(0, 255), which rounds them"
        )


def check_pixel_range(X: np.ndarray, pixel_range: PixelRange, brightest: float) -> None:
    """Check that images have a given scale, and warn if all are less than half as bright as expected.

    Args:
        X: pixels.
        pixel_range: the scale, given by the caller or found by `find_pixel_range` for the labelled images.
        brightest: the largest value of the labelled images; for these themselves, white.

    Raises:
        DataError: values lie outside the scale, or are fractions where the scale is 0 to 255.
    """
    _check_in_range(X, pixel_range)
    black, white = pixel_range
    high, scale = float(X.max()), f"pixel_range {black:g} to {white:g}"
    if 0 < high <= 1 and white >= DARKEST_WHITE:
        raise DataError(f"X has values up to {high:g}, which is another scale than {scale}: scale all images alike")
    if 2 * (high - black) < brightest - black:
        _warn(
            f"X has values up to {high:g} where {brightest:g} was expected, on the scale {scale}: if the images are "
            "not that dark, scale all images alike"
        )


def _check_in_range(X: np.ndarray, pixel_range: PixelRange) -> None:
    black, white = pixel_range
    if not (np.isfinite(black) and np.isfinite(white) and black < white):
        raise DataError(f"pixel_range is {pixel_range}; give two finite numbers, black and then white")
    low, high, slack = float(X.min()), float(X.max()), 1e-6 * (white - black)
    if low < black - slack or high > white + slack:
        raise DataError(
            f"X has values from {low:g} to {high:g}, but pixel_range is {black:g} to {white:g}: give all images this "
            "scale, and leave out a scaler in front of the classifier"
        )


def warn_of_column_scaling(X: np.ndarray) -> None:
    """Warn if each column spans exactly 0 to 1 with values between, as after scikit-learn's MinMaxScaler."""
    low, high = X.min(axis=0), X.max(axis=0)
    varying = high > low
    graded = varying.any() and ((X > 0) & (X < 1)).any()
    if graded and np.allclose(low[varying], 0, atol=1e-6) and np.allclose(high[varying], 1, atol=1e-6):
        _warn(
            "every pixel of X spans exactly 0 to 1, as after MinMaxScaler, which scales each pixel differently and so "
            "changes the images: leave the scaler out"
        )


def eight_bit(X: np.ndarray, pixel_range: PixelRange) -> np.ndarray:
    """Map black to 0 and white to 255 and round: any numbers -> uint8."""
    if X.dtype == np.uint8 and pixel_range == EIGHT_BIT:
        return X
    black, white = pixel_range
    return np.rint((X.astype(np.float64) - black) * (255 / (white - black))).clip(0, 255).astype(np.uint8)


def warn_of_polarity(images: np.ndarray, preprocessing: Preprocessing | None) -> None:
    """Warn if images that should be inverted already (bright strokes on dark) have a bright background."""
    if preprocessing is not None and preprocessing.invert and np.median(images) >= DARKEST_WHITE:
        _warn(
            "the images have a bright background, but the model was trained on inverted images (bright strokes on "
            "dark): if they were not inverted, pass preprocessed=False"
        )


def _warn(message: str) -> None:
    warnings.warn(message, PixelWarning, stacklevel=4)
