"""Prompts to text states: one function for pipelines and training, so that both see the same."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.embeddings import TextConditioning
from ..utils.arguments import shown
from ..utils.errors import is_out_of_memory, one_line
from .stages import UNet
from .tensors import find_not_finite


logger = logging.get_logger(__name__)

TEXT_TENSORS = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
NO_LIMIT = 1_000_000  # transformers writes 1e30 where a tokenizer's length was never set
Branch = Literal["conditional", "unconditional", "both"]


@dataclass
class TextStates:
    """The text of all images of a call, `(images, tokens, width)` and `(images, tokens)`; None without text."""

    prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None
    negative_given: bool = False  # whether there is more to guide away from than the absence of text
    version: int = 0  # how often a callback has changed it

    def update(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what a callback gave back changed."""
        for name, tensor in tensors.items():
            if name in TEXT_TENSORS and tensor is not getattr(self, name):
                setattr(self, name, tensor)
                self.version += 1

    def encode_for(self, unet: UNet, branch: Branch, images: slice) -> TextConditioning | None:
        """Does a network's work on the text of some images; for both branches, negative prompts come first."""
        if unet.config.encoder_hid_dim is None:
            return None
        prompt = self.prompt_embeds[images], self.prompt_attention_mask[images]
        negative = self.negative_prompt_embeds[images], self.negative_prompt_attention_mask[images]
        if branch == "both":
            return unet.encode_text(*(torch.cat(pair) for pair in zip(negative, prompt)))
        return unet.encode_text(*(prompt if branch == "conditional" else negative))


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


def encode_prompt(
    pipe: DiffusionPipeline,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    num_images_per_prompt: int,
    prompt_embeds: torch.Tensor | None,
    prompt_attention_mask: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    negative_prompt_attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """What the pipelines' `encode_prompt` promises."""
    if prompt_embeds is None and prompt is None:
        return None, None, None, None
    encode = functools.partial(encode_prompts, pipe.tokenizer, pipe.text_encoder, slice_size=pipe.slice_size)
    if prompt_embeds is None:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompt_embeds, prompt_attention_mask = encode(prompts)
    if negative_prompt_embeds is None and negative_prompt is not None:
        texts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        negative_prompt_embeds, negative_prompt_attention_mask = encode(texts)
        if isinstance(negative_prompt, str):
            negative_prompt_embeds = negative_prompt_embeds.expand(len(prompt_embeds), -1, -1)
            negative_prompt_attention_mask = negative_prompt_attention_mask.expand(len(prompt_embeds), -1)
    elif negative_prompt_embeds is None:
        negative_prompt_embeds = torch.zeros_like(prompt_embeds)
        negative_prompt_attention_mask = prompt_attention_mask
    tensors = (
        prompt_embeds,
        prompt_attention_mask.bool(),
        negative_prompt_embeds,
        negative_prompt_attention_mask.bool(),
    )
    return tuple(
        tensor.repeat_interleave(num_images_per_prompt, dim=0).to(pipe._execution_device) for tensor in tensors
    )


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
