"""`diffusers-imagen generate`: pictures from a prompt, or from a file of prompts."""

import argparse
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..pipelines.stage_table import DEFAULT_STRENGTH
from ..utils.bounds import MAX_STEPS
from ..utils.files import LOCK, FolderHold, check_writable
from .common import (
    add_sampling_arguments,
    check_device,
    check_sampling,
    make_images,
    read_image,
    sampling_arguments,
    save_image,
    slug_of,
)
from .model_arguments import add_model_arguments, check_model, load_pipeline, sources_of
from .parser import Parser, check_prompt, refuse_empty
from .picture_settings import describe_call


DEFAULT_OUTPUT_DIR = Path("outputs")
MAX_FILE_BYTES = 32 * 2**20
MAX_FILE_IMAGES = 100_000


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = "Makes pictures."
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="?", help="what to draw")
    source.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="a text file, one prompt a line; see --output-dir"
    )
    add_model_arguments(command)
    add_sampling_arguments(command)
    command.add_argument("--image", type=Path, help="picture to change, with --strength")
    command.add_number(
        "--strength",
        float,
        1 / MAX_STEPS,
        1,
        help=f"how much of --image changes, above 0 and up to 1; default: {DEFAULT_STRENGTH}",
    )
    command.add_argument(
        "--output-dir",
        type=Path,
        help="folder for the images of --prompts-file, named by line and prompt; what exists is skipped, so that an "
        f"interrupted run goes on; default: {DEFAULT_OUTPUT_DIR}",
    )
    command.add_number("--batch-size", int, 1, 1024, help="images at once with --prompts-file; default: 4")
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
    check_sampling(args)
    refuse_empty(args.prompt)
    inputs: dict[str, Any] = {}
    if args.image is not None:
        strength = DEFAULT_STRENGTH if args.strength is None else args.strength
        inputs = {"image": read_image("image", args.image), "strength": strength}
    elif args.strength is not None:
        raise ValueError(f"`strength` is {args.strength}, but there is no `image` to change.")
    make_images(args, "image-to-image" if inputs else "generate", prompt=args.prompt, **inputs)


class Item(NamedTuple):
    """One image to make."""

    line: int
    prompt: str
    path: Path
    seed: int


def generate_many(args: argparse.Namespace) -> None:
    """Makes the pictures of a file of prompts that do not exist yet.

    A prompt that cannot be drawn does not keep the others from it; they are all named at the end.
    """
    folder = args.output_dir or DEFAULT_OUTPUT_DIR
    check_device(args.device)
    check_prompt("negative_prompt", args.negative_prompt)
    items = list_items(args.prompts_file, folder, args.seed, args.num_images)
    check_writable(max((item.path for item in items), key=lambda path: len(path.name.encode())), "output-dir")
    check_model(args)
    if not to_do(items):
        print(f"{folder}: all {len(items)} images exist")
        return

    is_new = not folder.exists()
    try:
        with FolderHold(folder, "output-dir"):
            todo = to_do(items)  # another process may have made some meanwhile
            try:
                failed = draw_items(args, items, todo)
            finally:
                (folder / LOCK).unlink(missing_ok=True)  # nothing but pictures is to stay
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if failed:
        raise ValueError(f"{folder}: {len(failed)} of {len(items)} images could not be made: {'; '.join(failed[:10])}")
    print(f"{folder}: {len(items)} images, {len(todo)} of them new")


def to_do(items: list[Item]) -> list[Item]:
    """The images that do not exist yet; ValueError if something else is in the place of one."""
    todo = [item for item in items if not item.path.exists()]
    missing = {item.path for item in todo}
    for item in items:
        if item.path not in missing and not item.path.is_file():
            raise ValueError(f"`output-dir` has '{item.path}', which is no file, in the place of an image.")
    return todo


def draw_items(args: argparse.Namespace, items: list[Item], todo: list[Item]) -> list[str]:
    """Makes images in batches and writes them; returns what went wrong, by line of the file."""
    batch_size = 4 if args.batch_size is None else args.batch_size
    pipe = load_pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    arguments, failed = sampling_arguments(args, pipe), []
    with tqdm(total=len(items), initial=len(items) - len(todo), unit="image") as progress:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            failed += draw_batch(args, pipe, batch, arguments)
            if len(failed) == start + len(batch):  # none so far: it is not the prompts' fault
                raise ValueError(failed[0])
            progress.update(len(batch))
    return failed


def draw_batch(args: argparse.Namespace, pipe: Any, batch: list[Item], arguments: dict[str, Any]) -> list[str]:
    """Makes images together, or one by one where that fails; returns what went wrong."""
    import torch

    generators = [torch.Generator().manual_seed(item.seed) for item in batch]
    try:
        for item in batch:
            check_prompt("prompt", item.prompt)
        made = pipe([item.prompt for item in batch], generator=generators, **arguments)
    except (ValueError, FloatingPointError) as error:
        if len(batch) == 1:
            return [f"line {batch[0].line}: {error}"]
        return [failure for item in batch for failure in draw_batch(args, pipe, [item], arguments)]
    settings = describe_call("generate", pipe, made.stage_images, sources_of(args), arguments)
    for item, image in zip(batch, made.images):
        save_image(image, item.path, settings | {"prompt": item.prompt, "seed": item.seed, "image": 0})
    return []


def list_items(prompts_file: Path, folder: Path, seed: int, num_images: int) -> list[Item]:
    """The images of a file of prompts, with their names: `00012-a-red-apple.png` is of line 12.

    The noise of an image depends on the seed, the line and the image's number, not on what else is made.
    """
    items = []
    for line, prompt in enumerate(map(str.strip, read_lines("prompts-file", prompts_file)), start=1):
        for number in range(num_images) if prompt else ():
            digest = hashlib.sha256(f"{seed} {line} {number}".encode()).digest()
            name = name_of(line, prompt, f"-{number}" if num_images > 1 else "")
            items.append(Item(line, prompt, folder / name, int.from_bytes(digest[:8], "big") >> 1))
            if len(items) > MAX_FILE_IMAGES:
                raise ValueError(
                    f"`prompts-file` is '{prompts_file}', which asks for more than {MAX_FILE_IMAGES:,} images: split it."
                )
    if not items:
        raise ValueError(f"`prompts-file` is '{prompts_file}', which has no prompt in it.")
    return items


def read_lines(name: str, path: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file.")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise OSError(f"it has more than {MAX_FILE_BYTES:,} bytes.")
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"`{name}` is '{path}', which cannot be read: {error}") from error


def name_of(line: int, prompt: str, suffix: str) -> str:
    """The name of an image's file."""
    return f"{line:05d}-{slug_of(prompt)}{suffix}.png"
