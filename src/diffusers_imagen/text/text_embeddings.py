"""Embeddings of texts: how padding is treated, and what stands for the absence of text, in training and sampling alike.

Shapes: B texts, L tokens, E width of the text encoder.
"""

from typing import NamedTuple

import torch
from torch.nn import functional


class TextEmbeddings(NamedTuple):
    """What a text encoder makes of texts. Most networks normalise and pool over padded positions, which are zero."""

    embeds: torch.Tensor  # (B, L, E), zero at padded positions, or the encoder's for networks that attend to them
    mask: torch.Tensor  # (B, L) bool, True where a token counts

    def for_pipeline(self, negative: "TextEmbeddings | None" = None) -> dict[str, torch.Tensor]:
        """Return the arguments of a pipeline's call.

        Args:
            negative ([`TextEmbeddings`], *optional*): Of negative prompts, one for each prompt or one for all; of no
                text (`TextSource.no_text`) for networks that attend to padding, in a pipeline without a text encoder.
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
        """Return a single text as a batch of as many; a batch of that size as it is."""
        return TextEmbeddings(*(tensor.expand(number, *tensor.shape[1:]) for tensor in self))


def zero_padding(embeds: torch.Tensor, mask: torch.Tensor) -> TextEmbeddings:
    """Embeddings as an encoder gives them `(B, L, E)`, with zeros where its mask `(B, L)` has any."""
    return TextEmbeddings(embeds * mask[..., None].to(embeds.dtype), mask.bool())


def pad_tokens(text: TextEmbeddings, length: int) -> TextEmbeddings:
    """Add padding until there are `length` tokens."""
    missing = length - text.mask.shape[1]
    return TextEmbeddings(functional.pad(text.embeds, (0, 0, 0, missing)), functional.pad(text.mask, (0, missing)))


def stack_padded(texts: list[torch.Tensor], lengths: list[int]) -> TextEmbeddings:
    """Embeddings of single texts at all positions, `(L, E)`, as a batch in float32 under a mask of their `lengths`."""
    embeds = torch.stack([text.float() for text in texts])
    return TextEmbeddings(embeds, torch.arange(embeds.shape[1]) < torch.tensor(lengths)[:, None])


def stack_unpadded(texts: list[torch.Tensor], length: int, width: int) -> TextEmbeddings:
    """Embeddings of single texts `(tokens, E)` as a batch in float32, each padded to `length` tokens."""
    embeds = torch.zeros(len(texts), length, width)
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for i, text in enumerate(texts):
        embeds[i, : len(text)] = text
        mask[i, : len(text)] = True
    return TextEmbeddings(embeds, mask)


def without_text(text: TextEmbeddings) -> TextEmbeddings:
    """Return what stands for no text beside a prompt: zeros under the prompt's mask, as `drop_text` shows them in training."""
    return TextEmbeddings(torch.zeros_like(text.embeds), text.mask)


def drop_text(
    embeds: torch.Tensor | None, dropped: torch.Tensor, no_text: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Embeddings `(B, L, E)`, those of dropped texts `(B,)` zero, or `no_text` `(1, L, E)`; the masks stay.

    What stands for no text is the same when sampling: zeros under the prompt's mask (`without_text`), and for networks
    that attend to padding, and so see no mask, the embeddings of the empty text (`TextSource.no_text`).
    """
    if embeds is None:
        return None
    if no_text is None:
        return embeds * ~dropped[:, None, None]
    return torch.where(dropped[:, None, None], no_text.to(embeds), embeds)
