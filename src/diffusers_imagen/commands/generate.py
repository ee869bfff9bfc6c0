"""`diffusers-imagen generate`: pictures from a prompt, or from a file of prompts."""

import argparse
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils import make_image_grid
from tqdm import tqdm

from ..pipelines.pipeline_imagen_cascade import DEFAULT_GUIDANCE, DEFAULT_STEPS
from .common import (
    add_model_arguments,
    check_folder,
    check_output,
    load_pipeline,
    save_image,
    scalar_or_list,
)


DEFAULT_OUTPUT, DEFAULT_OUTPUT_DIR = Path("output.png"), Path("outputs")
# how much of a prompt goes into the name of its file
NAME_LENGTH = 60


def add_parser(commands) -> None:
    """Adds the command."""
    command = commands.add_parser("generate", help="make pictures from prompts", description="Makes pictures.")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="?", help="what to draw")
    source.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="a text file, one prompt a line; see --output-dir"
    )
    command.add_argument("--negative-prompt", help="what to guide away from")
    add_model_arguments(command)
    command.add_argument("--output", type=Path, help=f"image file; default: {DEFAULT_OUTPUT}")
    command.add_argument(
        "--output-dir",
        type=Path,
        help="folder for the images of --prompts-file, named by line and prompt; what exists is skipped, so that an "
        f"interrupted run goes on; default: {DEFAULT_OUTPUT_DIR}",
    )
    command.add_argument("--resolution", type=int, help="stop after the stage of this resolution: 64, 256 or 1024")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    per_stage = "for all stages, or one value a stage; default: %(default)s"
    command.add_argument("--steps", type=int, nargs="+", default=DEFAULT_STEPS, help=per_stage)
    command.add_argument("--guidance-scale", type=float, nargs="+", default=DEFAULT_GUIDANCE, help=per_stage)
    command.add_argument("--num-images", type=int, default=1, help="of each prompt, numbered: output-0.png, ...")
    command.add_argument("--batch-size", type=int, help="images at once with --prompts-file; default: 4")
    command.add_argument("--grid", action="store_true", help="write all images into one file, side by side")
    command.set_defaults(run=generate)


def generate(args: argparse.Namespace) -> None:
    """Makes pictures and writes them."""
    check_arguments(args)
    if args.prompts_file is None:
        generate_one(args)
    else:
        generate_many(args)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses options that the other kind of source would ignore."""
    idle = ("output_dir", "batch_size") if args.prompts_file is None else ("output", "grid")
    for name in idle:
        value = getattr(args, name)
        if value is not None and value is not False:
            source = "a prompt" if args.prompts_file is None else "`prompts-file`"
            raise ValueError(f"`{name.replace('_', '-')}` is {str(value)!r}, but does not go with {source}.")


def generate_one(args: argparse.Namespace) -> None:
    """Makes pictures of one prompt."""
    output = args.output or DEFAULT_OUTPUT
    check_output(output)
    pipe = load_pipeline(args.model, getattr(torch, args.dtype)).to(args.device)
    images = pipe(
        args.prompt,
        args.negative_prompt,
        num_images_per_prompt=args.num_images,
        generator=torch.Generator().manual_seed(args.seed),
        **stage_arguments(args),
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


class Item(NamedTuple):
    """One image to make."""

    prompt: str
    path: Path
    generator: torch.Generator


def generate_many(args: argparse.Namespace) -> None:
    """Makes the pictures of a file of prompts that do not exist yet."""
    folder = args.output_dir or DEFAULT_OUTPUT_DIR
    check_folder("output-dir", folder)
    batch_size = 4 if args.batch_size is None else args.batch_size
    for name, value in (("batch-size", batch_size), ("num-images", args.num_images)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}, but should be at least 1.")
    items = list_items(args.prompts_file, folder, args.seed, args.num_images)
    todo = [item for item in items if not item.path.exists()]
    if not todo:
        print(f"{folder}: all {len(items)} images exist")
        return

    pipe = load_pipeline(args.model, getattr(torch, args.dtype)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(items), initial=len(items) - len(todo), unit="image") as progress:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            images = pipe(
                [item.prompt for item in batch],
                args.negative_prompt,
                generator=[item.generator for item in batch],
                **stage_arguments(args),
            ).images
            for item, image in zip(batch, images):
                save_image(image, item.path)
            progress.update(len(batch))
    print(f"{folder}: {len(items)} images, {len(todo)} of them new")


def list_items(prompts_file: Path, folder: Path, seed: int, num_images: int) -> list[Item]:
    """The images of a file of prompts, with their names: `00012-a-red-apple.png` is of line 12.

    The noise of an image depends on the seed, the line and the image's number, not on what else is made.

    Raises:
        ValueError: If there is no prompt to read.
    """
    try:
        lines = prompts_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`prompts-file` is '{prompts_file}', which cannot be read: {error}") from error
    items = []
    for line, prompt in enumerate(map(str.strip, lines), start=1):
        for number in range(num_images) if prompt else ():
            slug = re.sub(r"\W+", "-", prompt.lower())[:NAME_LENGTH].strip("-")
            suffix = f"-{number}" if num_images > 1 else ""
            digest = hashlib.sha256(f"{seed} {line} {number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            items.append(Item(prompt, folder / f"{line:05d}-{slug}{suffix}.png", generator))
    if not items:
        raise ValueError(f"`prompts-file` is '{prompts_file}', which has no prompt in it.")
    return items


def stage_arguments(args: argparse.Namespace) -> dict:
    """What a call is told about its stages."""
    return {
        "output_resolution": args.resolution,
        "num_inference_steps": scalar_or_list(args.steps),
        "guidance_scale": scalar_or_list(args.guidance_scale),
    }
