"""Data set that is read in order: WebDataset tar shards, or a stream from the Hub.

Rows are not accessible by index, so a run's order depends on the number of processes and workers: each reads its own
shards. Its position can still be saved and resumed exactly. On other numbers of processes or workers it is resumed with
what the former readers left of their epochs, so that every row is still read once per epoch: to keep the order too, each
process would have to read all shards.
"""

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from datasets import IterableDataset as Stream
from torch.utils.data import IterableDataset, get_worker_info

from ...text.source import TextSource
from .batch import Sample, Samples
from .captions import BadCaption
from .pieces import Piece, Remaining, share
from .pixels import BadImage, name_image
from .samples import SampleMaker
from .shards import DAMAGE
from .slot_draws import BLOCK_SEED, ORDER_SEED, SlotDraws, philox
from .sources import Rows
from .tables import innermost


MAX_BAD_ROWS = 1000  # consecutive rows that cannot be used before an error is raised


class ShardReader:
    """Infinite stream of one reader's rows: shards in a new order each epoch, rows shuffled in blocks.

    The shuffling of `datasets` loses its buffer when it is resumed. Here a block is read again from its beginning.

    Args:
        data (`datasets.IterableDataset`): The stream.
        seed (`int`): The run's seed.
        reader (`int`): Index of this reader among all readers of all processes.
        num_readers (`int`): Number of readers. With fewer shards, each reads all of them and keeps its share of rows.
        block_size (`int`): Number of rows that are shuffled together.
        remaining (`Remaining`, *optional*): What other numbers of readers left of the epochs that they began.
    """

    def __init__(
        self,
        data: Stream,
        seed: int,
        reader: int,
        num_readers: int,
        block_size: int,
        remaining: Remaining | None = None,
    ):
        self.data, self.seed = data, seed
        self.reader, self.num_readers, self.block_size = reader, num_readers, block_size
        self.remaining = remaining or {}
        first = min(self.remaining, default=0)
        self.state: dict[str, Any] = {"epoch": first, "shard": 0, "block": 0, "taken": 0, "stream": None}
        self.shard = 0  # of the last row
        self.place = ""  # position of the last row, for reports

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield rows; `state` is the position after the last one."""
        while True:
            found = (
                self.state["shard"] > 0 or self.state["stream"] is not None or self.state["epoch"] in self.remaining
            )
            for piece in self._pieces(self.state["epoch"])[self.state["shard"] :]:
                for row in self._rows(piece):
                    found = True
                    yield row
                self.state = {**self.state, "shard": self.state["shard"] + 1, "block": 0, "taken": 0, "stream": None}
            if not found:
                raise ValueError("The stream has no row: check the split, the styles and the number of processes.")
            self.state = {**self.state, "epoch": self.state["epoch"] + 1, "shard": 0}

    def left(self, epoch: int) -> list[Piece]:
        """Return what is left of this reader's share of an epoch."""
        if epoch != self.state["epoch"]:
            return self._pieces(epoch) if epoch > self.state["epoch"] else []
        pieces = self._pieces(epoch)[self.state["shard"] :]
        if self.state["stream"] is not None:
            block, taken, stream = (self.state[name] for name in ("block", "taken", "stream"))
            pieces[0] = pieces[0].after(block, self.block_size, taken, stream)
        return pieces

    def _pieces(self, epoch: int) -> list[Piece]:
        if epoch in self.remaining:
            return share(self.remaining[epoch], self.reader, self.num_readers)
        order = philox(self.seed, ORDER_SEED, epoch).permutation(self.data.num_shards).tolist()
        return share([Piece(shard) for shard in order], self.reader, self.num_readers)

    def _rows(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the rows of a piece, starting at the state's block."""
        shard = self.shard = piece.shard
        stream = self.data.shard(num_shards=self.data.num_shards, index=shard)
        if self.state["stream"] is None:
            self.state = {**self.state, "block": piece.block, "stream": piece.stream}
        start = self.state["stream"]
        if start is not None:
            stream.load_state_dict(deepcopy(start))  # which the stream changes; its own state is still the first one
        else:
            start = stream.state_dict()
        for columns in self._read(stream, shard):
            block = [dict(zip(columns, cells)) for cells in zip(*columns.values())]
            words = (self.state["epoch"], shard, self.state["block"])
            order = philox(self.seed, BLOCK_SEED, *words).permutation(len(block))
            order = order[piece.rows_in(self.state["block"], self.block_size, len(block))]
            for taken in range(self.state["taken"], len(order)):
                self.state = {**self.state, "stream": start, "taken": taken + 1}
                self.place = f"{self.state['block'] * self.block_size + order[taken]} of shard {shard}"
                yield block[order[taken]]
            start = stream.state_dict()
            self.state = {**self.state, "block": self.state["block"] + 1, "taken": 0, "stream": start}

    def _read(self, stream: Stream, shard: int) -> Iterator[dict[str, list]]:
        """Yield blocks of a shard's rows.

        Raises:
            ValueError: If the rest of the shard cannot be read, such as a truncated shard on the Hub; names the shard.
        """
        try:
            # `iter`, unlike a for loop, does not split a shard's rows over the workers again
            yield from stream.iter(batch_size=self.block_size)
        except DAMAGE as error:
            raise ValueError(
                f"Shard {shard} of the stream cannot be read further after {self.state['block']} blocks of "
                f"{self.block_size} rows: {innermost(error)}"
            ) from error


class Position(NamedTuple):
    """Position of a process in a stream: the number of earlier slots of all processes, the position of each worker's
    reader or None, and what other numbers of readers left of the epochs that they began."""

    seen: int
    places: list[dict[str, Any] | None]
    remaining: Remaining


class StreamDataset(IterableDataset):
    """Micro-batches of one process from a stream; each worker creates every num_workers-th.

    Args:
        rows (`Rows`): The data set.
        maker (`SampleMaker`): Creates samples.
        text (`TextSource`, *optional*): Source of the captions' embeddings.
        draws (`SlotDraws`): Random numbers of the slots.
        place (`tuple[int, int]`): Index of this process, and number of processes.
        num_workers (`int`): Number of workers per process.
        position (`Position`): Where the process begins.
    """

    def __init__(
        self,
        rows: Rows,
        maker: SampleMaker,
        text: TextSource | None,
        draws: SlotDraws,
        place: tuple[int, int],
        num_workers: int,
        position: Position,
    ):
        self.rows, self.maker, self.draws = rows, maker, draws
        self.text = None if text is None or text.needs_encoder else text
        (self.process_index, self.num_processes), self.num_workers = place, max(1, num_workers)
        self.position = position

    def __iter__(self) -> Iterator[tuple[Samples, dict[str, str], tuple[int, dict]]]:
        """Yield samples, skipped rows with reasons, and the worker with its reader's position."""
        info = get_worker_info()
        size = self.maker.config.train_batch_size
        stride = size * self.num_processes
        batch = info.id if info else 0
        # a DataLoader starts with its first worker; after a resume, the next batch may be that of another worker
        worker = (self.position.seen // stride + batch) % self.num_workers
        reader = self.reader(worker)
        rows = iter(reader)
        while True:
            first = self.position.seen + batch * stride + self.process_index * size
            draws = self.draws(first, size)
            skipped: dict[str, str] = {}
            samples = Samples.stack([self._sample(reader, rows, slot, skipped) for slot in draws])
            yield samples, skipped, (worker, reader.state)
            batch += self.num_workers

    def reader(self, worker: int) -> ShardReader:
        """Return the reader of a worker, at its position."""
        config, remaining = self.maker.config, self.position.remaining
        number, readers = self.process_index * self.num_workers + worker, self.num_processes * self.num_workers
        reader = ShardReader(self.rows.data, config.seed, number, readers, config.shuffle_buffer_size, remaining)
        reader.state = self.position.places[worker] or reader.state
        return reader

    def _sample(
        self, reader: ShardReader, rows: Iterator[dict[str, Any]], draws: np.ndarray, skipped: dict[str, str]
    ) -> Sample:
        for row in islice(rows, MAX_BAD_ROWS):
            try:
                sample = self.maker(row, draws)
                if self.text is None or sample.caption is None:
                    return sample
                text = self.text.at(self.rows.split, reader.shard, self.rows.data.num_shards)
                if sample.caption not in text:
                    raise BadCaption(f"the caption {sample.caption!r} is not in the embedding cache")
                return sample._replace(text=text.pack([sample.caption]))
            except (BadImage, BadCaption) as error:
                skipped[name_image(row[self.rows.image_column], reader.place)] = str(error)
        name, reason = list(skipped.items())[-1]
        raise ValueError(f"{MAX_BAD_ROWS} consecutive rows cannot be used; {name}: {reason}.")
