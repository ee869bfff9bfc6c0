"""The conditioning image of a super-resolution stage: reduced, cropped at the same place, and made worse on purpose."""

import functools
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from .data_config import DataConfig, Interpolation
from .slot_draws import BLUR, JPEG


MARGIN = 2  # low-resolution pixels around a crop, which its bicubic enlargement sees
# low-resolution pixels to each side that a filter of Pillow sees
SUPPORT = {"nearest": 0.5, "box": 0.5, "bilinear": 1.0, "hamming": 1.0, "bicubic": 2.0, "lanczos": 3.0}


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def reduce(images: torch.Tensor, factor: int, interpolation: Interpolation = "bicubic") -> torch.Tensor:
    """`(B, 3, H, W)` in [-1, 1] to `(B, 3, H / factor, W / factor)`, antialiased by any filter but "nearest"."""
    height, width = images.shape[-2] // factor, images.shape[-1] // factor
    if interpolation == "bicubic":
        return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
    rows, columns = (filter_weights(length, factor, interpolation) for length in (height, width))
    reduced = rows @ images[..., : height * factor, : width * factor] @ columns.T
    return reduced.clamp(-1, 1)


@functools.lru_cache(maxsize=64)
def filter_weights(length: int, factor: int, interpolation: Interpolation) -> torch.Tensor:
    """What each of `length` reduced pixels takes of each pixel, `(length, length * factor)`: Pillow's filters.

    The filter is as many times wider as the image is reduced, is cut at the border, and has the sum 1.
    """
    centers = torch.arange(length, dtype=torch.float64)[:, None] + 0.5
    places = (torch.arange(length * factor, dtype=torch.float64) + 0.5) / factor
    x, support = places - centers, SUPPORT[interpolation]  # in reduced pixels
    if interpolation == "nearest":
        first = (torch.arange(length) + 0.5).mul(factor).long()
        return F.one_hot(first, length * factor).float()
    if interpolation == "box":
        weights = torch.ones_like(x)
    elif interpolation == "bilinear":
        weights = 1 - x.abs()
    elif interpolation == "hamming":
        weights = torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x))
    else:
        weights = torch.sinc(x) * torch.sinc(x / 3)
    weights = weights * (x.abs() <= support)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def crop_both(
    pixels: torch.Tensor, factor: int, top: int, left: int, size: int, interpolation: Interpolation = "bicubic"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A crop and the same crop of the reduction with a margin, for one image; only the crop's surroundings are reduced.

    Args:
        pixels (`torch.Tensor`): `(3, H, W)` uint8.
        factor (`int`): H over the height of the reduction.
        top (`int`), left (`int`): The corner on the grid of the reduction.
        size (`int`): Height and width of the crop, in pixels of the image.
        interpolation (`str`): Filter of the reduction.

    Returns:
        `(3, size, size)` uint8, and `(3, size / factor + 2 MARGIN, size / factor + 2 MARGIN)` in [-1, 1].
    """
    small, reach = size // factor, MARGIN + math.ceil(SUPPORT[interpolation])
    first = [max(0, corner - reach) for corner in (top, left)]
    last = [min(length // factor, corner + small + reach) for length, corner in zip(pixels.shape[-2:], (top, left))]
    window = pixels[:, first[0] * factor : last[0] * factor, first[1] * factor : last[1] * factor]
    low_res = reduce(to_float(window)[None], factor, interpolation)[0]
    return crop(pixels, factor * top, factor * left, size), crop_wider(low_res, top - first[0], left - first[1], small)


def crop(image: torch.Tensor, top: int, left: int, size: int) -> torch.Tensor:
    """`(C, H, W)` to `(C, size, size)`."""
    return image[:, top : top + size, left : left + size]


def crop_wider(low_res: torch.Tensor, top: int, left: int, size: int) -> torch.Tensor:
    """`(C, h, w)` to `(C, size + 2 MARGIN, size + 2 MARGIN)`: a crop with what its enlargement sees around it.

    Outside of the image its outermost pixels are repeated, as in bicubic interpolation.
    """
    rows, columns = (
        torch.arange(corner - MARGIN, corner + size + MARGIN).clamp(0, length - 1)
        for corner, length in zip((top, left), low_res.shape[-2:])
    )
    return low_res[:, rows][:, :, columns]


def degrade(low_res: torch.Tensor, config: DataConfig, draws: np.ndarray) -> torch.Tensor:
    """Blur and JPEG of one `(3, h, w)` image in [-1, 1], as strong as the slot's draws `(DRAWS_PER_SLOT,)` say.

    A network that saw clean reductions only takes every artefact of the stage below, or of a user's file, for detail.
    """
    sigma = _between(config.degradation_blur_sigma, draws[BLUR])
    quality = _between(config.degradation_jpeg_quality, draws[JPEG])
    if sigma is None and quality is None:
        return low_res
    pixels = low_res.permute(1, 2, 0).mul(127.5).add(127.5).round().clamp(0, 255).byte()
    image = Image.fromarray(pixels.numpy())
    if sigma is not None:
        image = image.filter(ImageFilter.GaussianBlur(sigma))
    if quality is not None:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=round(quality))
        image = Image.open(file)
    return to_float(torch.from_numpy(np.array(image))).permute(2, 0, 1)


def _between(limits: list | None, uniform: float) -> float | None:
    return None if limits is None else limits[0] + (limits[1] - limits[0]) * float(uniform)
