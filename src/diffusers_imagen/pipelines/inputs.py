"""Checks of the arguments of a pipeline call; all of them raise ValueError before any network runs."""

import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from ..schedulers.schedule_checks import as_values
from ..utils.arguments import as_integer, as_number, bad_argument, is_number, shown, to_float
from ..utils.bounds import MAX_GUIDANCE, MAX_NOISE_LEVEL, MAX_STEPS, MIN_AUGMENTATION_SIGMA
from ..utils.tensors import check_tensor
from .call_arguments import CallArguments, PerStage
from .prompts import MAX_PROMPTS
from .schedules import StageSettings
from .stage_table import check_stage_names
from .stages import Stage
from .tiling import Tiling


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Bounds per call: far beyond practical use, and below values that would run until the process is killed.
MAX_IMAGES = MAX_PROMPTS
MAX_PIXELS = 2**30  # of all images of a call: 1024 images of 1024 px, or one of 32768 px
MAX_RESAMPLE_TIMES = 100
MAX_TILE = 2**20  # the area of an image is limited by MAX_PIXELS


# ---- one value per stage

# arguments of a call that may be dicts by stage name
PER_STAGE = (
    *("num_inference_steps", "sigmas", "timesteps", "guidance_scale", "guidance_interval", "guidance_rescale"),
    "low_res_noise_level",
)


def per_stage(
    name: str,
    value: PerStage | None,
    stages: list[Stage],
    default: Callable[[Stage], Any],
    is_single: Callable[[Any], bool] = lambda value: False,
) -> list:
    """
    Return one value per stage: a single value applies to all, a list has one per stage, a dict has them by stage name.
    Stages that a dict does not name, and all stages if the value is None, have their default.

    `is_single` returns whether a list is a single value.
    """
    if value is None or isinstance(value, Mapping):
        given = value or {}
        return [given[stage.name] if stage.name in given else default(stage) for stage in stages]
    if not isinstance(value, (list, tuple)) or is_single(value):
        return [value] * len(stages)
    if len(value) != len(stages):
        names = [stage.name for stage in stages]
        raise ValueError(
            f"`{name}` has {len(value)} entries, {shown(list(value))}, but {len(names)} stages run: {names}."
        )
    return list(value)


def default_of(name: str) -> Callable[[Stage], Any]:
    """Return a function that returns a stage's default of the call argument `name`."""
    return attrgetter(f"defaults.{name}")


def no_value(stage: Stage) -> None:
    """Return the default of an argument that a stage needs no value for."""


def schedules_per_stage(name: str, value: Any, stages: list[Stage]) -> list[list[float] | torch.Tensor | None]:
    """Return the caller's noise levels for each stage: a list if a single stage runs, else a dict by stage name."""
    if isinstance(value, (list, tuple, np.ndarray, torch.Tensor)) and len(stages) > 1:
        raise ValueError(
            f"`{name}` is {shown(value)}, but {len(stages)} stages run: pass a dict with a list for each stage with a "
            f"custom schedule, among {[stage.name for stage in stages]}."
        )
    per = per_stage(name, value, stages, no_value, is_single=lambda value: True)
    return [None if values is None else as_schedule(name, values) for values in per]


def as_schedule(name: str, values: Any) -> list[float] | torch.Tensor:
    """
    Return finite numbers as a list, or as a tensor of one dimension, whose dtype can be significant to a scheduler.
    """
    tensor = as_values(name, values)
    if len(tensor) == 0 or not tensor.isfinite().all():
        raise ValueError(f"`{name}` is {shown(values)}, but should be a list of finite numbers.")
    return values.detach() if isinstance(values, torch.Tensor) else tensor.tolist()


def check_stage_arguments(arguments: CallArguments, stages: list[Stage]) -> None:
    """Raise ValueError for empty dicts, and for names of other stages than a pipeline's, whether or not they run."""
    for name in PER_STAGE:
        value = getattr(arguments, name)
        if isinstance(value, Mapping):
            takes = [stage for stage in stages if not (stage.is_base and name == "low_res_noise_level")]
            check_stage_names(name, value, [stage.name for stage in takes])
            if not value:
                raise bad_argument(name, value, "a value, or a dict of values by stage name")


def stage_settings(arguments: CallArguments, stages: list[Stage]) -> list[StageSettings]:
    """Return the settings of each stage, checked."""
    name = "num_inference_steps"
    steps = per_stage(name, arguments.num_inference_steps, stages, default_of(name))
    steps = [as_integer(name, value, 1, MAX_STEPS) for value in steps]
    scales = per_stage("guidance_scale", arguments.guidance_scale, stages, default_of("guidance_scale"))
    scales = [as_guidance(stage, scale) for stage, scale in zip(stages, scales)]
    intervals = per_stage("guidance_interval", arguments.guidance_interval, stages, no_value, is_single=_is_pair)
    intervals = [as_interval(interval) for interval in intervals]
    name = "guidance_rescale"
    rescales = per_stage(name, arguments.guidance_rescale, stages, default=lambda stage: 0.0)
    rescales = [as_number(name, value, 0.0, 1.0) for value in rescales]
    upscaling = [stage for stage in stages if not stage.is_base]
    name = "low_res_noise_level"
    noise_levels = per_stage(name, arguments.low_res_noise_level, upscaling, default_of(name))
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
    """Return the lowest and the highest noise level with guidance as a pair of floats."""
    if interval is None:
        return None
    if not (_is_pair(interval) and 0 <= interval[0] <= interval[1]):
        raise ValueError(
            f"`guidance_interval` is {shown(interval)}, but should be a pair of noise levels, the lower one first."
        )
    return to_float(interval[0]), to_float(interval[1])


def as_guidance(stage: Stage, scale: Any) -> float:
    """Return the guidance scale of a stage, checked."""
    number = as_number("guidance_scale", scale, minimum=0.0)
    if number > MAX_GUIDANCE:
        raise ValueError(
            f"`guidance_scale` is {shown(scale)} for the stage `{stage.name}`, but should be at most "
            f"{MAX_GUIDANCE:g}: above that, guided predictions are not finite."
        )
    if number != 1.0 and not stage.reads_text and stage.guidance_unet is None:
        raise ValueError(
            f"`guidance_scale` is {scale} for the stage `{stage.name}`, but should be 1: the stage is not "
            "conditioned on text."
        )
    return number


def _is_pair(value: Any) -> bool:
    numbers = isinstance(value, (list, tuple)) and len(value) == 2
    return numbers and all(is_number(n) and not math.isnan(to_float(n)) for n in value)


# ---- numbers and choices


def check_flag(name: str, value: Any) -> None:
    """Check that a value is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` is {shown(value)}, but should be True or False.")


def as_images_per_prompt(value: Any, num_prompts: int) -> int:
    """Return the number of images per prompt; the total is limited."""
    number = as_integer("num_images_per_prompt", value, 1, MAX_IMAGES)
    if number * num_prompts > MAX_IMAGES:
        raise ValueError(
            f"`num_images_per_prompt` is {number} for {num_prompts} prompts, but a call generates at most "
            f"{MAX_IMAGES} images."
        )
    return number


def check_pixels(num_images: int, sizes: dict[int, tuple[int, int]]) -> None:
    """Check the total number of pixels of a call."""
    height, width = max(sizes.values())
    if num_images * height * width > MAX_PIXELS:
        raise ValueError(
            f"`height` and `width` are {height} and {width} for {num_images} images, but the images of a call should "
            f"have at most {MAX_PIXELS} pixels in total: request smaller or fewer images."
        )


def check_tiling(tile_size: Any, overlap: Any, stages: list[Stage]) -> Tiling:
    """
    Return tiles, checked: multiples of every super-resolution network's stride, with an overlap below the tile size.
    """
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
    """Check that the generator is None, one generator, or a list of one per image, on a supported device."""
    if generator is None:
        return
    entries = generator if isinstance(generator, list) else [generator]
    for entry in entries:
        if not isinstance(entry, torch.Generator):
            raise ValueError(
                f"`generator` is {shown(generator)}, but should be a torch.Generator or a list of one for each image."
            )
        if entry.device.type not in ("cpu", device.type):
            raise ValueError(f"`generator` is on {entry.device}, but the pipeline runs on {device}.")
    if len({entry.device.type for entry in entries}) > 1:
        raise ValueError("`generator` has generators on several devices, but all should be on one.")
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(
            f"`generator` has {len(generator)} entries, but should have {num_images}, one for each image."
        )


def check_latents(latents: Any, num_images: int, first: Stage) -> None:
    """Check that the caller's initial noise fits the first stage."""
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
    """Return one generator per image, seeded from the caller's generator of that image, or from a single one in order.

    An image therefore depends on the seed and on its position, not on the number of images in the batch; and the first
    image of a single generator equals the first image of a list that begins with a generator of the same seed.
    """
    if generator is None:
        return None
    sources = generator if isinstance(generator, list) else [generator] * num_images
    seeds = [int(torch.randint(2**62, (), generator=source, device=source.device)) for source in sources]
    return [torch.Generator(source.device).manual_seed(seed) for source, seed in zip(sources, seeds)]
