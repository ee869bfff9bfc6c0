"""Tiling of large images, with overlapping tiles blended at every step (MultiDiffusion, arXiv 2302.08113)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch


class Tiling(NamedTuple):
    """Height and width of the tiles, and the overlap of adjacent tiles, in pixels."""

    tile_size: int
    overlap: int


class Tile(NamedTuple):
    """
    Part of the image, and the weight of its pixels in the blend; the weights of all tiles sum to 1 at every pixel.
    """

    rows: slice
    columns: slice
    weight: torch.Tensor  # (rows, columns)


def make_tiles(height: int, width: int, tiling: Tiling, device: torch.device) -> list[Tile]:
    """Return tiles that cover an image; a single one of weight 1 if the image fits into a tile."""
    return [
        Tile(rows, columns, (down[:, None] * across[None, :]).to(device))
        for rows, down in _intervals(height, tiling)
        for columns, across in _intervals(width, tiling)
    ]


def _intervals(length: int, tiling: Tiling) -> Iterator[tuple[slice, torch.Tensor]]:
    """Return intervals that cover a height or width, with their weights: normalized ramps over the overlap."""
    size = min(tiling.tile_size, length)
    starts = list(range(0, length - size, tiling.tile_size - tiling.overlap)) + [length - size]
    # from the border inwards, never 0, so that the weight of a pixel in only one tile is 1
    distance = torch.arange(1, size + 1, dtype=torch.float64)
    ramp = torch.minimum(distance, distance.flip(0)).clamp(max=tiling.overlap + 1)
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + size] += ramp
    for start in starts:
        part = slice(start, start + size)
        yield part, (ramp / total[part]).float()


def blend(outputs: Iterator[torch.Tensor], tiles: list[Tile], like: torch.Tensor) -> torch.Tensor:
    """
    Return the weighted sum of the tiles' outputs `(B, C', h, w)`: `(B, C', H, W)` in float32, in the size of `like`.
    """
    blended = None
    for output, tile in zip(outputs, tiles):
        if blended is None:
            blended = torch.zeros((*output.shape[:2], *like.shape[2:]), dtype=torch.float32, device=like.device)
        blended[..., tile.rows, tile.columns] += output.float() * tile.weight
    assert blended is not None
    return blended
