"""Images in the cells of a data set, read by `utils.images`, and resized to the size of the batch."""

import os
import re
from typing import Any

import fsspec
import numpy as np
from PIL import Image, ImageOps

from ...utils import images as pictures
from ...utils.images import BadImage
from .data_config import Interpolation


# path of a file of a streamed data set, as given by `datasets`: in archives or not, of the repository {name} or local
STREAMED = r"(?:(?:zip|tar|gzip|bz2|xz|zstd|lz4)://(?:(?!::).)*::)*(?:hf://datasets/{name}[@/].*|(?:(?!://).)*)"


# Minimum ratio of decoded pixels to the target resolution: with fewer, details are lost.
OVERSAMPLING = 2


def read_image(value: Any, folder: str = "", background: str = "white") -> Image.Image:
    """Read the image in a data set's cell, upright, as RGB.

    Args:
        value (`str`, `bytes`, `dict` or `PIL.Image.Image`):
            A path, bytes of a file, or a value as returned by `datasets`.
        folder (`str`): Base folder of relative paths, which paths must not leave; without it any path is accepted.
        background (`str`): Background color of transparent images.

    Raises:
        BadImage: If it cannot be read completely, or the cell does not name a file of the data set.
    """
    return pictures.read_image(find_source(value, folder), background)


def open_image(value: Any, folder: str = "") -> Image.Image:
    """Open an image like `read_image`, but read only the header, which has size and mode."""
    return pictures.open_image(find_source(value, folder))


def find_source(value: Any, folder: str) -> str | bytes | Image.Image:
    """Return the file, bytes or image of a cell.

    Raises:
        BadImage: If it has none, or a file that is not part of the data set.
    """
    if isinstance(value, (bytes, Image.Image)):
        return value
    if isinstance(value, str):
        return check_path(value, folder)
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            if not data:
                raise BadImage("there is no image")
            return data
        if isinstance(path, str):
            return read_streamed(path, folder) if "://" in path else os.path.join(folder, path)
        value = path
    if value is None:
        raise BadImage("the cell is empty")
    raise BadImage(f"the cell has {type(value).__name__}, which is neither a path nor an image")


def check_path(path: str, folder: str) -> str:
    """Return the absolute path of a file that a row names by its path in `folder`.

    Rows are untrusted: they cannot refer to other machines, or to files outside the folder.
    """
    if "://" in path:
        raise BadImage(f"{path!r} is a URL, but only files of the data set are read: download it first")
    if not folder:
        return path
    root, full = os.path.abspath(folder), os.path.abspath(os.path.join(folder, path))
    if full != root and not full.startswith(os.path.join(root, "")):
        raise BadImage(f"{path!r} is outside the data set's folder: move or link the image into it")
    return full


def read_streamed(path: str, name: str) -> bytes:
    """Read a file that `datasets` streams from its own repository, or from a local archive."""
    if not re.fullmatch(STREAMED.format(name=re.escape(name)), path, re.DOTALL):
        raise BadImage(f"{path!r} is a URL, but only files of the data set are read: download it first")
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    # archives and file systems raise errors of any type
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def name_image(value: Any, row: Any) -> str:
    """Return the name of an image in reports: its path, or its row."""
    if isinstance(value, dict):
        value = value.get("path")
    return value if isinstance(value, str) and value else f"row {row}"


def fit_image(
    image: Image.Image,
    height: int,
    width: int,
    top: float = 0.5,
    left: float = 0.5,
    interpolation: Interpolation = "bicubic",
) -> np.ndarray:
    """Crop an image to the largest part of this shape, and resize it with antialiasing: `(height, width, 3)` uint8.

    Args:
        top (`float`): Vertical position of the part, from the top (0) to the bottom (1).
        left (`float`): Horizontal position of the part, from left (0) to right (1).
        interpolation (`str`): The filter, one of Pillow's.
    """
    method = Image.Resampling[interpolation.upper()]
    fitted = ImageOps.fit(image, (width, height), method, centering=(left, top))
    return np.asarray(fitted)


def read_fitting(
    value: Any, size: tuple[int, int], folder: str = "", background: str = "white", min_resolution: int | None = None
) -> Image.Image:
    """Read an image like `read_image`, with at least the pixels that `fit_image` needs for that height and width.

    A JPEG file with more than twice as many is decoded at 1/2, 1/4 or 1/8 of its size, which is much faster.

    Raises:
        BadImage: As `read_image`, and for an image whose height or width is below `min_resolution`.
    """
    source = find_source(value, folder)  # only once, because a streamed file is read here
    if isinstance(source, Image.Image):
        check_size(source, min_resolution)
        return pictures.read_image(source, background)
    with pictures.open_image(source) as image:
        check_size(image, min_resolution)
        enough = OVERSAMPLING * max(size)
        image.draft(None, (enough, enough))  # has no effect on formats other than JPEG
        return pictures.read_image(image, background)


def check_size(image: Image.Image, min_resolution: int | None) -> None:
    """Raise BadImage for an image whose height or width is too small."""
    if min_resolution is not None and min(image.size) < min_resolution:
        raise BadImage(f"{image.width}x{image.height} is below `min_resolution` {min_resolution}")
