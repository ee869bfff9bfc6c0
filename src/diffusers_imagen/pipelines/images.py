"""Images and masks that a caller gives, read and brought to the size of a stage."""

from typing import Any, NamedTuple, Optional, Union

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import logging


logger = logging.get_logger(__name__)

ImageInput = Union[
    PIL.Image.Image, np.ndarray, torch.Tensor, list[PIL.Image.Image], list[np.ndarray], list[torch.Tensor]
]


class GivenImages(NamedTuple):
    """Images of the caller, one for all prompts or one a prompt, each in its own size.

    `pixels` are `(3, H, W)` in [-1, 1]; `repainted` are `(1, H, W)` with 1 where an image is to be painted anew, 0 where
    it is to be kept, or None.
    """

    pixels: list[torch.Tensor]
    repainted: Optional[list[torch.Tensor]] = None

    def resized(self, size: tuple[int, int], num_images: int, device: torch.device) -> torch.Tensor:
        """`(num_images, 3, *size)` in float32."""
        images = torch.stack([resize(image, size) for image in self.pixels])
        return images.repeat_interleave(num_images // len(images), dim=0).to(device)

    def mask(self, size: tuple[int, int], num_images: int, device: torch.device) -> torch.Tensor:
        """`(num_images, 1, *size)`, True where a pixel is to be painted anew: wherever some of its area is."""
        masks = torch.stack([F.interpolate(mask[None], size, mode="area")[0] > 0 for mask in self.repainted])
        return masks.repeat_interleave(num_images // len(masks), dim=0).to(device)

    def are_as_large_as(self, size: tuple[int, int]) -> bool:
        """Whether every image has at least as many pixels on both sides, so that resizing invents none."""
        return all(image.shape[-2] >= size[0] and image.shape[-1] >= size[1] for image in self.pixels)


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`(3, H, W)` to `(3, *size)`, bicubic and antialiased, as training makes its low-resolution images."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)


def read_given(image: Optional[ImageInput], mask_image: Optional[ImageInput], num_prompts: int) -> GivenImages:
    """Images and masks of a caller, checked.

    Raises:
        ValueError: for what cannot be read, images that are neither one nor one a prompt, and masks of another size or
            number than the images, or that leave nothing to paint.
    """
    pixels = read_images(image)
    check_number("image", len(pixels), num_prompts)
    if mask_image is None:
        return GivenImages(pixels)
    masks = read_masks(mask_image)
    check_number("mask_image", len(masks), num_prompts)
    for i in range(max(len(pixels), len(masks))):
        picture, mask = pixels[i % len(pixels)], masks[i % len(masks)]
        if picture.shape[-2:] != mask.shape[-2:]:
            raise ValueError(
                f"`mask_image` is {mask.shape[-2]}x{mask.shape[-1]} (height x width), but `image` is "
                f"{picture.shape[-2]}x{picture.shape[-1]}: both must have one size."
            )
        if not mask.any():
            raise ValueError(
                "`mask_image` has no pixel to paint anew: those are white, 1.0 in floating point or 255 in uint8."
            )
    return GivenImages(pixels, masks)


def check_number(name: str, number: int, num_prompts: int) -> None:
    """One for all prompts, or one for each."""
    if number not in (1, num_prompts):
        raise ValueError(
            f"`{name}` has {number} images, but there are {num_prompts} prompts: give 1 or {num_prompts}."
        )


def warn_of_stretching(given: GivenImages, size: tuple[int, int], last_size: tuple[int, int]) -> None:
    """Says when an image changes its proportions by more than a pixel."""
    for image in given.pixels:
        height, width = image.shape[-2:]
        if abs(height * size[1] - width * size[0]) > max(height, width):
            logger.warning(
                f"`image` is {height}x{width} (height x width) and is stretched to {size[0]}x{size[1]}: give `height` "
                f"and `width` in its proportions, or crop it. Now they are {last_size[0]} and {last_size[1]}."
            )
            return


def read_images(image: ImageInput) -> list[torch.Tensor]:
    """Each image as `(3, H, W)` in [-1, 1], float32 on the CPU.

    PIL images and uint8 arrays have values to 255; floating-point ones are in [0, 1], or in [-1, 1] if any is negative.
    Arrays have channels last, tensors first; transparency is put on white, as in training.
    """
    arrays = [_to_array("image", item, channels=3) for item in _each("image", image)]
    if not any(array.min() < 0 for array in arrays):
        arrays = [array * 2 - 1 for array in arrays]
    return arrays


def read_masks(mask_image: ImageInput) -> list[torch.Tensor]:
    """Each mask as `(1, H, W)`, 1 where it is at least half white, else 0; in the forms of images, or without channels."""
    arrays = [_to_array("mask_image", item, channels=1) for item in _each("mask_image", mask_image)]
    if any(array.min() < 0 for array in arrays):
        raise ValueError(f"`mask_image` has values down to {min(a.min().item() for a in arrays):g}, below 0.")
    return [(array >= 0.5).float() for array in arrays]


def _each(name: str, images: Any) -> list:
    """The images of a list or of a batch."""
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"`{name}` is an empty list.")
        return [single for item in images for single in _each(name, item)]
    if isinstance(images, (np.ndarray, torch.Tensor)):
        # a mask may come without channels: three dimensions are then a batch of them, unless one can be the channels
        channels = images.shape[-1 if isinstance(images, np.ndarray) else 0] if images.ndim == 3 else 0
        if images.ndim == 4 or (images.ndim == 3 and name == "mask_image" and channels not in (1, 3)):
            return list(images)
        return [images]
    if isinstance(images, PIL.Image.Image):
        return [images]
    raise ValueError(
        f"`{name}` is a {type(images).__name__}, but should be a PIL image, an array, a tensor or a list."
    )


def _to_array(name: str, image: Union[PIL.Image.Image, np.ndarray, torch.Tensor], channels: int) -> torch.Tensor:
    """One image as `(channels, H, W)` in float32, [0, 1] or as it was given."""
    if isinstance(image, PIL.Image.Image):
        image = np.array(_on_white(image) if channels == 3 else image.convert("L"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image))
        image = image[None] if image.ndim == 2 else image.movedim(-1, 0)
    elif image.ndim == 2:
        image = image[None]
    shape = tuple(image.shape)
    if image.ndim != 3 or shape[0] not in (1, 3) or 0 in shape:
        raise ValueError(
            f"`{name}` has shape {shape} (channels first), but should have 3 channels{', or 1' * (channels == 1)}, "
            "height and width."
        )
    values = image.detach().to("cpu", torch.float32)
    if image.dtype == torch.uint8:
        values = values / 255
    if not values.isfinite().all():
        raise ValueError(f"`{name}` has values that are not finite (NaN or infinite).")
    if values.abs().max() > 1:
        raise ValueError(
            f"`{name}` has values from {values.min():g} to {values.max():g}, but should be uint8, or floating point in "
            "[0, 1] or [-1, 1]."
        )
    if channels == 1:
        return values.mean(dim=0, keepdim=True)
    return values.expand(3, -1, -1)


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in RGB, transparency on white."""
    if "A" in image.getbands() or "transparency" in image.info:
        canvas = PIL.Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")
