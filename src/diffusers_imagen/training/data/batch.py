"""Batches of the training loop, and the samples that they consist of."""

from typing import NamedTuple

import torch

from ...text.source import TextSource
from ...text.text_embeddings import PackedText, TextEmbeddings
from .data_config import DataConfig
from .pyramid import reduce, to_float


class Batch(NamedTuple):
    """One micro-batch of images and captions."""

    images: torch.Tensor  # (B, 3, H, W) in [-1, 1]
    low_res: torch.Tensor | None  # (B, 3, h, w) in [-1, 1], aligned with the images; of crops with a margin
    text: torch.Tensor | None  # (B, L, E), zero at padded positions
    text_mask: torch.Tensor | None  # (B, L)


class Sample(NamedTuple):
    """One image and its caption."""

    pixels: torch.Tensor  # (3, H, W) uint8
    low_res: torch.Tensor | None  # (3, h, w) in [-1, 1]
    caption: str | None
    text: PackedText | None = None  # if it was read with the row


class Samples(NamedTuple):
    """A micro-batch as returned by a worker: a quarter of a `Batch`'s size or less."""

    pixels: torch.Tensor  # (B, 3, H, W) uint8
    low_res: torch.Tensor | None  # (B, 3, h, w) in [-1, 1], where it is not a reduction of the whole images
    captions: list[str] | None
    text: PackedText | None = None  # if the worker read them

    @classmethod
    def stack(cls, samples: list[Sample], source: TextSource | None = None) -> "Samples":
        pixels, low_res, texts, packed = zip(*samples)
        captions = None if texts[0] is None else list(texts)
        text = None if source is None else source.pack(captions or [])
        if packed[0] is not None:
            text = PackedText.join(list(packed))
        return cls(torch.stack(pixels), None if low_res[0] is None else torch.stack(low_res), captions, text)

    def finish(self, source: TextSource | None, config: DataConfig, device: torch.device) -> Batch:
        """Convert to floating point on a device, and encode captions that are not encoded yet; the mask is not moved."""
        images = to_float(self.pixels.to(device, non_blocking=True))
        low_res = self.low_res
        if low_res is None and config.low_resolution is not None:
            low_res = reduce(images, config.factor, config.image_interpolation_mode)
        text: TextEmbeddings | None = None
        if self.text is not None:
            text = self.text.padded(device)
        elif source is not None:
            text = source.encode(self.captions or [])
        embeds, mask = (None, None) if text is None else (text.embeds.float(), text.mask.bool())
        return Batch(images, low_res, embeds, mask)
