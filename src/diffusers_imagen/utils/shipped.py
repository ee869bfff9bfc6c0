"""The cascade that ships with this package, found in a clone of the repository or in an installed package of weights."""

import os
from importlib.metadata import entry_points
from pathlib import Path

from .files import PathLike


NAME = "imagen-emoji"  # as sources of weights call it
INDEX = "model_index.json"
ENTRY_POINTS = "diffusers_imagen.models"  # the group in which packages of weights name their folders
IN_A_CLONE = Path(__file__).resolve().parents[3] / "checkpoints" / NAME
EXTRA = "pip install 'diffusers-imagen[emoji-weights]'"


def shipped_cascade() -> Path:
    """Return the folder of the cascade that ships, for `from_pretrained` of this package and of diffusers.

    In a clone of the repository it is `checkpoints/imagen-emoji`; elsewhere it is the one in the package
    `diffusers-imagen-emoji`, which the extra `emoji-weights` installs.

    Raises:
        ValueError: If there is neither, or files of the package are missing.
    """
    if (IN_A_CLONE / INDEX).is_file():
        return IN_A_CLONE
    for entry in entry_points(group=ENTRY_POINTS, name=NAME):
        folder = Path(entry.load())
        if not (folder / INDEX).is_file():
            raise ValueError(f"The cascade {NAME!r} in '{folder}' has no {INDEX}: install it again with {EXTRA}.")
        return folder
    raise ValueError(
        f"The cascade {NAME!r}, the default model, is not installed: {EXTRA}, or pass another model (--model)."
    )


def find_source(source: PathLike) -> PathLike:
    """Return a source of weights as it is, or for the name of the shipped cascade its folder.

    Args:
        source (`str` or `os.PathLike`): A folder, a Hub id, or `"imagen-emoji"`. A folder of that name comes first.

    Raises:
        ValueError: If it is the name of the shipped cascade, which is not installed.
    """
    return str(shipped_cascade()) if source == NAME and not os.path.isdir(source) else source
