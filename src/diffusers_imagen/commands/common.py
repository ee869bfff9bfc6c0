"""What several commands need: the model, and image files that are whole or absent."""

import argparse
import os
from pathlib import Path
from typing import Callable, Union

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps

from ..pipelines import ImagenCascadePipeline
from ..pipelines.folders import check_source, load_pipeline_folder, loading
from ..pipelines.stages import DEFAULT_GUIDANCE, DEFAULT_STEPS, check_stages, refuse_untrained


# an editable install finds the cascade that the repository ships
SHIPPED_MODEL = Path(__file__).resolve().parents[3] / "checkpoints" / "imagen-emoji"
DEFAULT_OUTPUT = Path("output.png")


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """Which model, where and in which precision."""
    command.add_argument("--model", default=str(SHIPPED_MODEL), help="folder or Hub id; default: the shipped cascade")
    command.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def add_sampling_arguments(command: argparse.ArgumentParser) -> None:
    """How images are made, and where they go."""
    command.add_argument("--negative-prompt", help="what to guide away from")
    command.add_argument("--output", type=Path, help=f"image file; default: {DEFAULT_OUTPUT}")
    command.add_argument("--resolution", type=int, help="stop after the stage of this resolution: 64, 256 or 1024")
    command.add_argument("--height", type=int, help="of the image in pixels; default: the resolution")
    command.add_argument("--width", type=int, help="of the image in pixels; default: the resolution")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    per_stage = "for all stages, or one value a stage; default: %(default)s"
    command.add_argument("--steps", type=int, nargs="+", default=DEFAULT_STEPS, help=per_stage)
    command.add_argument("--guidance-scale", type=float, nargs="+", default=DEFAULT_GUIDANCE, help=per_stage)
    command.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="lowest and highest noise level (sigma) with guidance; default: all",
    )
    command.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        help="share brought back to plain contrast; default: %(default)s",
    )
    command.add_argument("--num-images", type=int, default=1, help="of each prompt, numbered: output-0.png, ...")
    command.add_argument("--grid", action="store_true", help="write all images into one file, side by side")


def sampling_arguments(args: argparse.Namespace) -> dict:
    """What a pipeline is told of them, but for the number of images and the source of noise."""
    return {
        "negative_prompt": args.negative_prompt,
        "output_resolution": args.resolution,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": scalar_or_list(args.steps),
        "guidance_scale": scalar_or_list(args.guidance_scale),
        "guidance_interval": None if args.guidance_interval is None else tuple(args.guidance_interval),
        "guidance_rescale": args.guidance_rescale,
    }


def make_images(args: argparse.Namespace, prepare: Callable = lambda pipe: None, **inputs) -> None:
    """Makes the pictures of one call of the pipeline, and writes them."""
    output = args.output or DEFAULT_OUTPUT
    check_output(output)
    pipe = load_pipeline(args.model, getattr(torch, args.dtype)).to(args.device)
    prepare(pipe)
    images = pipe(
        num_images_per_prompt=args.num_images,
        generator=torch.Generator().manual_seed(args.seed),
        **sampling_arguments(args),
        **inputs,
    ).images
    if args.grid:
        columns = int(len(images) ** 0.5)
        while len(images) % columns:
            columns -= 1
        images = [make_image_grid(images, rows=columns, cols=len(images) // columns)]
    for i, image in enumerate(images):
        path = output if len(images) == 1 else output.with_stem(f"{output.stem}-{i}")
        save_image(image, path)
        print(path)


def read_image(name: str, path: Path) -> Image.Image:
    """An image file, upright.

    Raises:
        ValueError: If there is none that can be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except OSError as error:
        raise ValueError(f"`{name}` is '{path}', which cannot be read: {error}") from error


def load_pipeline(model: str, dtype: torch.dtype = torch.float32) -> ImagenCascadePipeline:
    """Loads a cascade from a folder or from the Hub.

    Raises:
        ValueError: If there is none, or one that was never trained.
    """
    check_source("model", model)
    with loading("model", model):
        pipe = load_pipeline_folder(ImagenCascadePipeline, model, ("ImagenCascadePipeline",), dtype=dtype)
        check_stages(pipe.stages, pipe.text_encoder)
    refuse_untrained(pipe.stages)
    return pipe


def check_output(path: Path) -> None:
    """Checks that an image can be written there, before it takes minutes to make one."""
    extensions = (".png", ".jpg", ".jpeg", ".webp")
    if path.suffix.lower() not in extensions:
        raise ValueError(f"`output` is '{path}', but should end in one of {', '.join(extensions)}.")
    check_folder("output", path.parent)


def check_folder(name: str, folder: Path) -> None:
    """Checks that there is no file in the place of a folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{name}` needs the folder '{folder}', but that is a file.")


def save_image(image, path: Path) -> None:
    """Writes an image beside its place and then moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format={".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG"))
    os.replace(partial, path)


def scalar_or_list(values: Union[list, dict]):
    """A single value serves all stages; several are one a stage."""
    return values[0] if isinstance(values, list) and len(values) == 1 else values
