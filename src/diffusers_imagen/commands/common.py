"""What several commands need: the settings of a call, and image files that are whole or absent."""

import argparse
import math
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .. import pipelines
from ..pipelines.stage_table import STAGES
from ..utils.bounds import MAX_STEPS
from ..utils.files import check_writable, whole_file
from ..utils.images import BadImage
from ..utils.images import read_image as read_picture
from .model_arguments import check_model, load_pipeline, sources_of
from .parser import Parser, check_prompt
from .picture_settings import describe_call, png_info
from .sharing import refuse_several


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEFAULT_OUTPUT = Path("output.png")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_SIZES = {"JPEG": 65500, "WEBP": 16383}  # height and width in pixels
# how much of a prompt goes into the name of its file, in characters and in bytes: file systems take 255 bytes in all
NAME_LENGTH, NAME_BYTES = 60, 180
# bounds: what is above is a slip, and would run until it is killed
MAX_SIZE = 8192  # height and width in pixels
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 1000
MAX_IMAGES = 1000


def add_sampling_arguments(command: Parser) -> None:
    """How images are made, and where they go."""
    command.add_argument("--negative-prompt", help="what to guide away from")
    command.add_argument("--output", type=Path, help=f"image file; default: {DEFAULT_OUTPUT}")
    command.add_number(
        "--resolution",
        int,
        1,
        MAX_SIZE,
        "output_resolution",
        help="stop after the stage of this resolution: " + ", ".join(str(kind.resolution) for kind in STAGES),
    )
    command.add_number("--height", int, 1, MAX_SIZE, help="of the image in pixels; default: the resolution")
    command.add_number("--width", int, 1, MAX_SIZE, help="of the image in pixels; default: the resolution")
    command.add_number("--seed", int, 0, MAX_SEED, default=0, help="default: %(default)s")
    per_stage = "for all stages, or one value a stage; default: each stage's own"
    command.add_number("--steps", int, 1, MAX_STEPS, "num_inference_steps", nargs="+", help=per_stage)
    command.add_number("--guidance-scale", float, 0, MAX_GUIDANCE, nargs="+", help=per_stage)
    command.add_number(
        "--guidance-interval",
        float,
        0,
        math.inf,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="lowest and highest noise level (sigma) with guidance; default: all",
    )
    command.add_number(
        "--guidance-rescale",
        float,
        0,
        1,
        default=0.0,
        help="share brought back to plain contrast; default: %(default)s",
    )
    command.add_number(
        "--num-images",
        int,
        1,
        MAX_IMAGES,
        "num_images_per_prompt",
        default=1,
        help="of each prompt, numbered: output-0.png, ...",
    )
    command.add_argument("--grid", action="store_true", help="write all images into one file, side by side")


def sampling_arguments(args: argparse.Namespace, pipe: "DiffusionPipeline") -> dict:
    """What the pipeline is told of them, but for the number of images and the source of noise."""
    return {
        "negative_prompt": args.negative_prompt,
        **size_arguments(args, pipe),
        "num_inference_steps": scalar_or_list(args.steps),
        "guidance_scale": scalar_or_list(args.guidance_scale),
        "guidance_interval": None if args.guidance_interval is None else tuple(args.guidance_interval),
        "guidance_rescale": args.guidance_rescale,
    }


def size_arguments(args: argparse.Namespace, pipe: "DiffusionPipeline") -> dict[str, int | None]:
    """The size of the result: of a cascade the stage to stop after, of an upscaler alone, by default its own resolution.

    Raises:
        ValueError: If a stage alone has another resolution than was asked for.
    """
    sizes = {"height": args.height, "width": args.width}
    if not isinstance(pipe, pipelines.ImagenSuperResolutionPipeline):
        return {"output_resolution": args.resolution, **sizes}
    resolution = pipe.stages[0].resolution
    if args.resolution not in (None, resolution):
        raise ValueError(f"`output_resolution` is {args.resolution}, but the one stage ends at {resolution}.")
    return {name: pixels or resolution for name, pixels in sizes.items()}


def check_sampling(args: argparse.Namespace, upscaler_alone: bool = False) -> None:
    """Refuses what can be refused before pictures are read and a model loads: output, device, model and texts."""
    refuse_several("One call of a model")
    check_output(args)
    check_device(args.device)
    check_model(args, upscaler_alone)
    for name in ("prompt", "negative_prompt"):
        check_prompt(name, getattr(args, name))
    if args.guidance_interval is not None and args.guidance_interval[0] > args.guidance_interval[1]:
        raise ValueError(
            f"`guidance-interval` is {args.guidance_interval}, but should have the lower noise level first."
        )


def make_images(args: argparse.Namespace, task: str, prepare: Callable = lambda pipe: None, **inputs) -> None:
    """Makes the pictures of one call of the pipeline, and writes them; after `check_sampling`.

    `task` is what the settings in the files call it.
    """
    import torch
    from diffusers.utils import make_image_grid

    pipe = load_pipeline(args)
    prepare(pipe)
    check_picture_size(args, pipe)
    arguments = {**sampling_arguments(args, pipe), **inputs}
    made = pipe(num_images_per_prompt=args.num_images, generator=torch.Generator().manual_seed(args.seed), **arguments)
    images: list[Image.Image] = made.images
    settings = describe_call(task, pipe, made.stage_images, sources_of(args), arguments) | {"seed": args.seed}
    numbers = [{"image": number} for number in range(len(images))]
    if args.grid:
        rows, columns = grid_shape(len(images))
        images, numbers = [make_image_grid(images, rows=rows, cols=columns)], [{"images": len(images)}]
    paths = output_paths(args)
    for image, path, number in zip(images, paths, numbers):
        save_image(image, path, settings | number)
    for path in paths:  # when all are on the disk: who reads the names may end early
        print(path)


def output_paths(args: argparse.Namespace) -> list[Path]:
    """The files of one call of the pipeline."""
    output = args.output or DEFAULT_OUTPUT
    if args.grid or args.num_images == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(args.num_images)]


def grid_shape(count: int) -> tuple[int, int]:
    """Rows and columns of a grid without gaps, rows being the more."""
    columns = next(n for n in range(int(count**0.5), 0, -1) if count % n == 0)
    return count // columns, columns


def read_image(name: str, path: Path) -> Image.Image:
    """An image file, upright, in RGB, as training reads it; ValueError if it cannot be read."""
    try:
        return read_picture(path)
    except BadImage as error:
        raise ValueError(f"`{name}` is '{path}', which cannot be read: {error}") from error


def check_output(args: argparse.Namespace) -> None:
    """Checks that the images can be written, before it takes minutes to make them."""
    output = args.output or DEFAULT_OUTPUT
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"`output` is '{output}', but should end in one of {', '.join(FORMATS)}.")
    for path in output_paths(args):
        check_writable(path, "output")
        for name in ("image", "mask"):
            given = getattr(args, name, None)
            if given is not None and path.exists() and given.exists() and path.samefile(given):
                raise ValueError(f"`output` is '{path}', which is the `{name}`: name another file.")


def check_picture_size(args: argparse.Namespace, pipe: "DiffusionPipeline") -> None:
    """Checks that the format of the output takes images of this size."""
    output = args.output or DEFAULT_OUTPUT
    format = FORMATS[output.suffix.lower()]
    resolution = args.resolution or pipe.stages[-1].resolution
    shape = grid_shape(args.num_images) if args.grid else (1, 1)
    height, width = (count * (own or resolution) for count, own in zip(shape, (args.height, args.width)))
    if max(height, width) > MAX_SIZES.get(format, math.inf):
        raise ValueError(
            f"`output` is '{output}', but {format} takes at most {MAX_SIZES[format]} pixels of height and width, not "
            f"{height}x{width}: take .png."
        )


def check_device(device: str) -> None:
    """Checks that there is such a device, and that tensors can be on it."""
    import torch

    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("tensors on it have no values")
        torch.zeros(1, device=device).add(1).item()
    except Exception as error:  # each of torch's backends has its own
        reason = textwrap.shorten(str(error).strip().partition("\n")[0], 200) or type(error).__name__
        raise ValueError(f"`device` is {device!r}, which cannot be used: {reason}") from error


def slug_of(prompt: str) -> str:
    """A prompt as part of a file's name."""
    slug = re.sub(r"\W+", "-", prompt[: 20 * NAME_LENGTH].lower())[:NAME_LENGTH]
    return slug.encode()[:NAME_BYTES].decode(errors="ignore").strip("-")


def save_image(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes an image file, whole or not at all; a PNG file with the settings that it was made with, if they are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    format = FORMATS[path.suffix.lower()]
    options = {"pnginfo": png_info(settings)} if format == "PNG" and settings else {}
    with whole_file(path) as partial:
        image.save(partial, format=format, **options)


def scalar_or_list(values: list | None):
    """A single value serves all stages; several are one a stage."""
    return values[0] if isinstance(values, list) and len(values) == 1 else values
