"""What several commands need: the model, and image files that are whole or absent."""

import argparse
import os
import re
from pathlib import Path
from typing import Union

import torch

from ..pipelines import ImagenCascadePipeline


# an editable install finds the cascade that the repository ships
SHIPPED_MODEL = Path(__file__).resolve().parents[3] / "checkpoints" / "imagen-emoji"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """Which model, where and in which precision."""
    command.add_argument("--model", default=str(SHIPPED_MODEL), help="folder or Hub id; default: the shipped cascade")
    command.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


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
    check_folder("output", path.parent)


def check_folder(name: str, folder: Path) -> None:
    """Checks that there is no file in the place of a folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{name}` needs the folder '{folder}', but that is a file.")


def save_image(image, path: Path) -> None:
    """Writes an image beside its place and then moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format={".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG"))
    os.replace(partial, path)


def scalar_or_list(values: Union[list, dict]):
    """A single value serves all stages; several are one a stage."""
    return values[0] if isinstance(values, list) and len(values) == 1 else values
