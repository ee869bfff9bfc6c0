"""The settings that a picture was made with, in its PNG file: prompt, seed, steps, guidance, model, version.

The file has an international text chunk (iTXt) with the keyword `diffusers-imagen`. Its text is a JSON object in UTF-8:

    version (str): of this package.
    task (str): "generate", "image-to-image", "upscale" or "inpaint".
    model (dict[str, str]): by option, such as "model" or "sr256", the Hub id, or the name of the folder without its path.
    prompt (str), negative_prompt (str or null): the texts.
    seed (int): of the call, as `torch.Generator().manual_seed(seed)`.
    image (int): the number of the picture among those of the call, from 0; `images` instead, for a grid of so many.
    num_inference_steps (dict[str, int]), guidance_scale (dict[str, float]), scheduler (dict[str, str]): by the name of
        each stage that ran.
    and every other setting of the call that is not at its default, by the pipeline's name of the argument.

Pictures that were given, paths, users and machines are not in it. Other formats than PNG have no settings.
"""

import json
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.PngImagePlugin import PngInfo


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

KEYWORD = "diffusers-imagen"
BY_STAGE = ("num_inference_steps", "guidance_scale")
# what is recorded under names of its own, or is no setting
OWN = (*BY_STAGE, "prompt", "negative_prompt", "image", "mask_image", "generator", "num_images_per_prompt")
IDLE = (None, 0, False)  # settings at their defaults


def describe_call(
    task: str,
    pipe: "DiffusionPipeline",
    resolutions: Collection[int],
    sources: Mapping[str, str],
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings of a call of a pipeline, for all of its pictures; see above. `seed` and `image` are to be added.

    Args:
        task (`str`): What was asked for.
        pipe ([`DiffusionPipeline`]): What was called.
        resolutions (`list[int]`): Of the stages that ran.
        sources (`dict[str, str]`): Folders and Hub ids of the model, by option.
        arguments (`dict`): What the pipeline was called with.
    """
    from ..pipelines.inputs import per_stage_or_default

    stages = [stage for stage in pipe.stages if stage.resolution in resolutions]
    names = [stage.name for stage in stages]
    by_stage = {name: dict(zip(names, per_stage_or_default(name, arguments.get(name), stages))) for name in BY_STAGE}
    others = {name: value for name, value in arguments.items() if name not in OWN and value not in IDLE}
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


def source_name(source: str) -> str:
    """A Hub id, or the name of a folder without the path to it."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def png_info(settings: Mapping[str, Any]) -> PngInfo:
    """The settings as Pillow writes them into a PNG file: `image.save(path, pnginfo=png_info(settings))`."""
    info = PngInfo()
    info.add_itxt(KEYWORD, json.dumps(settings, ensure_ascii=False, allow_nan=False))
    return info
