"""Prompts to text states: one function for pipelines and training, so that both see the same."""

import torch
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..utils.arguments import shown
from ..utils.errors import is_out_of_memory, one_line
from ..utils.tensors import find_not_finite


logger = logging.get_logger(__name__)

NO_LIMIT = 1_000_000  # transformers writes 1e30 where a tokenizer's length was never set


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, prompts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes prompts, cut or padded to the tokenizer's `model_max_length`.

    Returns:
        States `(B, L, E)` of the encoder's last layer, zero at padded positions, and the mask `(B, L)`, True where a
        token counts.

    Raises:
        ValueError: If the tokenizer has no `model_max_length`, or the encoder does not fit it.
    """
    check_limit(tokenizer)
    warn_of_cut(tokenizer, prompts, tokenizer.model_max_length)
    return encode_tokens(tokenizer, text_encoder, prompts)


def encode_tokens(
    tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, prompts: list[str], padding: str = "max_length"
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode_text`, without a word about what is cut; `padding` is the tokenizer's."""
    check_limit(tokenizer)
    max_length = tokenizer.model_max_length
    keep_in_fp32(text_encoder)
    tokens = tokenizer(prompts, padding=padding, max_length=max_length, truncation=True, return_tensors="pt")
    encoder = text_encoder.get_encoder() if text_encoder.config.is_encoder_decoder else text_encoder
    known = encoder.get_input_embeddings().num_embeddings
    if tokens.input_ids.max() >= known:  # on a GPU it would abort the process
        raise ValueError(
            f"`tokenizer` makes the token {tokens.input_ids.max()}, but `text_encoder` knows {known}: they do not belong "
            "together."
        )
    ids, mask = tokens.input_ids.to(encoder.device), tokens.attention_mask.to(encoder.device)
    try:
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    except (IndexError, RuntimeError) as error:  # of an encoder with fewer positions
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"`text_encoder` cannot take the {ids.shape[1]} tokens that `tokenizer` makes: {one_line(error)}"
        ) from error
    return states * mask[..., None].to(states.dtype), mask.bool()


def check_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a tokenizer whose `model_max_length` is no number of tokens."""
    limit = tokenizer.model_max_length
    is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if is_number and limit > NO_LIMIT:
        raise ValueError(
            "`tokenizer.model_max_length` is not set, but should be the number of tokens that the networks were "
            "trained with."
        )
    if not is_number or isinstance(limit, float) or limit < 1:
        raise ValueError(f"`tokenizer.model_max_length` is {shown(limit)}, but should be a number of tokens.")


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    prompts: list[str],
    slice_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode_text`, some prompts at a time.

    Raises:
        ValueError: If the encoder's states are not finite: half precision is too narrow for some encoders.
    """
    size = slice_size or len(prompts)
    parts = [encode_text(tokenizer, text_encoder, prompts[i : i + size]) for i in range(0, len(prompts), size)]
    states, mask = (torch.cat(tensors) for tensors in zip(*parts))
    if not states.isfinite().all():
        weight = find_not_finite(text_encoder)
        raise ValueError(
            f"`text_encoder` in {text_encoder.dtype} makes states that are not finite: load it in torch.bfloat16 or "
            "torch.float32" + ("." if weight is None else f", complete; its weight `{weight}` is not finite.")
        )
    return states, mask


def keep_in_fp32(text_encoder: PreTrainedModel | None) -> None:
    """Keeps in float32 the layers of an encoder that float16 is too narrow for: `wo` of T5.

    transformers does so when it loads the encoder in float16, but `.to(torch.float16)` undoes it, and the states
    overflow (diffusers issue 8604).
    """
    names = getattr(text_encoder, "_keep_in_fp32_modules", None)
    if not names or text_encoder.dtype != torch.float16:
        return
    for name, module in text_encoder.named_modules():
        if name.rpartition(".")[-1] in names:
            module.to(torch.float32)


def warn_of_cut(tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int) -> None:
    """Says which words of a prompt do not fit."""
    for prompt, ids in zip(prompts, tokenizer(prompts, add_special_tokens=False).input_ids):
        room = max_length - tokenizer.num_special_tokens_to_add()
        if len(ids) > room:
            logger.warning(
                f"The prompt {shown(prompt)} is cut to {max_length} tokens: {shown(tokenizer.decode(ids[room:]))} is lost."
            )
