"""The text of a call: what the caller gives, checked, and as the networks read it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from ..models.embeddings import TextConditioning
from ..text.encoder import TextEncoder
from ..text.text_embeddings import TextEmbeddings, without_text
from ..utils.arguments import shown
from ..utils.tensors import FLOATS, INTEGERS, check_tensor
from .inputs import MAX_IMAGES
from .stages import Stage, UNet


TEXT_TENSORS = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
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
    encoder = TextEncoder(pipe.tokenizer, pipe.text_encoder)
    if prompt_embeds is None:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompt_embeds, prompt_attention_mask = encoder.encode_prompts(prompts, pipe.slice_size)
    if negative_prompt_embeds is None and negative_prompt is not None:
        texts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        negative_prompt_embeds, negative_prompt_attention_mask = encoder.encode_prompts(texts, pipe.slice_size)
        if isinstance(negative_prompt, str):
            negative_prompt_embeds = negative_prompt_embeds.expand(len(prompt_embeds), -1, -1)
            negative_prompt_attention_mask = negative_prompt_attention_mask.expand(len(prompt_embeds), -1)
    elif negative_prompt_embeds is None:
        negative_prompt_embeds, negative_prompt_attention_mask = without_text(
            TextEmbeddings(prompt_embeds, prompt_attention_mask)
        )
    tensors = (
        prompt_embeds,
        prompt_attention_mask.bool(),
        negative_prompt_embeds,
        negative_prompt_attention_mask.bool(),
    )
    return tuple(
        tensor.repeat_interleave(num_images_per_prompt, dim=0).to(pipe._execution_device) for tensor in tensors
    )


MAX_PROMPT_CHARACTERS = (
    100_000  # tokenizers take minutes for more, and what does not fit into a network is lost anyway
)


def check_text(
    stages: list[Stage] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: torch.Tensor | None,
    prompt_attention_mask: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    negative_prompt_attention_mask: torch.Tensor | None,
) -> None:
    """There is one description of each prompt, and the networks can read it.

    `tokenizer` is None without encoder; `stages` is None where the text is encoded apart from any network.
    """
    texts = (
        ("prompt", prompt, prompt_embeds, prompt_attention_mask),
        ("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask),
    )
    if stages is not None and not any(stage.reads_text for stage in stages):
        for name, text, embeds, mask in texts:
            if any(value is not None for value in (text, embeds, mask)):
                raise ValueError(f"`{name}` was given, but no stage of this pipeline reads text.")
        return
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError(f"Exactly one of `prompt` ({shown(prompt)}) and `prompt_embeds` must be given.")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("Only one of `negative_prompt` and `negative_prompt_embeds` can be given.")
    for name, text, embeds, mask in texts:
        if text is not None:
            check_prompt(name, text)
            if tokenizer is None:
                raise ValueError(f"`{name}` needs a text encoder and a tokenizer; give `{name}_embeds` instead.")
        if embeds is not None:
            check_embeds(name, embeds, mask, stages or [])
        elif mask is not None:
            raise ValueError(f"`{name}_attention_mask` was given without `{name}_embeds`.")

    count = count_prompts(prompt, prompt_embeds)
    if isinstance(negative_prompt, list) or negative_prompt_embeds is not None:
        negatives = count_prompts(negative_prompt, negative_prompt_embeds)
        if negatives != count:
            raise ValueError(f"There are {negatives} negative prompts, but {count} prompts.")
    if negative_prompt is not None or negative_prompt_embeds is not None:
        lengths = [
            tokenizer.model_max_length if embeds is None else embeds.shape[1]
            for embeds in (prompt_embeds, negative_prompt_embeds)
        ]
        if lengths[0] != lengths[1]:
            raise ValueError(f"Prompts have {lengths[0]} tokens and negative prompts {lengths[1]}: pad both alike.")


def check_prompt(name: str, prompt: Any) -> None:
    """A string, or a list of at least one string, that a tokenizer can read."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` is {shown(prompt)}, but should be a string or a list of strings.")
    if len(texts) > MAX_IMAGES:
        raise ValueError(f"`{name}` has {len(texts)} entries, but should have at most {MAX_IMAGES}.")
    for text in texts:
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"`{name}` has a text of {len(text)} characters, but should have at most {MAX_PROMPT_CHARACTERS}."
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"`{name}` is {shown(text)}, which is no Unicode text: it holds half a surrogate pair.")


def check_embeds(name: str, embeds: Any, mask: Any, stages: list[Stage]) -> None:
    """Finite states `(prompts, tokens, width)` of the width that every network reads, and a mask of their shape."""
    check_tensor(f"{name}_embeds", embeds, "of shape (prompts, tokens, width)")
    if embeds.ndim != 3 or 0 in embeds.shape:
        raise ValueError(f"`{name}_embeds` has shape {tuple(embeds.shape)}, but should be (prompts, tokens, width).")
    if len(embeds) > MAX_IMAGES:
        raise ValueError(f"`{name}_embeds` has {len(embeds)} prompts, but should have at most {MAX_IMAGES}.")
    for stage in stages:
        width = stage.unet.config.encoder_hid_dim
        if width is not None and embeds.shape[-1] != width:
            raise ValueError(
                f"`{name}_embeds` has width {embeds.shape[-1]}, but the stage `{stage.name}` reads width {width}."
            )
    if mask is None:
        raise ValueError(
            f"`{name}_embeds` was given without `{name}_attention_mask`, of shape {tuple(embeds.shape[:2])}, which says "
            "what is padding; if nothing is, give ones."
        )
    check_tensor(f"{name}_attention_mask", mask, f"of shape {tuple(embeds.shape[:2])}", INTEGERS + FLOATS)
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"`{name}_attention_mask` has shape {tuple(mask.shape)}, but should be {tuple(embeds.shape[:2])}."
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"`{name}_attention_mask` has other values than 0 and 1, or True and False.")


def count_prompts(prompt: str | list[str] | None, embeds: torch.Tensor | None) -> int:
    """Number of prompts that were given, as texts or as embeddings; 1 without text."""
    if embeds is not None:
        return len(embeds)
    return len(prompt) if isinstance(prompt, list) else 1
