"""Files that resemble photographs, and datasets of them, for tests of encoded images."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 48


def picture(number: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A smooth RGB image with a little noise."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + rng.integers(-4, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def file_content(image: Image.Image, form: str, **options: object) -> bytes:
    """Content of an image file."""
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def write_pictures(root: Path, classes: int = 6) -> Path:
    """Twelve files of each kind in each class: JPEG and WebP files that `--store encoded` keeps, and others."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(5):
            image = picture(10 * label + number)
            image.save(folder / f"stays{number}.jpg", quality=90)
        image.save(folder / "progressive.jpg", progressive=True)
        image.save(folder / "stays.webp", quality=80)
        image.convert("L").save(folder / "grey.jpg")
        image.save(folder / "again.png")
        image.save(folder / "turned.jpg", exif=turned)
        image.save(folder / "commented.jpg", comment=bytes(SIDE * SIDE * 3))  # larger than its pixels
        picture(10 * label + 7, 90, 60).save(folder / "larger.jpg")
    return root


KEPT = {*(f"stays{number}.jpg" for number in range(5)), "progressive.jpg", "stays.webp", "grey.jpg"}
"""Names of the files that are stored as they are."""
