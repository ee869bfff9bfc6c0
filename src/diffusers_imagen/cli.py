"""The command `diffusers-imagen`."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Optional, Union

import torch
from diffusers.utils import make_image_grid

from . import ImagenCascadePipeline, __version__
from .commands import cache_embeddings, doctor, reconstruct_ema
from .pipelines.pipeline_imagen_cascade import DEFAULT_GUIDANCE, DEFAULT_STEPS


# an editable install finds the cascade that the repository ships
SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "checkpoints" / "imagen-emoji"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def main(argv: Optional[list[str]] = None) -> int:
    """Runs a command; returns its exit code, 0 if it has none, or 2 after one line that says what was wrong with the arguments."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"diffusers-imagen: error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="diffusers-imagen", description="Imagen for diffusers.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("generate", help="make pictures from a prompt", description="Makes pictures.")
    command.add_argument("prompt", help="what to draw")
    command.add_argument("--negative-prompt", help="what to guide away from")
    command.add_argument("--model", default=str(SHIPPED_MODEL), help="folder or Hub id; default: the shipped cascade")
    command.add_argument("--output", type=Path, default=Path("output.png"), help="image file; default: %(default)s")
    command.add_argument("--resolution", type=int, help="stop after the stage of this resolution: 64, 256 or 1024")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    per_stage = "for all stages, or one value a stage; default: %(default)s"
    command.add_argument("--steps", type=int, nargs="+", default=DEFAULT_STEPS, help=per_stage)
    command.add_argument("--guidance-scale", type=float, nargs="+", default=DEFAULT_GUIDANCE, help=per_stage)
    command.add_argument("--num-images", type=int, default=1, help="several are numbered: output-0.png, ...")
    command.add_argument("--grid", action="store_true", help="write all images into one file, side by side")
    command.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    command.set_defaults(run=generate)

    cache_embeddings.add_parser(commands)
    doctor.add_parser(commands)
    reconstruct_ema.add_parser(commands)
    return parser


def generate(args: argparse.Namespace) -> None:
    """Makes pictures from a prompt and writes them."""
    check_output(args.output)
    pipe = load_pipeline(args.model, getattr(torch, args.dtype)).to(args.device)
    images = pipe(
        args.prompt,
        args.negative_prompt,
        output_resolution=args.resolution,
        num_inference_steps=scalar_or_list(args.steps),
        guidance_scale=scalar_or_list(args.guidance_scale),
        num_images_per_prompt=args.num_images,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    if args.grid:
        columns = int(len(images) ** 0.5)
        while len(images) % columns:
            columns -= 1
        images = [make_image_grid(images, rows=columns, cols=len(images) // columns)]
    for i, image in enumerate(images):
        path = args.output if len(images) == 1 else args.output.with_stem(f"{args.output.stem}-{i}")
        save_image(image, path)
        print(path)


def load_pipeline(model: str, dtype: torch.dtype = torch.float32) -> ImagenCascadePipeline:
    """Loads a cascade from a folder or from the Hub.

    Raises:
        ValueError: If there is none.
    """
    if not os.path.isdir(model) and not HUB_ID.fullmatch(model):
        raise ValueError(f"`model` is {model!r}, which is neither a folder nor a Hub id like 'name/repository'.")
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "model_index.json")):
        raise ValueError(f"`model` is {model!r}, a folder without a model_index.json: it holds no pipeline.")
    try:
        return ImagenCascadePipeline.from_pretrained(model, dtype=dtype)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`model` is {model!r}, which cannot be loaded: {reason}") from error


def check_output(path: Path) -> None:
    """Checks that an image can be written there, before it takes minutes to make one."""
    extensions = (".png", ".jpg", ".jpeg", ".webp")
    if path.suffix.lower() not in extensions:
        raise ValueError(f"`output` is '{path}', but should end in one of {', '.join(extensions)}.")
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"`output` is '{path}', but '{path.parent}' is not a folder.")


def save_image(image, path: Path) -> None:
    """Writes an image beside its place and then moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format={".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG"))
    os.replace(partial, path)


def scalar_or_list(values: Union[list, dict]):
    """A single value serves all stages; several are one a stage."""
    return values[0] if isinstance(values, list) and len(values) == 1 else values


if __name__ == "__main__":
    sys.exit(main())
