"""Settings of an image, stored in its PNG file: prompt, seed, steps, guidance, model, version.

The file has an international text chunk (iTXt) with the keyword `diffusers-imagen`. Its text is a JSON object in
UTF-8:

    version (str): version of this package.
    task (str): "generate", "image-to-image", "upscale" or "inpaint".
    model (dict[str, str]):
        by option, such as "model" or "sr256", the Hub id, or the name of the folder without its path.
    prompt (str), negative_prompt (str or null): the texts.
    seed (int): seed of the call, as in `torch.Generator().manual_seed(seed)`.
    image (int): index of the image in the call, from 0; for a grid, `images` instead, the number of images.
    num_inference_steps (dict[str, int]), guidance_scale (dict[str, float]), scheduler (dict[str, str]): by the name of
        each stage that ran.
    and all other settings of the call without their default value, by the pipeline's argument name. An infinite number is
    the largest finite one, which has the same meaning in a guidance interval.

Input images, paths, users and host names are not stored. Formats other than PNG contain no settings.
"""

import json
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.PngImagePlugin import PngInfo


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

KEYWORD = "diffusers-imagen"
BY_STAGE = ("num_inference_steps", "guidance_scale")
# arguments that are stored under other names, or are not settings
OWN = (*BY_STAGE, "prompt", "negative_prompt", "image", "mask_image", "generator", "num_images_per_prompt")
IDLE = (None, 0, False)  # default values of settings


def describe_call(
    task: str,
    pipe: "DiffusionPipeline",
    resolutions: Collection[int],
    sources: Mapping[str, str],
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the settings of a pipeline call, for all of its images; see above. The caller adds `seed` and `image`.

    Args:
        task (`str`): Name of the task.
        pipe ([`DiffusionPipeline`]): The pipeline.
        resolutions (`list[int]`): Resolutions of the stages that ran.
        sources (`dict[str, str]`): Folders and Hub ids of the model, by option.
        arguments (`dict`): Arguments of the call.
    """
    from ..pipelines.inputs import default_of, per_stage

    stages = [stage for stage in pipe.stages if stage.resolution in resolutions]
    names = [stage.name for stage in stages]
    by_stage = {
        name: dict(zip(names, per_stage(name, arguments.get(name), stages, default_of(name)))) for name in BY_STAGE
    }
    others = {name: finite(value) for name, value in arguments.items() if name not in OWN and value not in IDLE}
    tiles = {} if pipe.tiling is None else {"tile_size": pipe.tiling.tile_size, "tile_overlap": pipe.tiling.overlap}
    return {
        "version": version(KEYWORD),
        "task": task,
        "model": {name: source_name(source) for name, source in sources.items()},
        "prompt": arguments.get("prompt") or "",
        "negative_prompt": arguments.get("negative_prompt"),
        **by_stage,
        "scheduler": {stage.name: type(stage.scheduler).__name__ for stage in stages},
        **others,
        **tiles,
    }


def finite(value: Any) -> Any:
    """Return a setting with the largest number instead of infinity, which JSON does not have."""
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return min(value, sys.float_info.max) if isinstance(value, float) else value


def source_name(source: str) -> str:
    """Return a Hub id, or the name of a folder without its path."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def png_info(settings: Mapping[str, Any]) -> PngInfo:
    """Return the settings for a PNG file, to save with Pillow: `image.save(path, pnginfo=png_info(settings))`."""
    info = PngInfo()
    info.add_itxt(KEYWORD, json.dumps(settings, ensure_ascii=False, allow_nan=False))
    return info
