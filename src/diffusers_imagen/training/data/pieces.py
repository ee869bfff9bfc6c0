"""Pieces of a stream's shards: their assignment to readers, and what of an epoch remains when its readers change."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Rows of a shard in the order of an epoch: every `parts`-th row, the first of which is row `part`, from `start` on.

    Attributes:
        shard (`int`): Index of the shard.
        part (`int`), parts (`int`): Which rows belong to the piece.
        start (`int`): Rows before this one were read earlier.
        block (`int`): Block of rows at which reading begins.
        stream (`dict`, *optional*): State of the shard's stream at this block; None for its beginning.
    """

    shard: int
    part: int = 0
    parts: int = 1
    start: int = 0
    block: int = 0
    stream: dict[str, Any] | None = None

    def rows_in(self, block: int, block_size: int, count: int) -> np.ndarray:
        """Return the piece's rows in a block of `count` rows, as indices in its order."""
        first = block * block_size
        rows = np.arange((self.part - first) % self.parts, count, self.parts)
        return rows[rows + first >= self.start]

    def after(self, block: int, block_size: int, taken: int, stream: dict[str, Any]) -> "Piece":
        """Return the piece without the rows before a block, whose stream has a given state, and without its first rows."""
        rows = self.rows_in(block, block_size, block_size)
        end = block_size if taken == len(rows) else int(rows[taken])
        return self._replace(start=block * block_size + end, block=block, stream=stream)

    def split(self, part: int, parts: int) -> "Piece":
        """Return one of several parts of the piece."""
        return self._replace(part=self.part + self.parts * part, parts=self.parts * parts)


Remaining = dict[int, list[Piece]]  # by epoch


def share(pieces: Sequence[Piece], reader: int, num_readers: int) -> list[Piece]:
    """Return the pieces of a reader: every `num_readers`-th, or, if there are fewer pieces than readers, a part of each."""
    if len(pieces) >= num_readers:
        return list(pieces[reader::num_readers])
    return [piece.split(reader, num_readers) for piece in pieces]


def pack(remaining: Remaining) -> list:
    """Return pieces as lists, numbers and dictionaries; whole shards as numbers."""
    return [
        [epoch, [piece.shard if piece == Piece(piece.shard) else list(piece) for piece in pieces]]
        for epoch, pieces in remaining.items()
    ]


def unpack(packed: list) -> Remaining:
    """Reverse `pack`."""
    return {
        epoch: [Piece(*piece) if isinstance(piece, list) else Piece(piece) for piece in pieces]
        for epoch, pieces in packed
    }
