"""Reading of the caller's images and masks, and resizing to the size of a stage."""

import math
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import logging

from ..utils.arguments import class_of
from ..utils.images import BadImage, read_image, white_of_integers


logger = logging.get_logger(__name__)

MAX_PIXELS = 2**27  # of one image: 11,585 px squared, 1.5 GiB in float32, of which reading has a few copies

ImageInput = (
    PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image] | list[np.ndarray] | list[torch.Tensor]
)


class GivenImages(NamedTuple):
    """Images of the caller, one for all prompts or one per prompt, each with its own size; any number without text.

    `pixels` are `(3, H, W)` in [-1, 1]; `repainted` are `(1, H, W)` with 1 where an image is to be repainted and 0
    where it is to be kept, or None.
    """

    pixels: list[torch.Tensor]
    repainted: list[torch.Tensor] | None = None

    @property
    def number(self) -> int:
        """Number of images, or of masks if there are more."""
        return max(len(self.pixels), len(self.repainted or ()))

    def resized(self, size: tuple[int, int], num_images: int, device: torch.device) -> torch.Tensor:
        """Return the images as `(num_images, 3, *size)` in float32."""
        images = torch.stack([resize(image, size) for image in self.pixels])
        return images.repeat_interleave(num_images // len(images), dim=0).to(device)

    def mask(self, size: tuple[int, int], num_images: int, device: torch.device) -> torch.Tensor:
        """Return the masks as `(num_images, 1, *size)`: True for pixels of which any part is to be repainted."""
        masks = torch.stack([F.interpolate(mask[None], size, mode="area")[0] > 0 for mask in self.repainted or ()])
        return masks.repeat_interleave(num_images // len(masks), dim=0).to(device)

    def are_as_large_as(self, size: tuple[int, int]) -> bool:
        """Return whether every image has at least this height and width, so that resizing does not enlarge any."""
        return all(image.shape[-2] >= size[0] and image.shape[-1] >= size[1] for image in self.pixels)


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize `(3, H, W)` to `(3, *size)`, bicubic and antialiased, like the low-resolution images in training."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)


def read_given(image: ImageInput, mask_image: ImageInput | None, num_prompts: int | None) -> GivenImages:
    """Read and check the caller's images and masks.

    Args:
        image: One image for all prompts or one per prompt.
        mask_image: Masks like `image`, or None.
        num_prompts: Number of prompts; None without text, in which case any number of images is accepted.

    Raises:
        ValueError: For unreadable images, a number of images that is neither one nor one per prompt, masks of another
            size or number than the images, and masks without a pixel to repaint.
    """
    pixels = read_images(image)
    masks = [] if mask_image is None else read_masks(mask_image, num_prompts or len(pixels))
    if num_prompts is not None:
        counted, number = f"the number of prompts is {num_prompts}", num_prompts
    else:
        counted, number = f"`image` has {len(pixels)}", len(pixels) if len(pixels) > 1 else max(1, len(masks))
    check_number("image", len(pixels), number, counted)
    if mask_image is None:
        return GivenImages(pixels)
    check_number("mask_image", len(masks), number, counted)
    for i in range(max(len(pixels), len(masks))):
        picture, mask = pixels[i % len(pixels)], masks[i % len(masks)]
        if picture.shape[-2:] != mask.shape[-2:]:
            raise ValueError(
                f"`mask_image` is {mask.shape[-2]}x{mask.shape[-1]} (height x width), but `image` is "
                f"{picture.shape[-2]}x{picture.shape[-1]}: they should have the same size."
            )
        if not mask.any():
            raise ValueError(
                "`mask_image` has no pixels to repaint: they should be white, 1.0 in floating point or 255 in uint8."
            )
    return GivenImages(pixels, masks)


def check_number(name: str, number: int, expected: int, counted: str) -> None:
    """Check that there is one image for all prompts, or one per prompt; `counted` describes the number `expected`."""
    if number not in (1, expected):
        alternative = f" or {expected}" if expected > 1 else ""
        raise ValueError(f"`{name}` has {number} images, but {counted}: pass 1{alternative}.")


def warn_of_stretching(given: GivenImages, size: tuple[int, int], last_size: tuple[int, int]) -> None:
    """Log a warning if resizing changes the aspect ratio of an image by more than a pixel."""
    for image in given.pixels:
        height, width = image.shape[-2:]
        if abs(height * size[1] - width * size[0]) > max(height, width):
            logger.warning(
                f"`image` is {height}x{width} (height x width) and is stretched to {size[0]}x{size[1]}: pass `height` "
                f"and `width` with its aspect ratio, or crop it. They are {last_size[0]} and {last_size[1]}."
            )
            return


def read_images(image: ImageInput) -> list[torch.Tensor]:
    """Convert images to a list of `(3, H, W)` in [-1, 1], float32 on the CPU.

    PIL images of any mode are read as in training: upright, 16 bits reduced to 8, transparency on white. Arrays have
    channels last and tensors first; integers have 8 or 16 bits, according to their type or their largest value, and
    floating-point values are in [0, 1], or in [-1, 1] if any value of the image is negative.
    """
    return [read_one("image", item) for item in _each("image", image)]


def read_masks(mask_image: ImageInput, num_prompts: int = 1) -> list[torch.Tensor]:
    """
    Convert masks to a list of `(1, H, W)`: 1 where at least half white, else 0; accepts images, or arrays without
    channels.

    A tensor of three dimensions is a batch `(B, H, W)`, except for `(3, H, W)` with a number of prompts other than
    three:
    that is a single mask in RGB.
    """
    masks = []
    for item in _each("mask_image", mask_image, num_prompts):
        values = read_one("mask_image", item, is_mask=True)
        masks.append((values.mean(dim=0, keepdim=True) >= 0.5).float())
    return masks


def _each(name: str, images: Any, num_prompts: int = 1) -> list:
    """Return the images of a list or a batch."""
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"`{name}` is an empty list.")
        return [single for item in images for single in _each(name, item)]
    if isinstance(images, (np.ndarray, torch.Tensor)):
        if images.ndim == 4 or (name == "mask_image" and _is_batch_of_masks(images, num_prompts)):
            if len(images) == 0:
                raise ValueError(f"`{name}` has shape {tuple(images.shape)}, which is an empty batch.")
            return list(images)
        return [images]
    if isinstance(images, PIL.Image.Image):
        return [images]
    raise ValueError(f"`{name}` is {class_of(images)}, but should be a PIL image, an array, a tensor or a list.")


def _is_batch_of_masks(masks: np.ndarray | torch.Tensor, num_prompts: int) -> bool:
    """Return whether three dimensions are a batch without channels, not a single mask with channels."""
    if masks.ndim != 3:
        return False
    if isinstance(masks, np.ndarray):
        return masks.shape[-1] not in (1, 3)
    return masks.shape[0] not in (1, 3) or masks.shape[0] == num_prompts == 3


def read_one(name: str, image: PIL.Image.Image | np.ndarray | torch.Tensor, is_mask: bool = False) -> torch.Tensor:
    """Convert one image to `(3, H, W)` in float32, in [-1, 1]; a mask to `(3 or 1, H, W)` in [0, 1].

    Raises:
        ValueError: For shapes, types or values that `read_images` does not describe, and more than `MAX_PIXELS`.
    """
    shape: tuple[int, ...]
    if isinstance(image, PIL.Image.Image):
        shape, limit = (image.height, image.width), MAX_PIXELS
    else:
        shape, limit = tuple(image.shape), 3 * MAX_PIXELS
    if math.prod(shape) > limit:  # before it is copied
        raise ValueError(
            f"`{name}` has shape {shape}, but should have at most {MAX_PIXELS} pixels: pass a smaller image."
        )
    try:
        if isinstance(image, PIL.Image.Image):
            image = np.asarray(read_image(image).convert("L" if is_mask else "RGB"))
        values = to_numbers(name, image)
        shape = tuple(values.shape)
        if len(shape) != 3 or shape[0] not in (1, 3) or 0 in shape:
            raise ValueError(
                f"`{name}` has shape {shape} (channels first), but should have 3 channels{', or 1' * is_mask}, height "
                "and width."
            )
        values = to_unit_range(name, values)
    except BadImage as error:
        raise ValueError(f"`{name}` cannot be used: {error}.") from error
    is_signed = bool(values.min() < 0)
    if is_mask and is_signed:
        raise ValueError(f"`{name}` has values down to {values.min():g}, below 0.")
    if is_mask:
        return values
    return (values if is_signed else values * 2 - 1).expand(3, -1, -1)


def to_numbers(name: str, image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Convert an array, channels last, or a tensor, channels first, to a tensor on the CPU, channels first."""
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "buif":
            raise ValueError(f"`{name}` is an array of {image.dtype}, but should have real numbers.")
        # torch supports only the machine's byte order and at most 64 bits
        image = np.array(image, dtype=np.float64 if image.dtype.itemsize > 8 else image.dtype.newbyteorder("="))
        image = torch.from_numpy(image)
        return image.movedim(-1, 0) if image.ndim == 3 else image[None]
    if image.is_meta or image.layout != torch.strided or image.is_complex() or image.is_quantized:
        kind = "without values (on the meta device)" if image.is_meta else f"of {image.layout}, {image.dtype}"
        raise ValueError(f"`{name}` is a tensor {kind}, but should be a dense one of real numbers.")
    image = image.detach().cpu()
    return image[None] if image.ndim == 2 else image


def to_unit_range(name: str, values: torch.Tensor) -> torch.Tensor:
    """Convert numbers of any type to float32 in [0, 1]; values already in [-1, 1] are kept."""
    if values.dtype.is_floating_point or values.dtype == torch.bool:
        values, white = values.to(torch.float32), 1
    elif values.dtype in (torch.uint8, torch.uint16):
        values, white = values.to(torch.float32), int(torch.iinfo(values.dtype).max)
    else:
        values = values.to(torch.int64)
        white = 1 if values.abs().max() <= 1 else white_of_integers(values.numpy())
        values = values.to(torch.float32)
    if not values.isfinite().all():
        raise ValueError(f"`{name}` has values that are not finite (NaN or infinite).")
    values = values / white
    if values.abs().max() > 1:
        raise ValueError(
            f"`{name}` has values from {values.min():g} to {values.max():g}, but should be integers of 8 or 16 bits, "
            "or floating point in [0, 1] or [-1, 1]."
        )
    return values
