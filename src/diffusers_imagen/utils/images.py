"""Image reading for training, pipelines and commands: converts any mode and bit depth to upright RGB.

Every failure is a `BadImage` with a reason; only regular files are opened, and no other program is called.
"""

import io
import os
import stat
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError


PictureSource = str | os.PathLike | bytes | Image.Image

# EPS and WMF are rendered by other programs, FITS is decompressed without a limit, and Pillow cannot decode the others
REFUSED_FORMATS = {"EPS", "WMF", "FITS", "BUFR", "GRIB", "HDF5", "MPEG"}
# image formats that Pillow does not read without plugins: such files are counted, and reported as unreadable
FOREIGN_EXTENSIONS = {".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
ORIENTATION = 0x0112  # tag of EXIF
NEARLY_ONE = 2.0  # floating-point images up to here count as [0, 1], with overshoot from sharpening
NEARLY_ZERO = -1 / 510  # rounds to 0


class BadImage(ValueError):
    """Raised for an image that cannot be used; the message has the reason."""


def read_image(source: PictureSource, background: str = "white") -> Image.Image:
    """Read an image, upright, as RGB.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): A file, the bytes of one, or an image of any mode.
        background (`str`): Background color of transparent images.

    Raises:
        BadImage: If it cannot be read completely, or has invalid values.
    """
    if isinstance(source, Image.Image):
        return _decode(source, background).copy()
    with open_image(source) as image:
        return _decode(image, background)


def open_image(source: PictureSource) -> Image.Image:
    """Read the header of an image like `read_image`: its size and mode, but not its pixels."""
    if isinstance(source, Image.Image):
        return source
    try:
        if isinstance(source, bytes):
            return Image.open(io.BytesIO(source), formats=readable_formats())
        check_regular(source)
        return Image.open(source, formats=readable_formats())
    # damaged files raise errors of any type
    except Exception as error:
        raise _as_bad_image(error) from error


def check_regular(path: str | os.PathLike) -> None:
    """Check that a path is a regular file before it is opened: reading a pipe or a device may never end.

    Raises:
        BadImage: If it is a folder, pipe, socket or device.
        OSError: If it does not exist.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise BadImage(f"'{path}' is {kind}, not a regular file")


@cache
def readable_formats() -> tuple[str, ...]:
    """Return Pillow's names of the supported formats."""
    Image.init()
    return tuple(name for name in Image.ID if name not in REFUSED_FORMATS)


@cache
def picture_extensions() -> frozenset[str]:
    """Return the extensions of files that count as images, in lower case, with their dot."""
    formats = set(readable_formats())
    known = {extension for extension, name in Image.registered_extensions().items() if name in formats}
    return frozenset(known | FOREIGN_EXTENSIONS)


def _decode(image: Image.Image, background: str) -> Image.Image:
    try:
        image.load()
        if image.getexif().get(ORIENTATION, 1) != 1:  # else `exif_transpose` returns a copy
            image = ImageOps.exif_transpose(image)
        return to_rgb(image, background)
    except Exception as error:
        raise _as_bad_image(error) from error


def _as_bad_image(error: Exception) -> BadImage:
    if isinstance(error, BadImage):
        return error
    if isinstance(error, UnidentifiedImageError):
        return BadImage("cannot identify it as an image of a known format")
    return BadImage(" ".join(f"{type(error).__name__}: {error}".split()))


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert any mode to RGB: 16 bits and floating point to 8 bits, transparent pixels to the background.

    An image that is RGB is returned as it is, not as a copy.

    Raises:
        BadImage: If it has values that are not finite, negative, or above 16 bits.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background))
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert a single-channel image of 16 or 32-bit integers or floats to L; to LA if one value is transparent."""
    values = np.asarray(image)
    white = white_of_floats(values) if image.mode == "F" else white_of_integers(values)
    pixels = (values * np.float32(255 / white)).round().clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, (int, float)):
        return Image.fromarray(pixels)
    opacity = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(pixels), Image.fromarray(opacity)])


def white_of_integers(values: Any) -> int:
    """Return the value of white, 255 or 65535: from the dtype, or for a wider one from the largest value.

    Args:
        values (`np.ndarray`): Integers.

    Raises:
        BadImage: If there are negative values, or ones above 16 bits.
    """
    if values.dtype in (np.uint8, np.uint16):
        return int(np.iinfo(values.dtype).max)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BadImage(f"it has integers from {low} to {high}, but should have 8 or 16 bits, from 0 to 65535")
    return 255 if high <= 255 else 65535


def white_of_floats(values: Any) -> int:
    """Return the value of white in a floating-point image, from the largest value: 1, 255 or 65535.

    Raises:
        BadImage: If values are not finite, negative, or above 65535.
    """
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise BadImage(f"{count} of its {values.size} values are not finite (NaN or infinite)")
    low, high = float(values.min()), float(values.max())
    if low < NEARLY_ZERO or high > 65535:
        raise BadImage(f"it has values from {low:g} to {high:g}, but should be in [0, 1], or go to 255 or 65535")
    return 1 if high <= NEARLY_ONE else 255 if high <= 255 else 65535
