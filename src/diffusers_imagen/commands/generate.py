"""`diffusers-imagen generate`: generate images from a prompt, or from a file of prompts."""

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from ..pipelines.stage_table import DEFAULT_STRENGTH
from ..utils.bounds import MAX_STEPS
from ..utils.files import check_writable, list_names
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
from .parser import PROMPT, Parser, check_prompt, check_prompt_or_none
from .picture_settings import describe_call


if TYPE_CHECKING:
    from accelerate import PartialState


DEFAULT_OUTPUT_DIR = Path("outputs")
MAX_FILE_BYTES = 32 * 2**20
MAX_FILE_IMAGES = 100_000


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Generate images from prompts. Several processes can share --prompts-file: accelerate launch -m "
        "diffusers_imagen generate --prompts-file ..."
    )
    source = command.add_mutually_exclusive_group()
    source.add_argument("prompt", nargs="?", help=PROMPT)
    source.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="a text file with one prompt per line; see --output-dir"
    )
    add_model_arguments(command)
    add_sampling_arguments(command)
    command.add_argument("--image", type=Path, help="image to change, with --strength")
    command.add_number(
        "--strength",
        float,
        1 / MAX_STEPS,
        1,
        help=f"how much --image is changed, above 0 and up to 1; default: {DEFAULT_STRENGTH}",
    )
    command.add_argument(
        "--output-dir",
        type=Path,
        help="folder for the images of --prompts-file, named by line and prompt; existing images are skipped, so that "
        f"an interrupted run can continue; default: {DEFAULT_OUTPUT_DIR}",
    )
    command.add_number("--batch-size", int, 1, 1024, help="images per batch with --prompts-file; default: 4")
    command.set_defaults(run=generate)


def generate(args: argparse.Namespace) -> None:
    """Generate images and write them."""
    check_arguments(args)
    if args.prompts_file is None:
        generate_one(args)
    else:
        generate_many(args)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for options that apply only to the other kind of source."""
    idle = ("output_dir", "batch_size") if args.prompts_file is None else ("output", "grid", "image", "strength")
    for name in idle:
        value = getattr(args, name)
        if value is not None and value is not False:
            source = "a prompt" if args.prompts_file is None else "`prompts-file`"
            raise ValueError(f"`{name.replace('_', '-')}` is {str(value)!r}, but does not apply to {source}.")


def generate_one(args: argparse.Namespace) -> None:
    """Generate images from one prompt, or without one, starting from noise or from an image."""
    check_sampling(args)
    check_prompt_or_none(args.prompt, args.model)
    inputs: dict[str, Any] = {}
    if args.image is not None:
        strength = DEFAULT_STRENGTH if args.strength is None else args.strength
        inputs = {"image": read_image("image", args.image), "strength": strength}
    elif args.strength is not None:
        raise ValueError(f"`strength` is {args.strength}, but there is no `image` to change.")
    make_images(args, "image-to-image" if inputs else "generate", prompt=args.prompt, **inputs)


class Item(NamedTuple):
    """One image to generate."""

    line: int
    prompt: str
    path: Path
    seed: int


class Failure(NamedTuple):
    """The reason why an image failed."""

    line: int
    text: str


def generate_many(args: argparse.Namespace) -> None:
    """Generate the missing images of a file of prompts, with all processes that were started.

    An invalid prompt does not affect the others; failed images are listed at the end.
    """
    from ..utils.processes import shared_work

    folder = args.output_dir or DEFAULT_OUTPUT_DIR
    check_device(args.device)
    check_prompt("negative_prompt", args.negative_prompt)
    items = list_items(args.prompts_file, folder, args.seed, args.num_images)
    check_writable(max((item.path for item in items), key=lambda path: len(path.name.encode())), "output-dir")
    check_model(args)
    with shared_work(args.device) as (state, args.device):
        complete(args, folder, items, state)


def complete(args: argparse.Namespace, folder: Path, items: list[Item], state: "PartialState") -> None:
    """Generate the missing images, or print that all of them exist; called by all processes."""
    from ..utils.processes import on_main_process, shared_folder

    def find() -> list[int]:
        return find_missing(folder, items)

    if not on_main_process(state, find):
        if state.is_main_process:
            print(f"{folder}: all {len(items)} images exist")
        return
    with shared_folder(state, folder, "output-dir"):
        missing = on_main_process(state, find)  # another run may have written some in the meantime
        failed = draw_items(args, items, {items[number] for number in missing}, state)
    if failed:
        lines = "; ".join(failure.text for failure in failed[:10])
        raise ValueError(f"{folder}: {len(failed)} of {len(items)} images failed: {lines}")
    if state.is_main_process:
        print(f"{folder}: {len(items)} images, {len(missing)} of them new")


def find_missing(folder: Path, items: list[Item]) -> list[int]:
    """Return the numbers of the missing images; raise ValueError if a path exists but is not a file."""
    exist = list_names(folder)
    for item in items:
        if item.path.name in exist and not item.path.is_file():
            raise ValueError(f"`output-dir` has '{item.path}', which is not a file, but should be an image.")
    return [number for number, item in enumerate(items) if item.path.name not in exist]


def draw_items(
    args: argparse.Namespace, items: list[Item], missing: set[Item], state: "PartialState"
) -> list[Failure]:
    """Generate missing images in batches and write them; return failures, the same in all processes.

    Batches consist of consecutive images, whether they exist or not, so that an image depends neither on the number of
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
    """Raise ValueError if all of the first images failed, so that the prompts are not the cause.

    Args:
        outcomes (`list[tuple[int, list[Failure]]]`): Number of images that each process tried, and its failures.
    """
    failed = [failure for _, found in outcomes for failure in found]
    if failed and len(failed) == sum(tried for tried, _ in outcomes):
        raise ValueError(min(failed).text)


def draw_batch(
    args: argparse.Namespace, pipe: Any, batch: list[Item], missing: set[Item], arguments: dict[str, Any]
) -> list[Failure]:
    """Generate images together, or one by one if that fails, and write the missing ones; return failures."""
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
    """Return the images of a file of prompts, with their names: `00012-a-red-apple.png` for line 12.

    The noise of an image depends only on the seed, the line and the image's number.
    """
    items = []
    for line, prompt in enumerate(map(str.strip, read_lines("prompts-file", prompts_file)), start=1):
        for number in range(num_images) if prompt else ():
            digest = hashlib.sha256(f"{seed} {line} {number}".encode()).digest()
            name = name_of(line, prompt, f"-{number}" if num_images > 1 else "")
            items.append(Item(line, prompt, folder / name, int.from_bytes(digest[:8], "big") >> 1))
            if len(items) > MAX_FILE_IMAGES:
                raise ValueError(
                    f"`prompts-file` is '{prompts_file}', which has more than {MAX_FILE_IMAGES:,} images: split it."
                )
    if not items:
        raise ValueError(f"`prompts-file` is '{prompts_file}', which has no prompts.")
    return items


def read_lines(name: str, path: Path) -> list[str]:
    """Read the lines of a text file in UTF-8, with or without a byte order mark."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file.")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise OSError(f"it has more than {MAX_FILE_BYTES:,} bytes.")
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"`{name}` is '{path}', which cannot be read: {error}") from error


def name_of(line: int, prompt: str, suffix: str) -> str:
    """Return the file name of an image."""
    return f"{line:05d}-{slug_of(prompt)}{suffix}.png"
