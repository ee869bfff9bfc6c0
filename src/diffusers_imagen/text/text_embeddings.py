"""TextEmbeddings: text embeddings with their mask, padding, and unconditional embeddings.

Shapes: B texts, L tokens, E width of the text encoder.
"""

from typing import NamedTuple

import torch
from torch.nn import functional


class TextEmbeddings(NamedTuple):
    """Output of a text encoder. Most networks normalize and pool over padded positions, which are zero."""

    embeds: torch.Tensor  # (B, L, E), zero at padded positions, unless networks attend to them
    mask: torch.Tensor  # (B, L) bool, True for valid tokens

    def for_pipeline(self, negative: "TextEmbeddings | None" = None) -> dict[str, torch.Tensor]:
        """Return the arguments for calling a pipeline.

        Args:
            negative ([`TextEmbeddings`], *optional*): Embeddings of negative prompts, one per prompt or one for all.
                A pipeline without a text encoder needs those of `TextSource.no_text` for networks that attend to
                padding.
        """
        arguments = {"prompt_embeds": self.embeds.float(), "prompt_attention_mask": self.mask}
        if negative is None:
            return arguments
        if len(negative.embeds) not in (1, len(self.embeds)):
            raise ValueError(
                f"`negative` has {len(negative.embeds)} texts, but should have 1 or as many as there are prompts, "
                f"{len(self.embeds)}."
            )
        negative = negative.repeated(len(self.embeds))
        return arguments | {
            "negative_prompt_embeds": negative.embeds.float(),
            "negative_prompt_attention_mask": negative.mask,
        }

    def repeated(self, number: int) -> "TextEmbeddings":
        """Repeat a single text to a batch of this size; return a batch of this size unchanged."""
        return TextEmbeddings(*(tensor.expand(number, *tensor.shape[1:]) for tensor in self))


def zero_padding(embeds: torch.Tensor, mask: torch.Tensor) -> TextEmbeddings:
    """Set an encoder's embeddings `(B, L, E)` to zero at padded positions of the mask `(B, L)`."""
    return TextEmbeddings(embeds * mask[..., None].to(embeds.dtype), mask.bool())


def pad_tokens(text: TextEmbeddings, length: int) -> TextEmbeddings:
    """Pad to `length` tokens."""
    missing = length - text.mask.shape[1]
    return TextEmbeddings(functional.pad(text.embeds, (0, 0, 0, missing)), functional.pad(text.mask, (0, missing)))


class PackedText(NamedTuple):
    """Text embeddings of a batch without padding, in their stored precision, so that fewer bytes move to a device."""

    states: torch.Tensor  # (N, E), concatenated over all texts
    places: torch.Tensor  # (B, L) int64: 1 + the row of `states`, 0 at positions that become zero
    mask: torch.Tensor  # (B, L) bool, True for valid tokens

    @classmethod
    def of(cls, states: torch.Tensor, mask: torch.Tensor, keeps_padding: bool) -> "PackedText":
        """Pack `states`: of the positions where the mask is True, or of all positions if padding is kept."""
        kept = torch.ones_like(mask) if keeps_padding else mask
        return cls(states, kept.flatten().cumsum(0).view_as(mask) * kept, mask)

    @classmethod
    def join(cls, parts: "list[PackedText]") -> "PackedText":
        """Join batches of the same number of positions."""
        firsts = torch.tensor([0, *(len(part.states) for part in parts[:-1])]).cumsum(0).tolist()
        places = [part.places + first * (part.places > 0) for part, first in zip(parts, firsts)]
        return cls(
            torch.cat([part.states for part in parts]), torch.cat(places), torch.cat([part.mask for part in parts])
        )

    def padded(self, device: torch.device | str = "cpu") -> TextEmbeddings:
        """Return the embeddings `(B, L, E)` in float32 on a device; the mask stays where it is."""
        states = self.states.to(device, non_blocking=True).float()
        rows = functional.pad(states, (0, 0, 1, 0))
        return TextEmbeddings(rows[self.places.to(device, non_blocking=True)], self.mask)


def without_text(text: TextEmbeddings) -> TextEmbeddings:
    """Return unconditional embeddings for a prompt: zeros with the prompt's mask, as from `drop_text` in training."""
    return TextEmbeddings(torch.zeros_like(text.embeds), text.mask)


def drop_text(
    embeds: torch.Tensor | None, dropped: torch.Tensor, no_text: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Replace dropped texts `(B,)` of embeddings `(B, L, E)` by zeros, or by `no_text` `(1, L, E)`; keep the masks.

    Sampling uses the same unconditional embeddings: zeros with the prompt's mask (`without_text`), and for networks
    that attend to padding, which ignore the mask, the embeddings of the empty text (`TextSource.no_text`).
    """
    if embeds is None:
        return None
    if no_text is None:
        return embeds * ~dropped[:, None, None]
    return torch.where(dropped[:, None, None], no_text.to(embeds), embeds)
