"""Combination of two streams of batches, for DreamBooth with prior preservation."""

from collections.abc import Sequence
from typing import Any

import torch

from ...text.text_embeddings import TextEmbeddings, pad_tokens
from .batch import Batch
from .batches import BatchStream


class PairedBatches(BatchStream):
    """Alternates images of two streams: slots 2 k and 2 k + 1 are the k-th images of the two.

    A batch has twice `train_batch_size` images, independent of the number of processes.

    Args:
        first (`BatchStream`), second (`BatchStream`): Streams with the same image sizes, batch sizes and processes.
    """

    def __init__(self, first: BatchStream, second: BatchStream):
        super().__init__(first.config, None, first.process_index, first.num_processes)
        self.streams = (first, second)
        self.content = {**(first.content or {}), "images of the class": second.content}

    @property
    def needs_encoder(self) -> bool:
        return any(stream.needs_encoder for stream in self.streams)

    @property
    def epoch(self) -> int | None:
        first = self.streams[0].epoch  # the subject's
        return None if first is None else first * self.stride // self.streams[0].stride

    @property
    def stride(self) -> int:
        return sum(stream.stride for stream in self.streams)

    @property
    def first_slot(self) -> int:
        return sum(stream.first_slot for stream in self.streams)

    def __next__(self) -> Batch:
        batch = interleave(*(next(stream) for stream in self.streams))
        self.images_seen += self.stride
        for stream in self.streams:
            self.skipped |= stream.skipped
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for stream, own in zip(self.streams, state["streams"]):
            stream.load_state_dict(own)

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self.images_seen = states[0]["images_seen"]
        for stream, own in zip(self.streams, zip(*(state["streams"] for state in states))):
            stream.load_state_dicts(list(own))

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


def interleave(first: Batch, second: Batch) -> Batch:
    """Combine two batches of B images into one of 2 B, alternating images; the shorter texts are padded."""
    tokens = max((batch.text.shape[1] for batch in (first, second) if batch.text is not None), default=0)
    pairs = zip(pad_text(first, tokens), pad_text(second, tokens))
    return Batch._make(None if a is None or b is None else torch.stack([a, b], dim=1).flatten(0, 1) for a, b in pairs)


def pad_text(batch: Batch, tokens: int) -> Batch:
    """Pad the texts of a batch at the end to this number of tokens."""
    if batch.text is None or batch.text_mask is None:
        return batch
    text = pad_tokens(TextEmbeddings(batch.text, batch.text_mask), tokens)
    return batch._replace(text=text.embeds, text_mask=text.mask)
