"""Batches of the training loop, and the samples that they consist of."""

from typing import NamedTuple

import torch

from ...text.source import TextSource
from ...text.text_embeddings import TextEmbeddings
from .pyramid import to_float


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


class Samples(NamedTuple):
    """A micro-batch with captions that are not encoded yet, as returned by a worker: a quarter of a `Batch`'s size."""

    pixels: torch.Tensor  # (B, 3, H, W) uint8
    low_res: torch.Tensor | None  # (B, 3, h, w) in [-1, 1]
    captions: list[str] | None
    text: TextEmbeddings | None = None  # if the worker read them

    @classmethod
    def stack(cls, samples: list[Sample], source: TextSource | None = None) -> "Samples":
        pixels, low_res, texts = zip(*samples)
        captions = None if texts[0] is None else list(texts)
        text = None if source is None else source.encode(captions or [])
        return cls(torch.stack(pixels), None if low_res[0] is None else torch.stack(low_res), captions, text)

    def finish(self, source: TextSource | None) -> Batch:
        """Encode captions that are not encoded yet, and return the batch."""
        text = source.encode(self.captions or []) if self.text is None and source is not None else self.text
        embeds, mask = (None, None) if text is None else (text.embeds.float(), text.mask.bool())
        return Batch(to_float(self.pixels), self.low_res, embeds, mask)
