"""Images in the cells of a data set, read by `utils.images`, and resized to the size of the batch."""

import os
import re
from typing import Any

import fsspec
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...utils import images as pictures
from ...utils.images import BadImage
from .data_config import Interpolation


# path of a file of a streamed data set, as given by `datasets`: in archives or not, of the repository {name} or local
STREAMED = r"(?:(?:zip|tar|gzip|bz2|xz|zstd|lz4)://(?:(?!::).)*::)*(?:hf://datasets/{name}[@/].*|(?:(?!://).)*)"


# Minimum ratio of decoded pixels to the target resolution: with fewer, details are lost.
OVERSAMPLING = 2
VECTORIZED = ("bilinear", "bicubic")  # filters that torch has for uint8, four times as fast as Pillow's


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
    part: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Crop an image to the largest part of this shape, and resize it with antialiasing: `(height, width, 3)` uint8.

    Values are those of Pillow's `ImageOps.fit`; up to 1 more or less where torch resizes, which takes whole images only,
    because Pillow's filters see what is around the part.

    Args:
        top (`float`): Vertical position of the part, from the top (0) to the bottom (1).
        left (`float`): Horizontal position of the part, from left (0) to right (1).
        interpolation (`str`): The filter, one of Pillow's.
        part (`tuple[int, int, int, int]`, *optional*): Top, left, bottom and right of what is returned of it.
    """
    y0, x0, y1, x1 = part or (0, 0, height, width)
    box = fit_box(image.size, (width, height), (left, top))
    if image.size == (width, height):
        return np.array(image.crop((x0, y0, x1, y1)))
    if box == (0, 0, *image.size) and interpolation in VECTORIZED:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        resized = (
            F.interpolate(pixels, (height, width), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()
        )
    else:
        resized = np.array(image.resize((width, height), Image.Resampling[interpolation.upper()], box=box))
    return resized[y0:y1, x0:x1]


def fit_box(
    size: tuple[int, int], wanted: tuple[int, int], place: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest part of an image that has another's shape.

    Args:
        size (`tuple[int, int]`): Width and height of the image.
        wanted (`tuple[int, int]`): Those of the shape.
        place (`tuple[float, float]`): Where the part lies from left (0) to right (1), and from top to bottom.
    """
    ratio = wanted[0] / wanted[1]
    width, height = min(size[0], ratio * size[1]), min(size[1], size[0] / ratio)
    left, top = (size[0] - width) * place[0], (size[1] - height) * place[1]
    return left, top, left + width, top + height


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
