#!/usr/bin/env python
"""Generate images with the shipped cascade; run by `make demo`.

Writes one PNG per image and `demo.png`, a grid with the images of every stage side by side, under their prompt.
"""

import argparse
import sys
from pathlib import Path

import torch

from diffusers_imagen.commands.common import (
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    save_image,
    slug_of,
)
from diffusers_imagen.commands.model_arguments import load_cascade
from diffusers_imagen.commands.parser import Parser, check_numbers, check_prompt, check_prompt_or_none
from diffusers_imagen.utils.errors import run_to_exit_code
from diffusers_imagen.utils.files import check_writable
from diffusers_imagen.utils.grid import captioned_grid
from diffusers_imagen.utils.shipped import NAME, find_source


PROMPTS = [
    "a 3d render of a tiger face",
    "a noto emoji of a red apple",
    "a flat illustration of a house",
    "a 3d render of a grinning face",
    "a hamburger",
    "a car",
]


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", action="append", help="your own prompt; may be given several times")
    parser.add_argument("--model", default=NAME, help="folder or Hub id; default: the shipped cascade")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"))
    per_stage = {"nargs": "+", "help": "one value per stage; default: those of the stage"}
    parser.add_number("--num_inference_steps", int, 1, MAX_STEPS, **per_stage)
    parser.add_number("--guidance_scale", float, 0, MAX_GUIDANCE, **per_stage)
    parser.add_number("--seed", int, 0, MAX_SEED, default=0)
    args = parser.parse_args()
    check_numbers(args)
    for prompt in args.prompt or ():
        check_prompt("prompt", prompt)
        check_prompt_or_none(prompt, args.model)
    check_writable(args.output_dir / "demo.png", "output_dir")
    return args


def main() -> None:
    args = parse_args()
    prompts = args.prompt or PROMPTS
    pipe = load_cascade(str(find_source(args.model)))
    out = pipe(
        prompts,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    )
    for resolution, images in out.stage_images.items():
        for prompt, image in zip(prompts, images):
            save_image(image, args.output_dir / f"{slug_of(prompt)}-{resolution}.png")
    rows = [list(images) for images in zip(*out.stage_images.values())]
    grid = args.output_dir / "demo.png"
    save_image(captioned_grid(rows, prompts, resolution=max(out.stage_images)), grid)
    print(grid)


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "demo.py"))
