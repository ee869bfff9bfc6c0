"""`diffusers-imagen upscale`: upscale an image."""

import argparse
from pathlib import Path

from ..utils.bounds import MIN_AUGMENTATION_SIGMA
from .common import MAX_SIZE, add_sampling_arguments, check_sampling, make_images, read_image
from .model_arguments import add_model_arguments
from .parser import Parser


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Run the super-resolution stages on an image, which is first resized to the base resolution with "
        "the aspect ratio of --height and --width. --sr256 or --sr1024 without --model run a single "
        "super-resolution stage."
    )
    command.add_argument("image", type=Path, help="image file")
    command.add_argument("--prompt", default="", help="description of the image; default: the empty text")
    add_model_arguments(command)
    add_sampling_arguments(command)
    command.add_number(
        "--noise-level",
        float,
        MIN_AUGMENTATION_SIGMA,
        80,
        "low_res_noise_level",
        help="sigma of the noise added to the low-resolution image; default: that of the stage",
    )
    command.add_number(
        "--tile-size", int, 1, MAX_SIZE, help="run on tiles of this size, for images larger than in training"
    )
    command.add_number(
        "--tile-overlap", int, 0, MAX_SIZE, help="pixels that adjacent tiles share; default: a quarter of a tile"
    )
    command.set_defaults(run=upscale)


def upscale(args: argparse.Namespace) -> None:
    """Upscale an image and write it."""
    check_sampling(args, upscaler_alone=True)
    if args.tile_overlap is not None and args.tile_size is None:
        raise ValueError(f"`tile-overlap` is {args.tile_overlap}, but there is no `tile-size`.")
    if args.tile_overlap is not None and args.tile_overlap >= args.tile_size:
        raise ValueError(f"`tile-overlap` is {args.tile_overlap}, but should be below `tile-size`, {args.tile_size}.")

    def prepare(pipe) -> None:
        if args.tile_size is not None:
            pipe.enable_tiling(args.tile_size, args.tile_size // 4 if args.tile_overlap is None else args.tile_overlap)

    image = read_image("image", args.image)
    make_images(args, "upscale", prepare, prompt=args.prompt, image=image, low_res_noise_level=args.noise_level)
