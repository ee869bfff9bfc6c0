"""DistinctCaptions: the distinct captions of a data set by their hashes, whose text is read when it is needed."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from .cache_files import caption_digest


ENTRY = np.dtype([("key", "S16"), ("length", np.int32), ("place", np.int64)])
EMPTY = -1  # the place of the empty text, if it is not in the data
INDEXED_AT_ONCE = 2**16
READ_AT_ONCE = 1000
LEAST_MERGED = 2**20  # captions, with repetitions, after which repetitions are removed
MOST_TEXT = 2**26  # bytes of text that are sorted together
PER_TEXT = 64  # bytes of a string besides its characters
PREFIX = 8  # bytes of text by which captions of the same length are divided

Read = Callable[[np.ndarray], list[str]]


class DistinctCaptions:
    """Distinct captions as a table of 28 bytes per caption: hash, length in characters, and place in the data.

    Args:
        entries (`np.ndarray`): The table `(N,)`, of dtype `ENTRY`.
        read (`Callable`): Returns the captions at an array of places.
    """

    def __init__(self, entries: np.ndarray, read: Read):
        self.entries, self._read = entries, read

    @classmethod
    def index(cls, captions: Iterable[tuple[int, str]], read: Read) -> "DistinctCaptions":
        """Index captions that are given with their places in the data, with repetitions."""
        entries = ((caption_digest(text), len(text), place) for place, text in captions)
        distinct, added = np.empty(0, ENTRY), [np.empty(0, ENTRY)]
        while len(part := np.fromiter(islice(entries, INDEXED_AT_ONCE), ENTRY)):
            added.append(part)
            if sum(map(len, added)) >= max(LEAST_MERGED, len(distinct)):
                distinct, added = without_repetitions(distinct, *added), []
        return cls(without_repetitions(distinct, *added), read)

    @classmethod
    def of(cls, captions: list[str]) -> "DistinctCaptions":
        """Index captions in memory."""
        return cls.index(enumerate(captions), lambda places: [captions[place] for place in places])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, part: slice) -> list[str]:
        """Read some captions."""
        return self._read_places(self.entries["place"][part])

    def with_empty(self) -> "DistinctCaptions":
        """Return these captions and the empty text."""
        empty = np.array([(caption_digest(""), 0, EMPTY)], ENTRY)
        return DistinctCaptions(without_repetitions(self.entries, empty), self._read)

    def without(self, keys: np.ndarray) -> "DistinctCaptions":
        """Return the captions whose keys are not among `keys`."""
        return DistinctCaptions(self.entries[~np.isin(self.entries["key"], keys)], self._read)

    def by_length(self) -> "DistinctCaptions":
        """Return the captions sorted by length in characters, and then by their characters."""
        parts = list(self._sorted_parts(self.entries, self.entries["length"], 0))
        return DistinctCaptions(np.concatenate(parts) if parts else self.entries, self._read)

    def _read_places(self, places: np.ndarray) -> list[str]:
        texts = iter(self._read(places[places != EMPTY]))
        return ["" if place == EMPTY else next(texts) for place in places]

    def _sorted_parts(self, entries: np.ndarray, ranks: np.ndarray, start: int) -> Iterator[np.ndarray]:
        """Yield parts of a table in order, given ranks that determine the order of those with different ranks.

        Captions of consecutive ranks are read and sorted together, up to MOST_TEXT bytes. Captions of one rank that are
        more are ranked again: by the bytes of their text from `start` on, whose order in UTF-8 is that of the characters.
        """
        order = np.argsort(ranks, kind="stable")
        entries, ranks = entries[order], ranks[order]
        ends = np.append(np.flatnonzero(ranks[1:] != ranks[:-1]) + 1, len(ranks))
        sizes = np.cumsum(entries["length"].astype(np.int64) + PER_TEXT)[ends - 1] if len(entries) else []
        first, group = 0, 0
        while group < len(sizes):
            before = sizes[group - 1] if group else 0
            after = max(group + 1, int(np.searchsorted(sizes, before + MOST_TEXT, side="right")))
            part = entries[first : ends[after - 1]]
            if sizes[after - 1] - before <= MOST_TEXT or len(part) == 1:
                texts = self._read_places(part["place"])
                yield part[sorted(range(len(part)), key=lambda i: (len(texts[i]), texts[i]))]
            else:
                yield from self._sorted_parts(part, self._prefixes(part, start), start + PREFIX)
            first, group = ends[after - 1], after

    def _prefixes(self, entries: np.ndarray, start: int) -> np.ndarray:
        """Return the bytes of each caption from `start` on, `(N,)`."""
        parts = (entries["place"][i : i + READ_AT_ONCE] for i in range(0, len(entries), READ_AT_ONCE))
        texts = (text.encode()[start : start + PREFIX] for part in parts for text in self._read_places(part))
        return np.fromiter(texts, f"S{PREFIX}", len(entries))


def without_repetitions(*tables: np.ndarray) -> np.ndarray:
    """Join tables, with one entry for each key, the first."""
    entries = np.concatenate(tables)
    return entries[np.unique(entries["key"], return_index=True)[1]]
