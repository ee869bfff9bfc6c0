"""Low-resolution images for training super-resolution: downsampled, cropped with their image, and degraded."""

import functools
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from .data_config import DataConfig, Interpolation
from .slot_draws import BLUR, JPEG


MARGIN = 2  # low-resolution pixels around a crop, used by its bicubic upsampling
# support of Pillow's filters to each side, in low-resolution pixels
SUPPORT = {"nearest": 0.5, "box": 0.5, "bilinear": 1.0, "hamming": 1.0, "bicubic": 2.0, "lanczos": 3.0}


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 to [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def reduce(images: torch.Tensor, factor: int, interpolation: Interpolation = "bicubic") -> torch.Tensor:
    """Downsample `(B, 3, H, W)` in [-1, 1] to `(B, 3, H / factor, W / factor)`, antialiased except for "nearest"."""
    height, width = images.shape[-2] // factor, images.shape[-1] // factor
    if interpolation == "bicubic":
        return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
    rows, columns = (filter_weights(length, factor, interpolation).to(images.device) for length in (height, width))
    reduced = rows @ images[..., : height * factor, : width * factor] @ columns.T
    return reduced.clamp(-1, 1)


@functools.lru_cache(maxsize=64)
def filter_weights(length: int, factor: int, interpolation: Interpolation) -> torch.Tensor:
    """Return the weights of pixels in each of `length` reduced pixels, `(length, length * factor)`: Pillow's filters.

    The filter is scaled by the factor, cut at the border, and normalized to the sum 1.
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
    """
    Return a crop of an image, and the same crop of its low-resolution image with a margin; downsamples only this part.

    Args:
        pixels (`torch.Tensor`): `(3, H, W)` uint8.
        factor (`int`): Ratio of H to the height of the low-resolution image.
        top (`int`), left (`int`): The corner, in low-resolution pixels.
        size (`int`): Height and width of the crop, in pixels of the image.
        interpolation (`str`): Filter for downsampling.

    Returns:
        `(3, size, size)` uint8, and `(3, size / factor + 2 MARGIN, size / factor + 2 MARGIN)` in [-1, 1].
    """
    part = surroundings(pixels.shape[-2:], factor, (top, left), size, interpolation)
    window = pixels[:, part[0] : part[2], part[1] : part[3]]
    low_res = reduce(to_float(window)[None], factor, interpolation)[0]
    place = top - part[0] // factor, left - part[1] // factor
    return crop(pixels, factor * top, factor * left, size), crop_wider(low_res, *place, size // factor)


def surroundings(
    shape: tuple[int, ...], factor: int, corner: tuple[int, int], size: int, interpolation: Interpolation = "bicubic"
) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of what a crop's low-resolution image depends on, in pixels of the image.

    Args:
        shape (`tuple[int, ...]`): Height and width of the image.
        corner (`tuple[int, int]`): Top and left of the crop on the grid of the reduction.
        factor (`int`), size (`int`), interpolation (`str`): As `crop_both`.
    """
    reach = MARGIN + math.ceil(SUPPORT[interpolation])
    top, left = (factor * max(0, start - reach) for start in corner)
    bottom, right = (
        factor * min(length // factor, start + size // factor + reach) for length, start in zip(shape, corner)
    )
    return top, left, bottom, right


def crop(image: torch.Tensor, top: int, left: int, size: int) -> torch.Tensor:
    """Crop `(C, H, W)` to `(C, size, size)`."""
    return image[:, top : top + size, left : left + size]


def crop_wider(low_res: torch.Tensor, top: int, left: int, size: int) -> torch.Tensor:
    """Crop `(C, h, w)` to `(C, size + 2 MARGIN, size + 2 MARGIN)`: a crop with the margin that its upsampling uses.

    Outside the image the border pixels are repeated, as in bicubic interpolation.
    """
    rows, columns = (
        torch.arange(corner - MARGIN, corner + size + MARGIN).clamp(0, length - 1)
        for corner, length in zip((top, left), low_res.shape[-2:])
    )
    return low_res[:, rows][:, :, columns]


def degrade(low_res: torch.Tensor, config: DataConfig, draws: np.ndarray) -> torch.Tensor:
    """
    Apply blur and JPEG compression to a `(3, h, w)` image in [-1, 1], with the strength drawn for the slot
    `(DRAWS_PER_SLOT,)`.

    A network trained only on clean downsampled images treats artifacts of the previous stage, or of a user's file, as
    detail.
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
