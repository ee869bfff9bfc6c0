"""Images from files: any mode, on a background, upright, at the size of the batch."""

import io
import os
from typing import Any, Optional

import fsspec
import numpy as np
from PIL import Image, ImageColor, ImageOps


class BadImage(Exception):
    """An image that cannot be used, and why."""


def read_image(value: Any, folder: str = "", background: str = "white") -> Image.Image:
    """The image of a data set's cell, upright, as RGB.

    Args:
        value (`str`, `bytes`, `dict` or `PIL.Image.Image`): A path, bytes of a file, or what `datasets` makes of them.
        folder (`str`): Where relative paths begin.
        background (`str`): Colour behind transparent images.

    Raises:
        BadImage: If it cannot be read to the end.
    """
    image = open_image(value, folder)
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image), background)
    # decoders of damaged files raise whatever they stumble over
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def open_image(value: Any, folder: str = "") -> Image.Image:
    """As `read_image`, up to the header only: size and mode are known, pixels are not."""
    if isinstance(value, Image.Image):
        return value
    source = _source(value, folder)
    try:
        return Image.open(source)
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _source(value: Any, folder: str):
    path = value
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return io.BytesIO(value["bytes"])
        path = value.get("path")
    elif isinstance(value, bytes):
        return io.BytesIO(value)
    if not isinstance(path, str):
        raise BadImage(f"the cell holds {type(value).__name__}, neither a path nor an image")
    if "://" not in path:
        return os.path.join(folder, path)
    try:
        with fsspec.open(path, "rb") as file:  # a file of a streamed data set
            return io.BytesIO(file.read())
    except OSError as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def name_image(value: Any, row: Any) -> str:
    """How an image is called in reports: its path, or its row."""
    if isinstance(value, dict):
        value = value.get("path")
    return value if isinstance(value, str) else f"row {row}"


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any mode to RGB: 16 bits become 8, what is transparent shows the background."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if not transparent:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background))
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        scale = 255 if values.max() <= 1 else 1
    else:
        scale = 1 / 257 if image.mode.startswith("I;16") or values.max() > 255 else 1
    return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))


def fit_image(image: Image.Image, height: int, width: int, top: float = 0.5, left: float = 0.5) -> np.ndarray:
    """The largest part of that shape, resized with antialiasing: `(height, width, 3)` uint8.

    Args:
        top (`float`): Where the part lies from the image's top (0) to its bottom (1).
        left (`float`): The same from left to right.
    """
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC, centering=(left, top))
    return np.asarray(fitted)


def check_size(image: Image.Image, min_resolution: Optional[int]) -> None:
    """Refuses an image whose shorter side is too small."""
    if min_resolution is not None and min(image.size) < min_resolution:
        raise BadImage(f"{image.width}x{image.height} is below `min_resolution` {min_resolution}")
