"""`diffusers-imagen generate`: pictures from a prompt, or from a file of prompts."""

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from ..pipelines.stage_table import DEFAULT_STRENGTH
from ..utils.bounds import MAX_STEPS
from ..utils.files import LOCK, check_writable, list_names
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
from .sharing import processes, shared_folder


if TYPE_CHECKING:
    from accelerate import PartialState


DEFAULT_OUTPUT_DIR = Path("outputs")
MAX_FILE_BYTES = 32 * 2**20
MAX_FILE_IMAGES = 100_000


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Makes pictures. Several processes share those of --prompts-file: accelerate launch -m diffusers_imagen generate "
        "--prompts-file ..."
    )
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


class Failure(NamedTuple):
    """Why an image could not be made."""

    line: int
    text: str


def generate_many(args: argparse.Namespace) -> None:
    """Makes the pictures of a file of prompts that do not exist yet, with all processes that were started for it.

    A prompt that cannot be drawn does not keep the others from it; they are all named at the end.
    """
    folder = args.output_dir or DEFAULT_OUTPUT_DIR
    check_device(args.device)
    check_prompt("negative_prompt", args.negative_prompt)
    items = list_items(args.prompts_file, folder, args.seed, args.num_images)
    check_writable(max((item.path for item in items), key=lambda path: len(path.name.encode())), "output-dir")
    check_model(args)
    with processes(args) as state:
        complete(args, folder, items, state)


def complete(args: argparse.Namespace, folder: Path, items: list[Item], state: "PartialState") -> None:
    """Makes the images that do not exist yet, and says so when all of them do; all processes call this."""
    from ..utils.processes import on_main_process

    def find() -> list[int]:
        return find_missing(folder, items)

    is_new = not folder.exists()
    if not on_main_process(state, find):
        if state.is_main_process:
            print(f"{folder}: all {len(items)} images exist")
        return
    try:
        with shared_folder(state, folder, "output-dir"):
            missing = on_main_process(state, find)  # another run may have made some meanwhile
            try:
                failed = draw_items(args, items, {items[number] for number in missing}, state)
            finally:
                if state.is_main_process:
                    (folder / LOCK).unlink(missing_ok=True)  # nothing but pictures is to stay
    finally:
        if state.is_main_process and is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if failed:
        lines = "; ".join(failure.text for failure in failed[:10])
        raise ValueError(f"{folder}: {len(failed)} of {len(items)} images could not be made: {lines}")
    if state.is_main_process:
        print(f"{folder}: {len(items)} images, {len(missing)} of them new")


def find_missing(folder: Path, items: list[Item]) -> list[int]:
    """The numbers of the images that do not exist yet; ValueError if something else is in the place of one."""
    exist = list_names(folder)
    for item in items:
        if item.path.name in exist and not item.path.is_file():
            raise ValueError(f"`output-dir` has '{item.path}', which is no file, in the place of an image.")
    return [number for number, item in enumerate(items) if item.path.name not in exist]


def draw_items(
    args: argparse.Namespace, items: list[Item], missing: set[Item], state: "PartialState"
) -> list[Failure]:
    """Makes missing images in batches and writes them; returns what went wrong, the same in all processes.

    Batches are made of consecutive images, whether they exist or not, so that an image depends neither on the number of
    processes nor on interruptions.
    """
    from ..utils.processes import gather, in_turn

    size = 4 if args.batch_size is None else args.batch_size
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    todo = [batch for batch in batches if not missing.isdisjoint(batch)]
    own = todo[state.process_index :: state.num_processes]
    pipe = in_turn(state, lambda: load_pipeline(args))
    pipe.set_progress_bar_config(disable=True)
    arguments = sampling_arguments(args, pipe)

    def draw(some: list[list[Item]]) -> list[Failure]:
        failed = []
        for batch in some:
            failed += draw_batch(args, pipe, batch, missing, arguments)
            done = state.num_processes * len(missing.intersection(batch))
            progress.update(min(done, progress.total - progress.n))
        return failed

    with tqdm(
        total=len(items), initial=len(items) - len(missing), unit="image", disable=not state.is_main_process
    ) as progress:
        failed = draw(own[:1])
        tried = sum(len(missing.intersection(batch)) for batch in own[:1])
        refuse_all_failing(gather(state, (tried, failed)))
        failed += draw(own[1:])
    return sorted(failure for found in gather(state, failed) for failure in found)


def refuse_all_failing(outcomes: list[tuple[int, list[Failure]]]) -> None:
    """Raise ValueError if none of the first images could be made: it is not the prompts' fault.

    Args:
        outcomes (`list[tuple[int, list[Failure]]]`): How many images each process tried, and what went wrong.
    """
    failed = [failure for _, found in outcomes for failure in found]
    if failed and len(failed) == sum(tried for tried, _ in outcomes):
        raise ValueError(min(failed).text)


def draw_batch(
    args: argparse.Namespace, pipe: Any, batch: list[Item], missing: set[Item], arguments: dict[str, Any]
) -> list[Failure]:
    """Makes images together, or one by one where that fails, and writes those that are missing; returns what went
    wrong."""
    import torch

    generators = [torch.Generator().manual_seed(item.seed) for item in batch]
    try:
        for item in batch:
            check_prompt("prompt", item.prompt)
        made = pipe([item.prompt for item in batch], generator=generators, **arguments)
    except (ValueError, FloatingPointError) as error:
        if len(batch) == 1:
            return [Failure(batch[0].line, f"line {batch[0].line}: {error}")]
        alone = [item for item in batch if item in missing]
        return [failure for item in alone for failure in draw_batch(args, pipe, [item], missing, arguments)]
    settings = describe_call("generate", pipe, made.stage_images, sources_of(args), arguments)
    for item, image in zip(batch, made.images):
        if item in missing:
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
