"""Samples: images and captions, from a row and the random numbers of its slot."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from .batch import Sample
from .captions import caption_text, speaks_of_sides
from .data_config import DataConfig
from .pixels import fit_image, read_fitting, read_image
from .pyramid import crop, crop_both, crop_wider, degrade, reduce, surroundings, to_float
from .slot_draws import CAPTION, CROP_LEFT, CROP_TOP, FLIP, PLACE_LEFT, PLACE_TOP, cumulate, pick, whole


class SampleMaker:
    """Creates the sample of a row.

    Args:
        config (`DataConfig`): Configuration of the processing.
        image_column (`str`): Column with images.
        folder (`str`): Base folder of relative file names.
        with_text (`bool`): Whether captions are used.
        augment (`bool`): Whether images are flipped and cropped at random, and low-resolution images degraded.
    """

    def __init__(self, config: DataConfig, image_column: str, folder: str, with_text: bool, augment: bool = True):
        self.config = config
        self.image_column = image_column
        self.folder = folder
        self.with_text = with_text
        self.augment = augment
        self.degrades = augment and bool(config.degradation_blur_sigma or config.degradation_jpeg_quality)
        self.changes_samples = self.degrades or augment and config.random_flip
        self.column_edges = cumulate(config.caption_probabilities or [1.0] * len(config.caption_column))

    def __call__(self, row: dict[str, Any], draws: np.ndarray, shape: tuple[int, int] | None = None) -> Sample:
        """Return the sample of a row.

        Args:
            row (`dict`): A row of the data set.
            draws (`np.ndarray`): `(DRAWS_PER_SLOT,)`, the slot's random numbers.
            shape (`tuple[int, int]`, *optional*): Height and width of its bucket; by default a square of `resolution`.

        Raises:
            BadImage: If the image cannot be used.
            BadCaption: If the cell has no caption.
        """
        caption = self.caption(row, draws)
        pixels, low_res = self.images(row, draws, shape or (self.config.resolution, self.config.resolution))
        return self.finish(pixels, low_res, caption, draws)

    def caption(self, row: dict[str, Any], draws: np.ndarray) -> str | None:
        """Return the row's caption in the column that is drawn for the slot."""
        if not self.with_text:
            return None
        return self.captions(row)[int(self.columns(draws))]

    def captions(self, row: dict[str, Any]) -> list[str]:
        """Return the row's captions, one per column.

        Raises:
            BadCaption: If any of them is missing: such a row is never used.
        """
        return [caption_text(row[column]) for column in self.config.caption_column]

    def columns(self, draws: np.ndarray) -> np.ndarray:
        """Return the caption column drawn for each slot."""
        return pick(self.column_edges, draws[..., CAPTION])

    def pixels(
        self,
        row: dict[str, Any],
        draws: np.ndarray | None = None,
        shape: tuple[int, int] | None = None,
        part: tuple[int, int, int, int] | None = None,
    ) -> torch.Tensor:
        """Return the row's image, or a part of it, cropped and resized: `(3, H, W)` uint8."""
        size = shape or (self.config.resolution, self.config.resolution)
        where = self.folder, self.config.background
        image = read_fitting(row[self.image_column], size, *where, self.config.min_resolution)
        return self.fit(image, *size, draws, part)

    def low_resolution(
        self, row: dict[str, Any], draws: np.ndarray | None = None, shape: tuple[int, int] | None = None
    ) -> torch.Tensor | None:
        """Return the row's low-resolution image, if any, cropped and resized like its image: `(3, h, w)` uint8."""
        if self.config.low_resolution_column is None:
            return None
        image = read_image(row[self.config.low_resolution_column], self.folder, self.config.background)
        height, width = shape or (self.config.resolution, self.config.resolution)
        return self.fit(image, height // self.config.factor, width // self.config.factor, draws)

    def fit(
        self,
        image: Image.Image,
        height: int,
        width: int,
        draws: np.ndarray | None,
        part: tuple[int, int, int, int] | None = None,
    ) -> torch.Tensor:
        """
        Crop and resize an image, at the position drawn for the slot, and return it or a part: `(3, height, width)` uint8.
        """
        place = (0.5, 0.5)
        if draws is not None and self.augment and not self.config.center_crop:
            place = (draws[PLACE_TOP], draws[PLACE_LEFT])
        fitted = fit_image(image, height, width, *place, self.config.image_interpolation_mode, part)
        return torch.from_numpy(fitted).permute(2, 0, 1)

    def images(
        self, row: dict[str, Any], draws: np.ndarray, shape: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Return the image or a crop of it as uint8, and its low-resolution image in [-1, 1]: the row's, or downsampled.

        The latter is None without super-resolution, and if `Samples.finish` downsamples whole batches.
        """
        size, factor, interpolation = self.config.crop_size, self.config.factor, self.config.image_interpolation_mode
        given = self.low_resolution(row, draws, shape)
        if size is None:
            pixels = self.pixels(row, draws, shape)
            if given is not None:
                return pixels, to_float(given)
            return pixels, reduce(to_float(pixels)[None], factor, interpolation)[0] if self.degrades else None
        top, left = self.corner(shape, draws)
        if given is not None:
            image = crop(self.pixels(row, draws, shape), factor * top, factor * left, size)
            return image, crop_wider(to_float(given), top, left, size // factor)
        part = surroundings(shape, factor, (top, left), size, interpolation)
        window = self.pixels(row, draws, shape, part)
        return crop_both(window, factor, top - part[0] // factor, left - part[1] // factor, size, interpolation)

    def corner(self, shape: tuple[int, ...], draws: np.ndarray) -> tuple[int, int]:
        """Return top and left of the slot's crop of an image `(height, width)`, in low-resolution pixels."""
        size, factor = self.config.crop_size or 0, self.config.factor
        height, width = ((length - size) // factor for length in shape)
        return int(whole(draws[CROP_TOP], height + 1)), int(whole(draws[CROP_LEFT], width + 1))

    def finish(
        self, pixels: torch.Tensor, low_res: torch.Tensor | None, caption: str | None, draws: np.ndarray
    ) -> Sample:
        """Flip and degrade the images, as drawn for the slot."""
        if self.changes_samples:
            if self.config.random_flip and draws[FLIP] < 0.5 and not speaks_of_sides(caption):
                pixels = pixels.flip(-1)
                low_res = None if low_res is None else low_res.flip(-1)
            if low_res is not None:
                low_res = degrade(low_res, self.config, draws)
        return Sample(pixels, low_res, caption)
