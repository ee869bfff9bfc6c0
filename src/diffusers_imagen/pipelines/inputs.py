"""Checks of what a caller gives to a pipeline. Every check raises ValueError before any network runs."""

import math
from typing import Any, Callable, Optional, TypeVar, Union

import torch
from transformers import PreTrainedTokenizerBase

from .planning import StageSettings
from .stages import STAGE_NAMES, Stage
from .tiling import Tiling


T = TypeVar("T")
PerStage = Union[T, list[T], dict[str, T]]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MIN_NOISE_LEVEL = 0.002  # EDM's lowest noise level; its conditioning value, a logarithm, has none at zero


# ---- one value for each stage


def per_stage(
    name: str, value: PerStage, stages: list[Stage], is_single: Callable[[Any], bool] = lambda value: False
) -> list:
    """One value for each stage: a single value serves all, a list has one for each, a dict has them by stage name.

    `is_single` tells of a list whether it is a single value.
    """
    names = [stage.name for stage in stages]
    if isinstance(value, dict):
        missing = [stage for stage in names if stage not in value]
        if missing:
            raise ValueError(f"`{name}` is {value!r}, which lacks the stages {missing}.")
        unknown = [key for key in value if key not in STAGE_NAMES]
        if unknown:
            raise ValueError(f"`{name}` has {unknown}, but stages are named {', '.join(STAGE_NAMES)}.")
        return [value[stage] for stage in names]
    if not isinstance(value, (list, tuple)) or is_single(value):
        return [value] * len(stages)
    if len(value) != len(stages):
        raise ValueError(f"`{name}` has {len(value)} entries, {list(value)}, but {len(names)} stages run: {names}.")
    return list(value)


def optional_per_stage(name: str, value: Any, stages: list[Stage], **kwargs) -> list:
    """As `per_stage`, but stages that a dict lacks have None, as all have without a value."""
    if isinstance(value, dict):
        value = {**dict.fromkeys(stage.name for stage in stages), **value}
    return per_stage(name, value, stages, **kwargs)


def levels_per_stage(name: str, value: Any, stages: list[Stage]) -> list[Optional[list[float]]]:
    """The caller's noise levels for each stage: a list if a single stage runs, else a dict by stage name."""
    if isinstance(value, (list, tuple, torch.Tensor)) and len(stages) > 1:
        raise ValueError(
            f"`{name}` is {value!r}, but {len(stages)} stages run: give a dict with a list for each stage that is to "
            f"have its own, among {[stage.name for stage in stages]}."
        )
    per = optional_per_stage(name, value, stages, is_single=lambda value: True)
    for levels in per:
        if levels is not None and not (isinstance(levels, (list, tuple, torch.Tensor)) and len(levels) > 0):
            raise ValueError(f"`{name}` is {levels!r}, but should be a list of numbers.")
    return [list(levels) if isinstance(levels, tuple) else levels for levels in per]


def stage_settings(
    stages: list[Stage],
    num_inference_steps: PerStage,
    sigmas: Any,
    timesteps: Any,
    guidance_scale: PerStage,
    guidance_interval: Any,
    guidance_rescale: PerStage,
    low_res_noise_level: PerStage,
) -> list[StageSettings]:
    """What is asked of each stage, checked."""
    steps = per_stage("num_inference_steps", num_inference_steps, stages)
    check_count("num_inference_steps", steps)
    scales = per_stage("guidance_scale", guidance_scale, stages)
    check_finite("guidance_scale", scales, minimum=0.0)
    intervals = optional_per_stage("guidance_interval", guidance_interval, stages, is_single=_is_pair)
    for interval in intervals:
        if interval is not None and not (_is_pair(interval) and 0 <= interval[0] <= interval[1]):
            raise ValueError(
                f"`guidance_interval` is {interval!r}, but should be a pair of noise levels, the lower one first."
            )
    rescales = per_stage("guidance_rescale", guidance_rescale, stages)
    check_finite("guidance_rescale", rescales, minimum=0.0, maximum=1.0)
    upscaling = [stage for stage in stages if stage.name != "base"]
    noise_levels = per_stage("low_res_noise_level", low_res_noise_level, upscaling)
    check_finite("low_res_noise_level", noise_levels, minimum=MIN_NOISE_LEVEL)
    noise_levels = [0.0] * (len(stages) - len(upscaling)) + noise_levels
    own_sigmas = levels_per_stage("sigmas", sigmas, stages)
    own_timesteps = levels_per_stage("timesteps", timesteps, stages)
    for stage, a, b in zip(stages, own_sigmas, own_timesteps):
        if a is not None and b is not None:
            raise ValueError(f"Only one of `sigmas` and `timesteps` can be given for the stage `{stage.name}`.")
    for stage, scale in zip(stages, scales):
        if scale != 1.0 and not stage.reads_text and stage.guidance_unet is None:
            raise ValueError(
                f"`guidance_scale` is {scale} for the stage `{stage.name}`, which reads no text: it should be 1."
            )
    columns = steps, own_sigmas, own_timesteps, scales, intervals, rescales, noise_levels
    return [StageSettings(*row) for row in zip(*columns)]


def _is_pair(value: Any) -> bool:
    numbers = isinstance(value, (list, tuple)) and len(value) == 2
    return numbers and all(isinstance(n, (int, float)) and not math.isnan(n) for n in value)


# ---- numbers and choices


def check_callback(tensor_inputs: list[str], known: list[str]) -> None:
    """Tensors that callbacks may have."""
    unknown = set(tensor_inputs) - set(known)
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, but should be among {known}.")


def check_count(name: str, values: list) -> None:
    """Whole numbers from 1."""
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` is {value!r}, but should be an integer of at least 1.")


def check_finite(name: str, values: list, minimum: float, maximum: float = math.inf) -> None:
    """Real numbers from a minimum to a maximum."""
    for value in values:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not minimum <= value <= maximum or value == math.inf:
            raise ValueError(
                f"`{name}` is {value!r}, but should be a number of at least {minimum:g}"
                + (f" and at most {maximum:g}." if maximum < math.inf else ".")
            )


def check_tiling(tiling: Tiling, stages: list[Stage]) -> None:
    """Tiles that every super-resolution network can take, and that overlap by less than a tile."""
    for stage in stages:
        for name, value in zip(("tile_size", "overlap"), tiling):
            stride = stage.unet.total_stride
            lowest = stride if name == "tile_size" else 0
            if not isinstance(value, int) or value < lowest or value % stride:
                raise ValueError(
                    f"`{name}` is {value!r}, but the network of the stage `{stage.name}` takes multiples of {stride}."
                )
    if tiling.overlap >= tiling.tile_size:
        raise ValueError(f"`overlap` is {tiling.overlap}, but should be below `tile_size`, {tiling.tile_size}.")


# ---- text


def check_text(
    stages: list[Stage],
    tokenizer: Optional[PreTrainedTokenizerBase],
    prompt: Union[str, list[str], None],
    negative_prompt: Union[str, list[str], None],
    prompt_embeds: Optional[torch.Tensor],
    prompt_attention_mask: Optional[torch.Tensor],
    negative_prompt_embeds: Optional[torch.Tensor],
    negative_prompt_attention_mask: Optional[torch.Tensor],
) -> None:
    """There is one description of each prompt, and the networks can read it. `tokenizer` is None without encoder."""
    texts = (
        ("prompt", prompt, prompt_embeds, prompt_attention_mask),
        ("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask),
    )
    if not any(stage.reads_text for stage in stages):
        for name, text, embeds, _ in texts:
            if text is not None or embeds is not None:
                raise ValueError(f"`{name}` was given, but no stage of this pipeline reads text.")
        return
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError(f"Exactly one of `prompt` ({prompt!r}) and `prompt_embeds` must be given.")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("Only one of `negative_prompt` and `negative_prompt_embeds` can be given.")
    for name, text, embeds, mask in texts:
        if text is not None:
            check_prompt(name, text)
            if tokenizer is None:
                raise ValueError(f"`{name}` needs a text encoder and a tokenizer; give `{name}_embeds` instead.")
        if embeds is not None:
            check_embeds(name, embeds, mask, stages)
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
    """A string, or a list of at least one string."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, list) or not prompt or not all(isinstance(text, str) for text in prompt):
        raise ValueError(f"`{name}` is {prompt!r}, but should be a string or a list of strings.")


def check_embeds(name: str, embeds: torch.Tensor, mask: Optional[torch.Tensor], stages: list[Stage]) -> None:
    """Finite states `(prompts, tokens, width)` of the width that every network reads, and a mask of their shape."""
    if embeds.ndim != 3 or 0 in embeds.shape:
        raise ValueError(f"`{name}_embeds` has shape {tuple(embeds.shape)}, but should be (prompts, tokens, width).")
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
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"`{name}_attention_mask` has shape {tuple(mask.shape)}, but should be {tuple(embeds.shape[:2])}."
        )
    if not embeds.isfinite().all():
        raise ValueError(f"`{name}_embeds` has values that are not finite (NaN or infinite).")


def count_prompts(prompt: Union[str, list[str], None], embeds: Optional[torch.Tensor]) -> int:
    """Number of prompts that were given, as texts or as embeddings; 1 without text."""
    if embeds is not None:
        return len(embeds)
    return len(prompt) if isinstance(prompt, list) else 1


# ---- noise


def check_noise(
    generator: Union[torch.Generator, list[torch.Generator], None],
    latents: Optional[torch.Tensor],
    num_images: int,
    first: Stage,
) -> None:
    """There is noise for every image, and the caller's own fits the first stage."""
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"`generator` has {len(generator)} entries, but {num_images} images are to be made.")
    if latents is None:
        return
    stride, channels = first.unet.total_stride, first.unet.config.in_channels
    fits = latents.ndim == 4 and latents.shape[:2] == (num_images, channels)
    if not fits or any(side % stride or not side for side in latents.shape[2:]):
        raise ValueError(
            f"`latents` has shape {tuple(latents.shape)}, but should be ({num_images}, {channels}, height, width) "
            f"with multiples of {stride}."
        )
    if not latents.isfinite().all():
        raise ValueError("`latents` has values that are not finite (NaN or infinite).")


def per_image_generators(
    generator: Union[torch.Generator, list[torch.Generator], None], num_images: int
) -> Optional[list[torch.Generator]]:
    """A generator for each image, seeded from its own of the caller's, or from the caller's single one in turn.

    So an image depends on the seed and on its place, and not on how many images are made along with it; and the first
    image of a single generator is that of a list which begins with one of its seed.
    """
    if generator is None:
        return None
    sources = generator if isinstance(generator, list) else [generator] * num_images
    seeds = [torch.randint(2**62, (), generator=source, device=source.device).item() for source in sources]
    return [torch.Generator(source.device).manual_seed(seed) for source, seed in zip(sources, seeds)]
