"""Checks of what a caller gives to a pipeline. Every check raises ValueError before any network runs."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..schedulers.schedule_checks import as_values
from ..utils.arguments import as_integer, as_number, is_number, shown, to_float
from ..utils.bounds import MAX_GUIDANCE, MAX_NOISE_LEVEL, MAX_STEPS, MIN_AUGMENTATION_SIGMA
from ..utils.tensors import check_tensor
from .call_arguments import CallArguments, PerStage
from .prompts import MAX_PROMPTS
from .schedules import StageSettings
from .stage_table import check_stage_names
from .stages import Stage
from .tiling import Tiling


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Bounds of what one call may ask for: far beyond use, and below what would run until it is killed.
MAX_IMAGES = MAX_PROMPTS
MAX_PIXELS = 2**30  # of all images of a call: 1024 images of 1024 px, or one of 32768 px
MAX_RESAMPLE_TIMES = 100
MAX_TILE = 2**20  # of tiles; an image has MAX_PIXELS


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
            raise ValueError(f"`{name}` is {shown(value)}, which lacks the stages {missing}.")
        check_stage_names(name, value)
        return [value[stage] for stage in names]
    if not isinstance(value, (list, tuple)) or is_single(value):
        return [value] * len(stages)
    if len(value) != len(stages):
        raise ValueError(
            f"`{name}` has {len(value)} entries, {shown(list(value))}, but {len(names)} stages run: {names}."
        )
    return list(value)


def per_stage_or_default(name: str, value: PerStage | None, stages: list[Stage]) -> list:
    """As `per_stage`, or without a value what each stage has by default."""
    return [getattr(stage.defaults, name) for stage in stages] if value is None else per_stage(name, value, stages)


def optional_per_stage(name: str, value: Any, stages: list[Stage], **kwargs) -> list:
    """As `per_stage`, but stages that a dict lacks have None, as all have without a value."""
    if isinstance(value, dict):
        value = {**dict.fromkeys(stage.name for stage in stages), **value}
    return per_stage(name, value, stages, **kwargs)


def schedules_per_stage(name: str, value: Any, stages: list[Stage]) -> list[list[float] | torch.Tensor | None]:
    """The caller's noise levels for each stage: a list if a single stage runs, else a dict by stage name."""
    if isinstance(value, (list, tuple, np.ndarray, torch.Tensor)) and len(stages) > 1:
        raise ValueError(
            f"`{name}` is {shown(value)}, but {len(stages)} stages run: give a dict with a list for each stage that is "
            f"to have its own, among {[stage.name for stage in stages]}."
        )
    per = optional_per_stage(name, value, stages, is_single=lambda value: True)
    return [None if values is None else as_schedule(name, values) for values in per]


def as_schedule(name: str, values: Any) -> list[float] | torch.Tensor:
    """Finite numbers in a list, or as a tensor of one dimension, whose dtype may mean something to a scheduler."""
    tensor = as_values(name, values)
    if len(tensor) == 0 or not tensor.isfinite().all():
        raise ValueError(f"`{name}` is {shown(values)}, but should be a list of finite numbers.")
    return values.detach() if isinstance(values, torch.Tensor) else tensor.tolist()


def stage_settings(arguments: CallArguments, stages: list[Stage]) -> list[StageSettings]:
    """What is asked of each stage, checked."""
    name = "num_inference_steps"
    steps = per_stage_or_default(name, arguments.num_inference_steps, stages)
    steps = [as_integer(name, value, 1, MAX_STEPS) for value in steps]
    scales = per_stage_or_default("guidance_scale", arguments.guidance_scale, stages)
    scales = [as_guidance(stage, scale) for stage, scale in zip(stages, scales)]
    intervals = optional_per_stage("guidance_interval", arguments.guidance_interval, stages, is_single=_is_pair)
    intervals = [as_interval(interval) for interval in intervals]
    name = "guidance_rescale"
    rescales = [as_number(name, value, 0.0, 1.0) for value in per_stage(name, arguments.guidance_rescale, stages)]
    upscaling = [stage for stage in stages if not stage.is_base]
    name = "low_res_noise_level"
    noise_levels = per_stage_or_default(name, arguments.low_res_noise_level, upscaling)
    noise_levels = [as_number(name, value, MIN_AUGMENTATION_SIGMA, MAX_NOISE_LEVEL) for value in noise_levels]
    noise_levels = [0.0] * (len(stages) - len(upscaling)) + noise_levels
    own_sigmas = schedules_per_stage("sigmas", arguments.sigmas, stages)
    own_timesteps = schedules_per_stage("timesteps", arguments.timesteps, stages)
    for stage, a, b in zip(stages, own_sigmas, own_timesteps):
        if a is not None and b is not None:
            raise ValueError(f"Only one of `sigmas` and `timesteps` can be given for the stage `{stage.name}`.")
    columns = steps, own_sigmas, own_timesteps, scales, intervals, rescales, noise_levels
    return [StageSettings(*row) for row in zip(*columns)]


def as_interval(interval: Any) -> tuple[float, float] | None:
    """Lowest and highest noise level with guidance, as a pair of floats."""
    if interval is None:
        return None
    if not (_is_pair(interval) and 0 <= interval[0] <= interval[1]):
        raise ValueError(
            f"`guidance_interval` is {shown(interval)}, but should be a pair of noise levels, the lower one first."
        )
    return to_float(interval[0]), to_float(interval[1])


def as_guidance(stage: Stage, scale: Any) -> float:
    """A guidance scale that a stage can have."""
    number = as_number("guidance_scale", scale, minimum=0.0)
    if number > MAX_GUIDANCE:
        raise ValueError(
            f"`guidance_scale` is {shown(scale)} for the stage `{stage.name}`, but should be at most {MAX_GUIDANCE:g}: "
            "beyond, guided predictions are not finite."
        )
    if number != 1.0 and not stage.reads_text and stage.guidance_unet is None:
        raise ValueError(
            f"`guidance_scale` is {scale} for the stage `{stage.name}`, which reads no text: it should be 1."
        )
    return number


def _is_pair(value: Any) -> bool:
    numbers = isinstance(value, (list, tuple)) and len(value) == 2
    return numbers and all(is_number(n) and not math.isnan(to_float(n)) for n in value)


# ---- numbers and choices


def check_flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` is {shown(value)}, but should be True or False.")


def as_images_per_prompt(value: Any, num_prompts: int) -> int:
    """Images of each prompt, not too many in all."""
    number = as_integer("num_images_per_prompt", value, 1, MAX_IMAGES)
    if number * num_prompts > MAX_IMAGES:
        raise ValueError(
            f"`num_images_per_prompt` is {number} for {num_prompts} prompts, but a call makes at most {MAX_IMAGES} images."
        )
    return number


def check_pixels(num_images: int, sizes: dict[int, tuple[int, int]]) -> None:
    """As many pixels as a call can have in all."""
    height, width = max(sizes.values())
    if num_images * height * width > MAX_PIXELS:
        raise ValueError(
            f"`height` and `width` are {height} and {width} for {num_images} images, but the images of a call have at "
            f"most {MAX_PIXELS} pixels: ask for smaller ones, or for fewer of them."
        )


def check_tiling(tile_size: Any, overlap: Any, stages: list[Stage]) -> Tiling:
    """Tiles that every super-resolution network can take, and that overlap by less than a tile."""
    tiling = Tiling(as_integer("tile_size", tile_size, 1, MAX_TILE), as_integer("overlap", overlap, 0, MAX_TILE))
    for stage in stages:
        stride = stage.unet.total_stride
        for name, value in zip(tiling._fields, tiling):
            if value % stride:
                raise ValueError(
                    f"`{name}` is {value!r}, but the network of the stage `{stage.name}` takes multiples of {stride}."
                )
    if tiling.overlap >= tiling.tile_size:
        raise ValueError(f"`overlap` is {tiling.overlap}, but should be below `tile_size`, {tiling.tile_size}.")
    return tiling


# ---- noise


def check_generator(generator: Any, num_images: int, device: torch.device) -> None:
    """None, a generator, or one for each image, of a device that noise can be drawn on."""
    if generator is None:
        return
    entries = generator if isinstance(generator, list) else [generator]
    for entry in entries:
        if not isinstance(entry, torch.Generator):
            raise ValueError(
                f"`generator` is {shown(generator)}, but should be a torch.Generator or a list of one for each image."
            )
        if entry.device.type not in ("cpu", device.type):
            raise ValueError(f"`generator` is one of {entry.device}, but the pipeline runs on {device}.")
    if len({entry.device.type for entry in entries}) > 1:
        raise ValueError("`generator` has generators of several devices, but all should be of one.")
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"`generator` has {len(generator)} entries, but {num_images} images are to be made.")


def check_latents(latents: Any, num_images: int, first: Stage) -> None:
    """The caller's own noise fits the first stage."""
    if latents is None:
        return
    stride, channels = first.unet.total_stride, first.unet.in_channels
    form = f"({num_images}, {channels}, height, width)"
    check_tensor("latents", latents, f"of shape {form}")
    fits = latents.ndim == 4 and latents.shape[:2] == (num_images, channels)
    if not fits or any(pixels % stride or not pixels for pixels in latents.shape[2:]):
        raise ValueError(
            f"`latents` has shape {tuple(latents.shape)}, but should be {form} with multiples of {stride}."
        )


def per_image_generators(
    generator: torch.Generator | list[torch.Generator] | None, num_images: int
) -> list[torch.Generator] | None:
    """A generator for each image, seeded from its own of the caller's, or from the caller's single one in turn.

    So an image depends on the seed and on its place, and not on how many images are made along with it; and the first
    image of a single generator is that of a list which begins with one of its seed.
    """
    if generator is None:
        return None
    sources = generator if isinstance(generator, list) else [generator] * num_images
    seeds = [int(torch.randint(2**62, (), generator=source, device=source.device)) for source in sources]
    return [torch.Generator(source.device).manual_seed(seed) for source, seed in zip(sources, seeds)]
