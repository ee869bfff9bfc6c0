"""Checks and shapes of what a caller gives to a pipeline. Every check raises ValueError before any network runs."""

import math
from typing import Any, Optional, TypeVar, Union

import torch

from ..models.unet_base import ConditionalUNet


T = TypeVar("T")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def per_stage(name: str, value: Union[T, list[T], dict[str, T]], stages: list) -> list[T]:
    """One value for each stage: a single value serves all, a list has one for each, a dict has them by stage name."""
    names = [stage.name for stage in stages]
    if isinstance(value, dict):
        missing = [stage for stage in names if stage not in value]
        if missing:
            raise ValueError(f"`{name}` is {value!r}, which lacks the stages {missing}.")
        return [value[stage] for stage in names]
    if not isinstance(value, (list, tuple)):
        return [value] * len(stages)
    if len(value) != len(stages):
        raise ValueError(f"`{name}` has {len(value)} entries, {list(value)}, but {len(names)} stages run: {names}.")
    return list(value)


def check_count(name: str, values: list) -> None:
    """Whole numbers from 1."""
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` is {value!r}, but should be an integer of at least 1.")


def check_finite(name: str, values: list, minimum: float) -> None:
    """Real numbers from a minimum."""
    for value in values:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not minimum <= value < math.inf:
            raise ValueError(f"`{name}` is {value!r}, but should be a number of at least {minimum:g}.")


def check_prompt(name: str, prompt: Any) -> None:
    """A string, or a list of at least one string."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, list) or not prompt or not all(isinstance(text, str) for text in prompt):
        raise ValueError(f"`{name}` is {prompt!r}, but should be a string or a list of strings.")


def check_embeds(name: str, embeds: torch.Tensor, mask: Optional[torch.Tensor], unets: list[ConditionalUNet]) -> None:
    """States `(prompts, tokens, width)` of the width that every network reads, and a mask of their shape."""
    if embeds.ndim != 3:
        raise ValueError(f"`{name}_embeds` has shape {tuple(embeds.shape)}, but should be (prompts, tokens, width).")
    for unet in unets:
        width = unet.config.encoder_hid_dim
        if width is not None and embeds.shape[-1] != width:
            raise ValueError(
                f"`{name}_embeds` has width {embeds.shape[-1]}, but the networks of this pipeline read width {width}."
            )
    if mask is not None and mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"`{name}_attention_mask` has shape {tuple(mask.shape)}, but should be {tuple(embeds.shape[:2])}."
        )


def count_prompts(prompt: Union[str, list[str], None], embeds: Optional[torch.Tensor]) -> int:
    """Number of prompts that were given, as texts or as embeddings."""
    if embeds is not None:
        return len(embeds)
    return 1 if isinstance(prompt, str) else len(prompt)


def full_mask(embeds: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
    """The mask as booleans; without one, every token counts."""
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return mask.bool()


def per_image_generators(
    generator: Union[torch.Generator, list[torch.Generator], None], num_images: int
) -> Optional[list[torch.Generator]]:
    """A generator for each image: the caller's own, or ones seeded from the caller's single generator in turn.

    So an image depends on the seed and on its place, and not on how many images are made along with it.
    """
    if generator is None or isinstance(generator, list):
        return generator
    seeds = [torch.randint(2**62, (), generator=generator, device=generator.device).item() for _ in range(num_images)]
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]


def double(tensor: torch.Tensor, guided: bool) -> torch.Tensor:
    """The batch twice, for the unconditional and the conditional branch of guidance."""
    return torch.cat([tensor, tensor]) if guided else tensor
