"""Prompts to text states: one function for pipelines and training, so that both see the same."""

import torch
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.get_logger(__name__)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, prompts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes prompts, cut or padded to the tokenizer's `model_max_length`.

    Returns:
        States `(B, L, E)` of the encoder's last layer, zero at padded positions, and the mask `(B, L)`, True where a
        token counts.
    """
    warn_of_cut(tokenizer, prompts, tokenizer.model_max_length)
    return encode_tokens(tokenizer, text_encoder, prompts)


def encode_tokens(
    tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, prompts: list[str], padding: str = "max_length"
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode_text`, without a word about what is cut; `padding` is the tokenizer's."""
    max_length = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding=padding, max_length=max_length, truncation=True, return_tensors="pt")
    encoder = text_encoder.get_encoder() if text_encoder.config.is_encoder_decoder else text_encoder
    ids, mask = tokens.input_ids.to(encoder.device), tokens.attention_mask.to(encoder.device)
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return states * mask[..., None].to(states.dtype), mask.bool()


def warn_of_cut(tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int) -> None:
    """Says which words of a prompt do not fit."""
    for prompt, ids in zip(prompts, tokenizer(prompts, add_special_tokens=False).input_ids):
        room = max_length - tokenizer.num_special_tokens_to_add()
        if len(ids) > room:
            logger.warning(
                f"The prompt {prompt!r} is cut to {max_length} tokens: {tokenizer.decode(ids[room:])!r} is lost."
            )
