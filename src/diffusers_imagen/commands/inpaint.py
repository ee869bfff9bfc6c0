"""`diffusers-imagen inpaint`: repaint a part of an image."""

import argparse
from pathlib import Path

from ..utils.bounds import MAX_STEPS
from .common import add_sampling_arguments, check_sampling, make_images, read_image
from .model_arguments import add_model_arguments
from .parser import PROMPT, Parser, check_prompt_or_none


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = "Repaint a part of an image."
    command.add_argument("image", type=Path, help="image file")
    command.add_argument("mask", type=Path, help="mask file of the same size, white where the image is repainted")
    command.add_argument("prompt", nargs="?", help=PROMPT)
    add_model_arguments(command)
    add_sampling_arguments(command)
    command.add_number(
        "--strength", float, 1 / MAX_STEPS, 1, help="how much the masked part is changed; default: 1, completely"
    )
    command.add_number(
        "--resample-times",
        int,
        1,
        100,
        "num_resample_times",
        default=4,
        help="number of times that each step runs, to harmonize new and known pixels; default: %(default)s",
    )
    command.set_defaults(run=inpaint)


def inpaint(args: argparse.Namespace) -> None:
    """Repaint a part of an image and write the result."""
    check_sampling(args)
    check_prompt_or_none(args.prompt, args.model)
    make_images(
        args,
        "inpaint",
        prompt=args.prompt,
        image=read_image("image", args.image),
        mask_image=read_image("mask", args.mask),
        strength=args.strength,
        num_resample_times=args.resample_times,
    )
