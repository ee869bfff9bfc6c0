"""Data set that is read in order: WebDataset tar shards, or a stream from the Hub.

Rows are not accessible by index, so a run's order depends on the number of processes and workers: each reads its own
shards. Its position can still be saved and resumed exactly.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset as Stream
from torch.utils.data import IterableDataset, get_worker_info

from ...text.source import TextSource
from .batch import Sample, Samples
from .captions import BadCaption
from .pixels import BadImage, name_image
from .samples import SampleMaker
from .shards import DAMAGE
from .slot_draws import BLOCK_SEED, ORDER_SEED, SlotDraws, philox
from .sources import Rows
from .tables import innermost


MAX_BAD_ROWS = 1000  # consecutive rows that cannot be used before an error is raised


class ShardReader:
    """Infinite stream of the rows in one reader's shards: shards in a new order each epoch, rows shuffled in blocks.

    The shuffling of `datasets` loses its buffer when it is resumed. Here a block is read again from its beginning.

    Args:
        data (`datasets.IterableDataset`): The stream.
        seed (`int`): The run's seed.
        reader (`int`): Index of this reader among all readers of all processes.
        num_readers (`int`): Number of readers. With fewer shards, each reads all of them and keeps its share of rows.
        block_size (`int`): Number of rows that are shuffled together.
    """

    def __init__(self, data: Stream, seed: int, reader: int, num_readers: int, block_size: int):
        self.data, self.seed = data, seed
        self.reader, self.num_readers, self.block_size = reader, num_readers, block_size
        self.state: dict[str, Any] = {"epoch": 0, "shard": 0, "block": 0, "taken": 0, "stream": None}
        self.shard = 0  # of the last row
        self.place = ""  # position of the last row, for reports

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield rows; `state` is the position after the last one."""
        while True:
            found = self.state["shard"] > 0 or self.state["block"] > 0
            for shard in self._shards()[self.state["shard"] :]:
                for row in self._rows(shard):
                    found = True
                    yield row
                self.state = {**self.state, "shard": self.state["shard"] + 1, "block": 0, "taken": 0, "stream": None}
            if not found:
                raise ValueError("The stream has no row: check the split, the styles and the number of processes.")
            self.state = {**self.state, "epoch": self.state["epoch"] + 1, "shard": 0}

    def _shards(self) -> list[int]:
        order = philox(self.seed, ORDER_SEED, self.state["epoch"]).permutation(self.data.num_shards).tolist()
        return order[self.reader :: self.num_readers] if self._owns_shards() else order

    def _owns_shards(self) -> bool:
        return self.data.num_shards >= self.num_readers

    def _rows(self, shard: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a shard, starting at the state's block."""
        self.shard = shard
        stream = self.data.shard(num_shards=self.data.num_shards, index=shard)
        if self.state["stream"] is not None:
            stream.load_state_dict(self.state["stream"])
        start = stream.state_dict()
        for columns in self._read(stream, shard):
            block = [dict(zip(columns, cells)) for cells in zip(*columns.values())]
            words = (self.state["epoch"], shard, self.state["block"])
            order = philox(self.seed, BLOCK_SEED, *words).permutation(len(block))
            if not self._owns_shards():
                order = order[
                    (self.reader - self.state["block"] * self.block_size) % self.num_readers :: self.num_readers
                ]
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


class StreamDataset(IterableDataset):
    """Micro-batches of one process from a stream; each worker creates every num_workers-th.

    Args:
        rows (`Rows`): The data set.
        maker (`SampleMaker`): Creates samples.
        text (`TextSource`, *optional*): Source of the captions' embeddings.
        draws (`SlotDraws`): Random numbers of the slots.
        place (`tuple[int, int]`): Index of this process, and number of processes.
        num_workers (`int`): Number of workers per process.
        batches (`int`): Number of earlier batches of this process.
        states (`dict[int, dict]`): Position of each worker's reader; empty at the beginning.
    """

    def __init__(
        self,
        rows: Rows,
        maker: SampleMaker,
        text: TextSource | None,
        draws: SlotDraws,
        place: tuple[int, int],
        num_workers: int,
        batches: int = 0,
        states: dict[int, dict] | None = None,
    ):
        self.rows, self.maker, self.draws = rows, maker, draws
        self.text = None if text is None or text.needs_encoder else text
        (self.process_index, self.num_processes), self.num_workers = place, max(1, num_workers)
        self.batches, self.states = batches, states or {}

    def __iter__(self) -> Iterator[tuple[Samples, dict[str, str], tuple[int, dict]]]:
        """Yield samples, skipped rows with reasons, and the worker with its reader's position."""
        info = get_worker_info()
        # a DataLoader starts with its first worker; after a resume, the next batch may be that of another worker
        batch = self.batches + (info.id if info else 0)
        worker = batch % self.num_workers
        config = self.maker.config
        number, readers = self.process_index * self.num_workers + worker, self.num_processes * self.num_workers
        reader = ShardReader(self.rows.data, config.seed, number, readers, config.shuffle_buffer_size)
        reader.state = self.states.get(worker, reader.state)
        rows = iter(reader)
        size = config.train_batch_size
        while True:
            first = (batch * self.num_processes + self.process_index) * size
            draws = self.draws(first, size)
            skipped: dict[str, str] = {}
            samples = Samples.stack([self._sample(reader, rows, slot, skipped) for slot in draws])
            yield samples, skipped, (worker, reader.state)
            batch += self.num_workers

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
