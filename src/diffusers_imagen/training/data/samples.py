"""From a row and its slot's draws to an image and a caption."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from .batch import Sample
from .captions import caption_text, speaks_of_sides
from .data_config import DataConfig
from .pixels import fit_image, read_fitting, read_image
from .pyramid import crop, crop_both, crop_wider, degrade, reduce, to_float
from .slot_draws import CAPTION, CROP_LEFT, CROP_TOP, FLIP, PLACE_LEFT, PLACE_TOP, cumulate, pick, whole


class SampleMaker:
    """Makes the sample of a row.

    Args:
        config (`DataConfig`): What is done to images and captions.
        image_column (`str`): Column with the images.
        folder (`str`): Where relative file names begin.
        with_text (`bool`): Whether captions are drawn.
        augment (`bool`): Whether images are flipped and placed at random, and low resolutions made worse.
    """

    def __init__(self, config: DataConfig, image_column: str, folder: str, with_text: bool, augment: bool = True):
        self.config = config
        self.image_column = image_column
        self.folder = folder
        self.with_text = with_text
        self.augment = augment
        self.changes_samples = augment and bool(
            config.random_flip or config.degradation_blur_sigma or config.degradation_jpeg_quality
        )
        self.column_edges = cumulate(config.caption_probabilities or [1.0] * len(config.caption_column))

    def __call__(self, row: dict[str, Any], draws: np.ndarray, shape: tuple[int, int] | None = None) -> Sample:
        """The sample of a row.

        Args:
            row (`dict`): A row of the data set.
            draws (`np.ndarray`): `(DRAWS_PER_SLOT,)`, the slot's numbers.
            shape (`tuple[int, int]`, *optional*): Height and width of its bucket; a square of `resolution` without.

        Raises:
            BadImage: If the image cannot be used.
            BadCaption: If the cell holds no caption.
        """
        caption = self.caption(row, draws)
        pixels = self.pixels(row, draws, shape)
        low_res = None
        if self.config.low_resolution is not None:
            pixels, low_res = self.pyramid(pixels, draws, self.low_resolution(row, draws, shape))
        return self.finish(pixels, low_res, caption, draws)

    def caption(self, row: dict[str, Any], draws: np.ndarray) -> str | None:
        """The row's caption in the column that the slot draws."""
        if not self.with_text:
            return None
        return self.captions(row)[int(self.columns(draws))]

    def captions(self, row: dict[str, Any]) -> list[str]:
        """The row's captions, one a column.

        Raises:
            BadCaption: If one of them is missing, whichever is drawn: a row is used with all or not at all.
        """
        return [caption_text(row[column]) for column in self.config.caption_column]

    def columns(self, draws: np.ndarray) -> np.ndarray:
        """Which caption column each slot draws."""
        return pick(self.column_edges, draws[..., CAPTION])

    def pixels(
        self, row: dict[str, Any], draws: np.ndarray | None = None, shape: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """The row's image, cropped and resized: `(3, H, W)` uint8."""
        size = shape or (self.config.resolution, self.config.resolution)
        where = self.folder, self.config.background
        image = read_fitting(row[self.image_column], size, *where, self.config.min_resolution)
        return self.fit(image, *size, draws)

    def low_resolution(
        self, row: dict[str, Any], draws: np.ndarray | None = None, shape: tuple[int, int] | None = None
    ) -> torch.Tensor | None:
        """The row's low-resolution image where it has one, cropped and resized as its image: `(3, h, w)` uint8."""
        if self.config.low_resolution_column is None:
            return None
        image = read_image(row[self.config.low_resolution_column], self.folder, self.config.background)
        height, width = shape or (self.config.resolution, self.config.resolution)
        return self.fit(image, height // self.config.factor, width // self.config.factor, draws)

    def fit(self, image: Image.Image, height: int, width: int, draws: np.ndarray | None) -> torch.Tensor:
        """An image at a size, the place of its crop as drawn: `(3, height, width)` uint8."""
        place = (0.5, 0.5)
        if draws is not None and self.augment and not self.config.center_crop:
            place = (draws[PLACE_TOP], draws[PLACE_LEFT])
        fitted = fit_image(image, height, width, *place, self.config.image_interpolation_mode)
        return torch.from_numpy(fitted.copy()).permute(2, 0, 1)

    def pyramid(
        self, pixels: torch.Tensor, draws: np.ndarray, low_res: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The image, or a crop of it, as uint8, and its low-resolution image in [-1, 1]: that of the row or a reduction."""
        size, factor, interpolation = self.config.crop_size, self.config.factor, self.config.image_interpolation_mode
        if size is None:
            low_res = (
                reduce(to_float(pixels)[None], factor, interpolation)[0] if low_res is None else to_float(low_res)
            )
            return pixels, low_res
        corner = self.corner(pixels, draws)
        if low_res is None:
            return crop_both(pixels, factor, *corner, size, interpolation)
        image = crop(pixels, factor * corner[0], factor * corner[1], size)
        return image, crop_wider(to_float(low_res), *corner, size // factor)

    def corner(self, pixels: torch.Tensor, draws: np.ndarray) -> tuple[int, int]:
        """Top and left of the slot's crop, on the grid of the reduction."""
        size, factor = self.config.crop_size or 0, self.config.factor
        height, width = ((length - size) // factor for length in pixels.shape[-2:])
        return int(whole(draws[CROP_TOP], height + 1)), int(whole(draws[CROP_LEFT], width + 1))

    def finish(
        self, pixels: torch.Tensor, low_res: torch.Tensor | None, caption: str | None, draws: np.ndarray
    ) -> Sample:
        """Mirrors and degrades, as the slot's draws say."""
        if self.changes_samples:
            if self.config.random_flip and draws[FLIP] < 0.5 and not speaks_of_sides(caption):
                pixels = pixels.flip(-1)
                low_res = None if low_res is None else low_res.flip(-1)
            if low_res is not None:
                low_res = degrade(low_res, self.config, draws)
        return Sample(pixels, low_res, caption)
