"""Sets of numbered images and captions: those of a data set, of a file of captions, and those that were drawn."""

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
    """Images and captions by their number. Nothing of them but captions is kept in memory."""

    name: str  # in reports
    has_pictures: bool

    def __len__(self) -> int: ...

    def caption(self, index: int) -> str:
        """Return the caption of an image; empty if there is none."""

    def picture(self, index: int) -> Image.Image:
        """Return an image in RGB; ValueError if it cannot be read."""

    def identity(self) -> dict[str, Any]:
        """Return what tells this set from others, as JSON: what is cached of it belongs to this."""


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
        raise ValueError(f"`captions` is '{self.name}', which has no pictures.")

    def identity(self) -> dict[str, Any]:
        return {"captions": self.captions}


class PictureFiles:
    """Drawn images in a folder, named by the number of their caption.

    Args:
        folder (`Path`): Where they are.
        captions ([`PictureSet`]): What they are of.
        made_by (`dict`): What they were drawn with, which tells them from others.
        name (`str`): Their name in reports.
    """

    has_pictures = True

    def __init__(self, folder: Path, captions: PictureSet, made_by: dict[str, Any], name: str):
        self.folder, self.captions, self.made_by, self.name = folder, captions, made_by, name

    def __len__(self) -> int:
        return len(self.captions)

    def path(self, index: int) -> Path:
        """Return the file of an image, whether it is there or not."""
        return self.folder / f"{index:08d}.png"

    def caption(self, index: int) -> str:
        return self.captions.caption(index)

    def picture(self, index: int) -> Image.Image:
        try:
            return read_image(self.path(index))
        except (BadImage, OSError) as error:
            raise ValueError(
                f"'{self.path(index)}' cannot be read: {error}; delete it, and it is drawn anew."
            ) from error

    def identity(self) -> dict[str, Any]:
        return {"made by": self.made_by, "pictures": self.folder.name}


def choose(name: str, count: int, wanted: int | None, seed: int) -> list[int]:
    """Which of `count` rows are used: all, or `wanted` at random, in order.

    A larger number has all rows of a smaller one, so that what was drawn for them is of use again.

    Raises:
        ValueError: If there are fewer; names the argument.
    """
    if wanted is None:
        return list(range(count))
    if wanted > count:
        raise bad_argument(name, wanted, f"at most {count:,}, of which there are rows")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:wanted].tolist())


def fitted(picture: Image.Image, resolution: int) -> Image.Image:
    """Return the largest square at the centre, resized with antialiasing; an image of that size as it is."""
    size = (resolution, resolution)
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.BICUBIC)


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """Return an image as `(3, H, W)` in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def from_tensor(pixels: torch.Tensor) -> Image.Image:
    """`(3, H, W)` in [0, 1] as an image."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def resized(pixels: torch.Tensor, resolution: int) -> torch.Tensor:
    """`(3, H, W)` in [0, 1] to `(3, resolution, resolution)`: bicubic, antialiased, as training makes its pairs."""
    size = (resolution, resolution)
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def reduced(picture: Image.Image, resolution: int, low: int) -> Image.Image:
    """Return an image of `resolution`, as training would give it to a stage that upsamples images of `low`."""
    return from_tensor(resized(to_tensor(fitted(picture, resolution)), low))
