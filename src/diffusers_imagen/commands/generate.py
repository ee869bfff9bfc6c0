"""`diffusers-imagen generate`: pictures from a prompt, or from a file of prompts."""

import argparse
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from .common import (
    add_model_arguments,
    add_sampling_arguments,
    check_folder,
    load_pipeline,
    make_images,
    read_image,
    sampling_arguments,
    save_image,
)


DEFAULT_OUTPUT_DIR = Path("outputs")
DEFAULT_STRENGTH = 0.7
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
    add_model_arguments(command)
    add_sampling_arguments(command)
    command.add_argument("--image", type=Path, help="picture to change, with --strength")
    command.add_argument(
        "--strength", type=float, help="how much of --image changes, above 0 and up to 1; default: 0.7"
    )
    command.add_argument(
        "--output-dir",
        type=Path,
        help="folder for the images of --prompts-file, named by line and prompt; what exists is skipped, so that an "
        f"interrupted run goes on; default: {DEFAULT_OUTPUT_DIR}",
    )
    command.add_argument("--batch-size", type=int, help="images at once with --prompts-file; default: 4")
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
    idle = ("output_dir", "batch_size") if args.prompts_file is None else ("output", "grid", "image", "strength")
    for name in idle:
        value = getattr(args, name)
        if value is not None and value is not False:
            source = "a prompt" if args.prompts_file is None else "`prompts-file`"
            raise ValueError(f"`{name.replace('_', '-')}` is {str(value)!r}, but does not go with {source}.")


def generate_one(args: argparse.Namespace) -> None:
    """Makes pictures of one prompt, from noise or from a picture."""
    inputs = {}
    if args.image is not None:
        strength = DEFAULT_STRENGTH if args.strength is None else args.strength
        inputs = {"image": read_image("image", args.image), "strength": strength}
    elif args.strength is not None:
        raise ValueError(f"`strength` is {args.strength}, but there is no `image` to change.")
    make_images(args, prompt=args.prompt, **inputs)


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
                generator=[item.generator for item in batch],
                **sampling_arguments(args),
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
