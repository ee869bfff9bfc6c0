"""Slices of a batch: how many images a model is called with at once."""

from collections.abc import Collection, Mapping
from typing import Any

from ..utils.arguments import as_integer, bad_argument
from .stage_table import check_stage_names
from .tiling import Tiling


# pixels per network call, unless `enable_slicing` sets the number of images: 256 images of 64 px, 16 of 256 px, 1 of 1024 px
PIXELS_AT_ONCE = 2**20

SliceSize = int | dict[str, int] | None


def check_slice_size(slice_size: Any, maximum: int, stages: Collection[str]) -> int | dict[str, int]:
    """Check the number of images per call: one for all models, or a dict by the names of some of a pipeline's stages.

    Raises:
        ValueError: If it is neither.
    """
    if not isinstance(slice_size, Mapping):
        return as_integer("slice_size", slice_size, 1, maximum)
    check_stage_names("slice_size", slice_size, stages)
    if not slice_size:
        raise bad_argument("slice_size", slice_size, "a number, or a dict of numbers by stage name")
    return {name: as_integer("slice_size", number, 1, maximum) for name, number in slice_size.items()}


def shared_size(slice_size: SliceSize) -> int | None:
    """Return the number of inputs per call of models that do not belong to a stage; None for all at once."""
    return slice_size if isinstance(slice_size, int) else None


def size_of_stage(slice_size: SliceSize, name: str, height: int, width: int, tiling: Tiling | None) -> int:
    """Return the number of images per call of a stage's network: the given one, or as many as have `PIXELS_AT_ONCE` pixels."""
    given = slice_size.get(name) if isinstance(slice_size, dict) else slice_size
    if given is not None:
        return given
    if tiling is not None:
        height, width = min(height, tiling.tile_size), min(width, tiling.tile_size)
    return max(1, PIXELS_AT_ONCE // (height * width))


def make_slices(num_images: int, size: int) -> list[slice]:
    """Return the smallest number of slices of at most `size` images, of equal length where possible.

    A compiled network has a graph for every length.
    """
    number = -(-num_images // size)
    length = -(-num_images // number)
    return [slice(start, min(start + length, num_images)) for start in range(0, num_images, length)]
