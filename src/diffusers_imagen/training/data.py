"""Captioned images in memory: uint8 pixels, cached text states, and batches drawn from a generator.

Shapes: B batch, N rows, R resolution, L text tokens, E width of the text encoder.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from diffusers.utils import logging
from PIL import Image
from tqdm.auto import tqdm

from .config import TrainingConfig


logger = logging.get_logger(__name__)


class Batch(NamedTuple):
    """One step's images and captions."""

    images: torch.Tensor  # (B, 3, R, R) in [-1, 1]
    low_res: Optional[torch.Tensor]  # (B, 3, r, r) in [-1, 1], aligned with the images
    text: Optional[torch.Tensor]  # (B, L, E), zero at padded positions
    text_mask: Optional[torch.Tensor]  # (B, L)


class CaptionStates(NamedTuple):
    """Text states of every distinct caption, and which of them each row may draw."""

    text: torch.Tensor  # (captions, L, E)
    mask: torch.Tensor  # (captions, L)
    rows: torch.Tensor  # (N, columns), index of each row's caption in each caption column


def load_rows(config: TrainingConfig, split: str) -> Dataset:
    """Rows of the imagefolder with that `split`, in the chosen styles, images not yet decoded."""
    folder = Path(config.train_data_dir)
    if not (folder / "metadata.jsonl").is_file():
        raise ValueError(f"`train_data_dir` is {config.train_data_dir!r}, which has no metadata.jsonl.")
    rows = load_dataset("json", data_files=str(folder / "metadata.jsonl"), split="train")
    needed = {"file_name", "split", *config.caption_column, *(config.balance_by or [])} | (
        {"style"} if config.styles else set()
    )
    missing = needed - set(rows.column_names)
    if missing:
        raise ValueError(f"The data set lacks the columns {sorted(missing)}; it has {rows.column_names}.")
    keep = [i for i, value in enumerate(rows["split"]) if value == split]
    if config.styles is not None:
        styles = rows["style"]
        keep = [i for i in keep if styles[i] in config.styles]
    if not keep:
        raise ValueError(
            f"No row has split {split!r}" + (f" and a style among {config.styles}." if config.styles else ".")
        )
    return rows.select(keep)


def load_pixels(rows: Dataset, folder: str, resolution: int) -> torch.Tensor:
    """All images as `(N, 3, R, R)` uint8: transparency on white, resized with antialiasing."""

    def load(name: str) -> np.ndarray:
        image = Image.open(Path(folder) / name).convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        return np.asarray(canvas.convert("RGB").resize((resolution, resolution), Image.Resampling.BICUBIC))

    pixels = torch.empty(len(rows), resolution, resolution, 3, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        loaded = tqdm(pool.map(load, rows["file_name"]), total=len(rows), desc="Loading images", mininterval=5)
        for i, image in enumerate(loaded):
            pixels[i] = torch.from_numpy(image.copy())
    return pixels.permute(0, 3, 1, 2)  # channels_last in memory


def encode_captions(rows: Dataset, columns: list[str], encode: Callable[[list[str]], tuple]) -> CaptionStates:
    """Encodes every distinct caption once; a column of lists (of keywords) is joined by commas.

    `encode` maps a list of captions to states `(B, L, E)` and mask `(B, L)`.
    """
    texts = {
        column: [value if isinstance(value, str) else ", ".join(value) for value in rows[column]] for column in columns
    }
    captions = sorted({caption for column in columns for caption in texts[column]})
    index = {caption: i for i, caption in enumerate(captions)}
    states, masks = [], []
    for start in tqdm(range(0, len(captions), 256), desc="Encoding captions", mininterval=5):
        text, mask = encode(captions[start : start + 256])
        states.append(text.half())
        masks.append(mask.bool())
    indices = torch.tensor([[index[caption] for caption in texts[column]] for column in columns]).T
    return CaptionStates(torch.cat(states), torch.cat(masks), indices)


def balance_weights(rows: Dataset, columns: Optional[list[str]]) -> torch.Tensor:
    """Sampling weight of each row `(N,)`: every combination of values in `columns` is drawn equally often."""
    if not columns:
        return torch.ones(len(rows))
    keys = list(zip(*(map(str, rows[column]) for column in columns)))
    counts: dict[tuple, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return torch.tensor([1 / counts[key] for key in keys])


class CaptionedImages:
    """A data set in memory from which batches are drawn, with replacement, by a generator that the caller owns."""

    def __init__(
        self, config: TrainingConfig, split: str, encode: Optional[Callable[[list[str]], tuple]], balanced: bool = True
    ):
        rows = load_rows(config, split)
        self.config = config
        self.pixels = load_pixels(rows, config.train_data_dir, config.resolution)
        self.captions = None if encode is None else encode_captions(rows, config.caption_column, encode)
        self.weights = balance_weights(rows, config.balance_by if balanced else None)
        self.column_weights = torch.tensor(config.caption_probabilities or [1.0] * len(config.caption_column))
        logger.info(f"{len(self)} images of the split {split!r} at {config.resolution} px")

    def __len__(self) -> int:
        return len(self.pixels)

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        """A batch; the generator decides on rows, captions and crops."""
        rows = torch.multinomial(self.weights, batch_size, replacement=True, generator=generator)
        images = self.pixels[rows].float().div_(127.5).sub_(1)
        low_res = None
        if self.config.low_resolution is not None:
            images, low_res = self._pyramid(images, generator)
        text = mask = None
        if self.captions is not None:
            columns = torch.multinomial(self.column_weights, batch_size, replacement=True, generator=generator)
            captions = self.captions.rows[rows, columns]
            text, mask = self.captions.text[captions].float(), self.captions.mask[captions]
        return Batch(images, low_res, text, mask)

    def _pyramid(self, images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and their antialiased reductions, cropped at the same places of both grids."""
        size = self.config.low_resolution
        low_res = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        crop = self.config.crop_size
        if crop is None:
            return images, low_res
        factor = self.config.resolution // size
        corners = torch.randint(size - crop // factor + 1, (len(images), 2), generator=generator).tolist()
        return (
            torch.stack([crop_square(x, factor * i, factor * j, crop) for x, (i, j) in zip(images, corners)]),
            torch.stack([crop_square(x, i, j, crop // factor) for x, (i, j) in zip(low_res, corners)]),
        )


def crop_square(image: torch.Tensor, top: int, left: int, size: int) -> torch.Tensor:
    """`(C, H, W)` to `(C, size, size)`."""
    return image[:, top : top + size, left : left + size]
