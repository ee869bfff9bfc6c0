"""The conditioning image of a super-resolution stage: reduced, cropped at the same place, and made worse on purpose."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from .data_config import DataConfig
from .slot_draws import BLUR, JPEG


SUPPORT = 2  # a bicubic reduction, and an enlargement too, sees so many low-resolution pixels to each side


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def reduce(images: torch.Tensor, factor: int) -> torch.Tensor:
    """`(B, 3, H, W)` in [-1, 1] to `(B, 3, H / factor, W / factor)`, antialiased."""
    size = (images.shape[-2] // factor, images.shape[-1] // factor)
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)


def crop_both(pixels: torch.Tensor, factor: int, top: int, left: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A crop and the same crop of the reduction with a margin, for one image; only the crop's surroundings are reduced.

    Args:
        pixels (`torch.Tensor`): `(3, H, W)` uint8.
        factor (`int`): H over the height of the reduction.
        top (`int`), left (`int`): The corner on the grid of the reduction.
        size (`int`): Height and width of the crop, in pixels of the image.

    Returns:
        `(3, size, size)` uint8, and `(3, size / factor + 2 SUPPORT, size / factor + 2 SUPPORT)` in [-1, 1].
    """
    small, reach = size // factor, 2 * SUPPORT
    first = [max(0, corner - reach) for corner in (top, left)]
    last = [min(length // factor, corner + small + reach) for length, corner in zip(pixels.shape[-2:], (top, left))]
    window = pixels[:, first[0] * factor : last[0] * factor, first[1] * factor : last[1] * factor]
    low_res = reduce(to_float(window)[None], factor)[0]
    return crop(pixels, factor * top, factor * left, size), crop_wider(low_res, top - first[0], left - first[1], small)


def crop(image: torch.Tensor, top: int, left: int, size: int) -> torch.Tensor:
    """`(C, H, W)` to `(C, size, size)`."""
    return image[:, top : top + size, left : left + size]


def crop_wider(low_res: torch.Tensor, top: int, left: int, size: int) -> torch.Tensor:
    """`(C, h, w)` to `(C, size + 2 SUPPORT, size + 2 SUPPORT)`: a crop with what its enlargement sees around it.

    Outside of the image its outermost pixels are repeated, as in bicubic interpolation.
    """
    rows, columns = (
        torch.arange(corner - SUPPORT, corner + size + SUPPORT).clamp(0, length - 1)
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
