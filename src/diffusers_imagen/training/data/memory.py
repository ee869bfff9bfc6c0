"""Data set whose images are kept in memory as uint8 pixels, the fastest option for small data sets."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from .batch import Samples
from .captions import BadCaption
from .data_config import DataConfig, Interpolation
from .pixels import BadImage, name_image
from .pyramid import crop, crop_wider, reduce, to_float
from .samples import SampleMaker
from .slot_draws import RowOrder, SlotDraws
from .sources import Rows, draw_weights


READ_AT_ONCE = 256  # maximum number of rows whose files are in memory at the same time


class CaptionedImages:
    """Pixels and captions of all rows, from which the samples of slots are drawn.

    Args:
        config (`DataConfig`): Configuration of the processing.
        rows (`Rows`): The data set.
        maker (`SampleMaker`): Creates samples.
        seed (`tuple[int, ...]`): The run's seed, and words that distinguish its sequences.
        weighted (`bool`): Whether rows are weighted by `config.balance_by` and `config.weight_column`.

    Raises:
        ValueError: If no image can be used.
    """

    def __init__(
        self, config: DataConfig, rows: Rows, maker: SampleMaker, seed: tuple[int, ...], weighted: bool = True
    ):
        self.config = config
        self.maker = maker
        self.pixels, given, self.captions, kept, self.skipped = load_samples(rows, maker, config.resolution)
        self.low_res = None
        if config.low_resolution is not None:
            self.low_res = (
                reduce_all(self.pixels, config.factor, config.image_interpolation_mode)
                if given is None
                else to_float(given)
            )
        weights = draw_weights(rows.data, config) if weighted else None
        self.order = RowOrder(len(kept), config.seed, None if weights is None else weights[kept])
        self.draws = SlotDraws(*seed)

    def __len__(self) -> int:
        return len(self.pixels)

    def draw(self, first: int, count: int) -> Samples:
        """Return the samples of `count` slots, starting at `first`."""
        draws = self.draws(first, count)
        rows = self.order(first, draws)
        captions = None
        if self.captions is not None:
            captions = [self.captions[row][column] for row, column in zip(rows, self.maker.columns(draws))]
        pixels, low_res = self._cut(rows, draws)
        if not self.maker.changes_samples:
            return Samples(pixels, low_res, captions)
        nothing = [None] * count
        parts = zip(pixels, nothing if low_res is None else low_res, captions or nothing, draws)
        return Samples.stack([self.maker.finish(*part) for part in parts])

    def _cut(self, rows: np.ndarray, draws: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return images and low-resolution images, cropped at the same positions."""
        if self.config.crop_size is None:
            chosen = torch.from_numpy(rows)
            return self.pixels[chosen], None if self.low_res is None else self.low_res[chosen]
        assert self.low_res is not None  # only super-resolution uses crops
        size, factor = self.config.crop_size, self.config.factor
        corners = [self.maker.corner(self.pixels.shape[-2:], slot) for slot in draws]
        return (
            torch.stack([crop(self.pixels[r], factor * i, factor * j, size) for r, (i, j) in zip(rows, corners)]),
            torch.stack([crop_wider(self.low_res[r], i, j, size // factor) for r, (i, j) in zip(rows, corners)]),
        )


class Loaded(NamedTuple):
    """Usable rows of a data set."""

    pixels: torch.Tensor  # (N, 3, R, R) uint8
    low_res: torch.Tensor | None  # (N, 3, r, r) uint8, if the data set has them
    captions: list[list[str]] | None  # one per column
    rows: np.ndarray  # (N,)
    skipped: dict[str, str]  # unusable rows by name, with the reason


def load_samples(rows: Rows, maker: SampleMaker, resolution: int) -> Loaded:
    """Load all images and captions.

    Raises:
        ValueError: If no image can be used.
    """

    def load(row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None, list[str]] | Exception:
        try:
            captions = maker.captions(row) if maker.with_text else []
            return maker.pixels(row), maker.low_resolution(row), captions
        except (BadImage, BadCaption) as error:
            return error

    def room(side: int) -> torch.Tensor:
        return torch.empty(len(rows.data), side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)

    pixels = room(resolution)
    low_res = room(maker.config.low_resolution or 0) if rows.low_res_column else None
    kept: list[int] = []
    captions: list[list[str]] = []
    skipped: dict[str, str] = {}
    columns = [*rows.image_columns, *(maker.config.caption_column if maker.with_text else [])]
    data = rows.data.select_columns(list(dict.fromkeys(columns)))
    with ThreadPoolExecutor() as pool, tqdm(total=len(data), desc="Loading images", mininterval=5) as progress:
        for start in range(0, len(data), READ_AT_ONCE):
            part = [dict(zip(data.column_names, cells)) for cells in zip(*data[start : start + READ_AT_ONCE].values())]
            for i, (row, loaded) in enumerate(zip(part, pool.map(load, part)), start=start):
                if isinstance(loaded, Exception):
                    skipped[name_image(row[rows.image_column], i)] = str(loaded)
                else:
                    pixels[len(kept)] = loaded[0]
                    if low_res is not None and loaded[1] is not None:
                        low_res[len(kept)] = loaded[1]
                    captions.append(loaded[2])
                    kept.append(i)
            progress.update(len(part))
    if not kept:
        name, reason = next(iter(skipped.items()))
        raise ValueError(f"None of the {len(rows.data)} images can be used; {name}: {reason}.")
    low_res = None if low_res is None else low_res[: len(kept)]
    return Loaded(pixels[: len(kept)], low_res, captions if maker.with_text else None, np.array(kept), skipped)


def reduce_all(pixels: torch.Tensor, factor: int, interpolation: Interpolation) -> torch.Tensor:
    """Downsample all images once: `(N, 3, R / factor, R / factor)` in float32."""
    resolution = pixels.shape[-1] // factor
    low_res = torch.empty(len(pixels), 3, resolution, resolution)
    for start in range(0, len(pixels), 64):
        low_res[start : start + 64] = reduce(to_float(pixels[start : start + 64]), factor, interpolation)
    return low_res
