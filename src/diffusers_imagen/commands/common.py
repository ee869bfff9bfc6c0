"""Shared code of commands: options of a pipeline call, and complete image files."""

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


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEFAULT_OUTPUT = Path("output.png")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_SIZES = {"JPEG": 65500, "WEBP": 16383}  # height and width in pixels
# limits of the prompt in a file name, in characters and in bytes: file systems allow 255 bytes in total
NAME_LENGTH, NAME_BYTES = 60, 180
# bounds: larger values are mistakes, and would run until the process is killed
MAX_SIZE = 8192  # height and width in pixels
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 1000
MAX_IMAGES = 1000


def add_sampling_arguments(command: Parser) -> None:
    """Add options for the pipeline call and its output."""
    command.add_argument("--negative-prompt", help="text to guide away from")
    command.add_argument("--output", type=Path, help=f"image file to write; default: {DEFAULT_OUTPUT}")
    command.add_number(
        "--resolution",
        int,
        1,
        MAX_SIZE,
        "output_resolution",
        help="resolution of the last stage to run: " + ", ".join(str(kind.resolution) for kind in STAGES),
    )
    command.add_number("--height", int, 1, MAX_SIZE, help="height of the image in pixels; default: the resolution")
    command.add_number("--width", int, 1, MAX_SIZE, help="width of the image in pixels; default: the resolution")
    command.add_number("--seed", int, 0, MAX_SEED, default=0, help="seed of all noise; default: %(default)s")
    per_stage = "one value for all stages, or one per stage; default: that of each stage"
    command.add_number(
        "--steps", int, 1, MAX_STEPS, "num_inference_steps", nargs="+", help=f"number of steps: {per_stage}"
    )
    command.add_number(
        "--guidance-scale", float, 0, MAX_GUIDANCE, nargs="+", help=f"weight of classifier-free guidance: {per_stage}"
    )
    command.add_number(
        "--guidance-interval",
        float,
        0,
        math.inf,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="lowest and highest noise level (sigma) at which guidance is applied; default: all",
    )
    command.add_number(
        "--guidance-rescale",
        float,
        0,
        1,
        default=0.0,
        help="how far guided predictions are rescaled to the contrast of unguided ones; default: %(default)s",
    )
    command.add_number(
        "--num-images",
        int,
        1,
        MAX_IMAGES,
        "num_images_per_prompt",
        default=1,
        help="number of images per prompt, numbered output-0.png, ...; default: %(default)s",
    )
    command.add_argument("--grid", action="store_true", help="write all images to one file, as a grid")


def sampling_arguments(args: argparse.Namespace, pipe: "DiffusionPipeline") -> dict:
    """Return the pipeline's arguments from these options, except for the number of images and the generator."""
    return {
        "negative_prompt": args.negative_prompt,
        **size_arguments(args, pipe),
        "num_inference_steps": scalar_or_list(args.steps),
        "guidance_scale": scalar_or_list(args.guidance_scale),
        "guidance_interval": None if args.guidance_interval is None else tuple(args.guidance_interval),
        "guidance_rescale": args.guidance_rescale,
    }


def size_arguments(args: argparse.Namespace, pipe: "DiffusionPipeline") -> dict[str, int | None]:
    """
    Return the size of the result: for a cascade, the last stage to run; for a single upscaler, its resolution by
    default.

    Raises:
        ValueError: If a single stage does not have the requested resolution.
    """
    sizes = {"height": args.height, "width": args.width}
    if not isinstance(pipe, pipelines.ImagenSuperResolutionPipeline):
        return {"output_resolution": args.resolution, **sizes}
    resolution = pipe.stages[0].resolution
    if args.resolution not in (None, resolution):
        raise ValueError(
            f"`output_resolution` is {args.resolution}, but should be {resolution}, that of the only stage."
        )
    return {name: pixels or resolution for name, pixels in sizes.items()}


def check_sampling(args: argparse.Namespace, upscaler_alone: bool = False) -> None:
    """Raise ValueError for an invalid output, device, model or text, before images are read and a model is loaded."""
    from ..utils.processes import refuse_several

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
    """Generate the images of one pipeline call, and write them; `check_sampling` must be called before.

    `task` is the name of the task in the saved settings.
    """
    import torch
    from diffusers.utils import make_image_grid

    pipe = load_pipeline(args)
    prepare(pipe)
    check_picture_size(args, pipe)
    arguments = {**sampling_arguments(args, pipe), **inputs}
    check_need_of_prompt(arguments["prompt"], pipe, args.resolution)
    if not arguments["prompt"] and pipe.text_source is None:
        arguments["prompt"] = None  # a model without text does not accept the empty one
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
    for path in paths:  # after all are written: the reader of the names may close the pipe early
        print(path)


def check_need_of_prompt(prompt: str | None, pipe: "DiffusionPipeline", resolution: int | None) -> None:
    """Raise ValueError if a prompt is given and no stage is conditioned on text, or none is given and a stage up to
    this resolution is; the empty prompt of `upscale` is allowed for both."""
    if prompt and not any(stage.reads_text for stage in pipe.stages):
        raise ValueError("`prompt` is given, but no stage of this model is conditioned on text: leave it out.")
    readers = [stage for stage in pipe.stages if stage.reads_text and stage.resolution <= (resolution or math.inf)]
    if prompt is None and readers:
        raise ValueError(
            f"`prompt` is missing, but the stage `{readers[0].name}` of this model is conditioned on text."
        )


def output_paths(args: argparse.Namespace) -> list[Path]:
    """Return the output files of one pipeline call."""
    output = args.output or DEFAULT_OUTPUT
    if args.grid or args.num_images == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(args.num_images)]


def grid_shape(count: int) -> tuple[int, int]:
    """Return the rows and columns of a grid without empty cells, with at least as many rows as columns."""
    columns = next(n for n in range(int(count**0.5), 0, -1) if count % n == 0)
    return count // columns, columns


def read_image(name: str, path: Path) -> Image.Image:
    """Read an image file as in training, upright and in RGB; raise ValueError if it cannot be read."""
    try:
        return read_picture(path)
    except BadImage as error:
        raise ValueError(f"`{name}` is '{path}', which cannot be read: {error}") from error


def check_output(args: argparse.Namespace) -> None:
    """Raise ValueError if the images cannot be written, before they are generated."""
    output = args.output or DEFAULT_OUTPUT
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"`output` is '{output}', but should end in one of {', '.join(FORMATS)}.")
    for path in output_paths(args):
        check_writable(path, "output")
        for name in ("image", "mask"):
            given = getattr(args, name, None)
            if given is not None and path.exists() and given.exists() and path.samefile(given):
                raise ValueError(f"`output` is '{path}', which is the `{name}`: choose another file.")


def check_picture_size(args: argparse.Namespace, pipe: "DiffusionPipeline") -> None:
    """Raise ValueError if the output format does not support images of this size."""
    output = args.output or DEFAULT_OUTPUT
    format = FORMATS[output.suffix.lower()]
    resolution = args.resolution or pipe.stages[-1].resolution
    shape = grid_shape(args.num_images) if args.grid else (1, 1)
    height, width = (count * (own or resolution) for count, own in zip(shape, (args.height, args.width)))
    if max(height, width) > MAX_SIZES.get(format, math.inf):
        raise ValueError(
            f"`output` is '{output}', but {format} supports at most {MAX_SIZES[format]} pixels of height and width, "
            f"not {height}x{width}: use .png."
        )


def check_device(device: str) -> None:
    """Raise ValueError if the device does not exist, or tensors cannot be created on it."""
    import torch

    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("tensors on it have no values")
        torch.zeros(1, device=device).add(1).item()
    except Exception as error:  # torch's backends raise different types
        reason = textwrap.shorten(str(error).strip().partition("\n")[0], 200) or type(error).__name__
        raise ValueError(f"`device` is {device!r}, which cannot be used: {reason}") from error


def slug_of(prompt: str) -> str:
    """Convert a prompt to a part of a file name."""
    slug = re.sub(r"\W+", "-", prompt[: 20 * NAME_LENGTH].lower())[:NAME_LENGTH]
    return slug.encode()[:NAME_BYTES].decode(errors="ignore").strip("-")


def save_image(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a complete image file, or none; PNG files include the settings, if given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    format = FORMATS[path.suffix.lower()]
    options = {"pnginfo": png_info(settings)} if format == "PNG" and settings else {}
    with whole_file(path) as partial:
        image.save(partial, format=format, **options)


def scalar_or_list(values: list | None):
    """Return a single value for all stages, or a list with one per stage."""
    return values[0] if isinstance(values, list) and len(values) == 1 else values
