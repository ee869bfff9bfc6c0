"""Sets of numbered images and captions: from a data set, from a file of captions, or generated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ..utils.arguments import bad_argument
from ..utils.images import BadImage, read_image


class PictureSet(Protocol):
    """Interface of numbered images and captions. Only captions are kept in memory."""

    name: str  # in reports
    has_pictures: bool

    def __len__(self) -> int: ...

    def caption(self, index: int) -> str:
        """Return the caption of an image; empty if there is none."""

    def picture(self, index: int) -> Image.Image:
        """Read an image as RGB; raise ValueError if it cannot be read."""

    def identity(self) -> dict[str, Any]:
        """Return the identity of this set as JSON, the key of its cached features."""


class CaptionList:
    """Captions without images."""

    has_pictures = False

    def __init__(self, captions: Sequence[str], name: str = "captions"):
        self.captions, self.name = list(captions), name

    def __len__(self) -> int:
        return len(self.captions)

    def caption(self, index: int) -> str:
        return self.captions[index]

    def picture(self, index: int) -> Image.Image:
        raise ValueError(f"`captions` is '{self.name}', which has no images.")

    def identity(self) -> dict[str, Any]:
        return {"captions": self.captions}


class PictureFiles:
    """Generated images in a folder, named by the number of their caption.

    Args:
        folder (`Path`): The folder.
        captions ([`PictureSet`]): Their captions.
        made_by (`dict`): Settings with which they were generated, part of their identity.
        name (`str`): Their name in reports.
    """

    has_pictures = True

    def __init__(self, folder: Path, captions: PictureSet, made_by: dict[str, Any], name: str):
        self.folder, self.captions, self.made_by, self.name = folder, captions, made_by, name

    def __len__(self) -> int:
        return len(self.captions)

    def path(self, index: int) -> Path:
        """Return the path of an image, whether it exists or not."""
        return self.folder / f"{index:08d}.png"

    def caption(self, index: int) -> str:
        return self.captions.caption(index)

    def picture(self, index: int) -> Image.Image:
        try:
            return read_image(self.path(index))
        except (BadImage, OSError) as error:
            raise ValueError(
                f"'{self.path(index)}' cannot be read: {error}; delete it to generate it again."
            ) from error

    def identity(self) -> dict[str, Any]:
        return {"made by": self.made_by, "pictures": self.folder.name}


def choose(name: str, count: int, wanted: int | None, seed: int) -> list[int]:
    """Choose rows: all of `count`, or `wanted` at random, in order.

    A larger number includes all rows of a smaller one, so that their images can be reused.

    Raises:
        ValueError: If there are too few rows; names the argument.
    """
    if wanted is None:
        return list(range(count))
    if wanted > count:
        raise bad_argument(name, wanted, f"at most {count:,}, the number of rows")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:wanted].tolist())


def fitted(picture: Image.Image, resolution: int) -> Image.Image:
    """Crop the largest centered square and resize it with antialiasing; an image of that size is returned unchanged."""
    size = (resolution, resolution)
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.BICUBIC)


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """Convert an image to `(3, H, W)` in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def from_tensor(pixels: torch.Tensor) -> Image.Image:
    """Convert `(3, H, W)` in [0, 1] to an image."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def resized(pixels: torch.Tensor, resolution: int) -> torch.Tensor:
    """Resize `(3, H, W)` in [0, 1] to `(3, resolution, resolution)`: bicubic, antialiased, as for pairs in training."""
    size = (resolution, resolution)
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def reduced(picture: Image.Image, resolution: int, low: int) -> Image.Image:
    """Downsample an image of `resolution` to `low`, as the low-resolution image of a super-resolution stage in training."""
    return from_tensor(resized(to_tensor(fitted(picture, resolution)), low))
