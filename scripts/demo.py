#!/usr/bin/env python
"""Makes pictures with the cascade that ships with the package: what `make demo` runs.

Writes one PNG an image and `demo.png`, a grid with the images of every stage beside each other, under their prompt.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from diffusers_imagen.commands.common import SHIPPED_MODEL, load_pipeline, save_image
from diffusers_imagen.grid import captioned_grid
from diffusers_imagen.pipelines.pipeline_imagen_cascade import DEFAULT_GUIDANCE, DEFAULT_STEPS


PROMPTS = [
    "a 3d render of a tiger face",
    "a noto emoji of a red apple",
    "a flat illustration of a house",
    "a 3d render of a grinning face",
    "a hamburger",
    "a red automobile",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", action="append", help="your own prompt; may be given several times")
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help="folder or Hub id; default: the shipped cascade")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"))
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=DEFAULT_STEPS, help="one value a stage")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=DEFAULT_GUIDANCE, help="one value a stage")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    prompts = args.prompt or PROMPTS
    pipe = load_pipeline(args.model)
    out = pipe(
        prompts,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    )
    for resolution, images in out.stage_images.items():
        for prompt, image in zip(prompts, images):
            slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]
            save_image(image, args.output_dir / f"{slug}-{resolution}.png")
    rows = [list(images) for images in zip(*out.stage_images.values())]
    grid = args.output_dir / "demo.png"
    save_image(captioned_grid(rows, prompts, side=max(out.stage_images)), grid)
    print(grid)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
