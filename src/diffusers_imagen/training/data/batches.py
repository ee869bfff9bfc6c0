"""Micro-batches of a run, for training and validation."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import logging
from torch.utils.data import DataLoader

from ...text.source import TextSource
from .batch import Batch, Samples
from .captions import iterate_captions
from .data_config import DataConfig
from .fingerprint import describe_data
from .loading import BatchPlan, SlotDataset, assign_buckets
from .memory import CaptionedImages
from .pieces import Remaining, pack, unpack
from .samples import SampleMaker
from .slot_draws import VALIDATION_SEED, BucketOrder, RowOrder, SlotDraws
from .sources import Rows, draw_weights, open_rows
from .streaming import Position, ShardReader, StreamDataset


logger = logging.get_logger(__name__)

CPU = torch.device("cpu")
MEMORY_LIMIT = 4 * 2**30  # bytes of pixels up to which images are kept in memory by default


def make_train_batches(
    config: DataConfig,
    text: TextSource | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    device: torch.device = CPU,
) -> "BatchStream":
    """Return the training batches of a process, an infinite stream.

    Args:
        config (`DataConfig`): Configuration of the data and its processing.
        text (`TextSource`, *optional*): Source of the captions' embeddings; without it batches have no text.
        process_index (`int`), num_processes (`int`): Index of this process, and number of processes.
        device (`torch.device`): Device on which images and embeddings are converted to floating point and padded.

    Raises:
        ValueError: If the data does not match the configuration.
    """
    rows = open_rows(config, config.train_split, text is not None)
    stream = _make_batches(rows, config, config.train_split, text, process_index, num_processes, training=True)
    stream.content, stream.device = describe_data(rows, config), device
    return stream


def make_validation_batches(
    config: DataConfig,
    text: TextSource | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    device: torch.device = CPU,
    num_images: int = 512,
) -> "ValidationBatches":
    """Return the validation batches of a process: the same at each iteration, without random flips or degradations.

    All processes together use `num_images` rows, rounded up to whole batches, or all rows if there are fewer.
    """
    split = str(config.validation_split)
    rows = open_rows(config, split, text is not None)
    stream = _make_batches(rows, config, split, text, process_index, num_processes, training=False)
    stream.device = device
    return ValidationBatches(stream, num_images)


def _make_batches(
    rows: Rows,
    config: DataConfig,
    split: str,
    text: TextSource | None,
    process_index: int,
    num_processes: int,
    training: bool,
) -> "BatchStream":
    if text is not None:
        text = text.for_captions(None if rows.streaming else iterate_captions(rows.data, config.caption_column))
    maker = SampleMaker(config, rows.image_column, rows.folder, with_text=text is not None, augment=training)
    seed = (config.seed,) if training else (config.seed, VALIDATION_SEED)
    place = (config, text, process_index, num_processes)
    if rows.streaming:
        return StreamBatches(*place, rows, maker, SlotDraws(*seed))
    if keeps_in_memory(config, rows):
        images = CaptionedImages(config, rows, maker, seed, weighted=training)
        logger.info(f"{len(images)} images of the split {split!r} at {config.resolution} px in memory")
        return MemoryBatches(*place, images)
    weights = draw_weights(rows.data, config) if training else None
    skipped: dict[str, str] = {}
    order: RowOrder | BucketOrder
    if config.aspect_ratio_buckets is None:
        order = RowOrder(len(rows.data), config.seed, weights)
    else:
        slots = config.train_batch_size * num_processes * config.gradient_accumulation_steps
        buckets, skipped = assign_buckets(rows, config)
        order = BucketOrder(buckets, slots, config.seed, weights)
    logger.info(f"{len(rows.data)} images of the split {split!r}, read when they are drawn")
    stream = LoaderBatches(*place, rows, maker, order, SlotDraws(*seed))
    stream.report(skipped)
    return stream


def keeps_in_memory(config: DataConfig, rows: Rows) -> bool:
    """
    Return whether pixels are kept in memory: as configured, or if the images are squares and small enough in total.
    """
    if config.in_memory is not None or config.aspect_ratio_buckets or not config.center_crop:
        return bool(config.in_memory)
    pixels = 3 * config.resolution**2
    reduced = 0 if config.low_resolution is None else 4 * 3 * config.low_resolution**2
    return len(rows.data) * (pixels + reduced) <= MEMORY_LIMIT


class BatchStream(Iterator[Batch]):
    """Stream of this process's micro-batches.

    Slots are numbered over processes and batches; `images_seen` counts those that all processes have returned.

    Attributes:
        images_seen (`int`): Number of slots returned, by all processes.
        skipped (`dict[str, str]`): Images that were skipped, and why.
        content (`dict[str, Any]`): Description that identifies the training data, as returned by `describe_data`.
        device (`torch.device`): Device on which images and embeddings are converted to floating point and padded.
    """

    content: dict[str, Any] | None = None
    device = CPU

    def __init__(self, config: DataConfig, text: TextSource | None, process_index: int, num_processes: int):
        self.config, self.text = config, text
        self.process_index, self.num_processes = process_index, num_processes
        self.images_seen = 0
        self.skipped: dict[str, str] = {}

    @property
    def needs_encoder(self) -> bool:
        """Whether captions are encoded while batches are drawn."""
        return self.text is not None and self.text.needs_encoder

    @property
    def epoch(self) -> int | None:
        """Number of slots in one pass over the images; None if unknown."""
        return None

    @property
    def stride(self) -> int:
        """Number of slots that all processes use together per batch."""
        return self.config.train_batch_size * self.num_processes

    @property
    def first_slot(self) -> int:
        """First slot of this process's next batch."""
        return self.images_seen + self.process_index * self.config.train_batch_size

    def __next__(self) -> Batch:
        batch = self._draw().finish(self.text, self.config, self.device)
        self.images_seen += self.stride
        return batch

    def _draw(self) -> Samples:
        raise NotImplementedError

    def report(self, skipped: dict[str, str]) -> None:
        """Record skipped images, and log each of them once."""
        for name, reason in skipped.items():
            if name not in self.skipped:
                self.skipped[name] = reason
                logger.warning(f"Skipped {name} ({len(self.skipped)} so far): {reason}")

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last returned batch."""
        return {"images_seen": self.images_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a position, also with other numbers of processes, workers, or images per batch."""
        self.images_seen = state["images_seen"]

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Resume from the positions of all processes of a run, by process index."""
        self.load_state_dict(states[min(self.process_index, len(states) - 1)])

    def close(self) -> None:
        """Stop the processes that read ahead."""


class MemoryBatches(BatchStream):
    """Batches of images in memory."""

    def __init__(self, config, text, process_index, num_processes, images: CaptionedImages):
        super().__init__(config, text, process_index, num_processes)
        self.images = images
        self.report(images.skipped)

    @property
    def epoch(self) -> int | None:
        return len(self.images)

    def _draw(self) -> Samples:
        return self.images.draw(self.first_slot, self.config.train_batch_size)


class LoaderBatches(BatchStream):
    """Batches of images that workers read ahead."""

    def __init__(self, config, text, process_index, num_processes, rows, maker, order, draws):
        super().__init__(config, text, process_index, num_processes)
        self.dataset = SlotDataset(rows, maker, order, draws, config.bucket_shapes(), text)
        self._batches: Iterator | None = None

    @property
    def epoch(self) -> int | None:
        return len(self.dataset.rows.data)

    def _draw(self) -> Samples:
        if self._batches is None:
            self._batches = iter(self._loader())
        samples, skipped, *_ = next(self._batches)
        self.report(skipped)
        return samples

    def _loader(self) -> DataLoader:
        size = self.config.train_batch_size
        offset = self.process_index * size
        plan = BatchPlan(self.dataset.order, self.dataset.draws, self.images_seen, self.stride, offset, size)
        return make_loader(self.dataset, self.config, sampler=plan)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.close()

    def close(self) -> None:
        self._batches = None


class StreamBatches(LoaderBatches):
    """Batches of a stream that workers read ahead, each from its own shards."""

    def __init__(self, config, text, process_index, num_processes, rows, maker, draws):
        BatchStream.__init__(self, config, text, process_index, num_processes)
        self.rows, self.maker, self.draws = rows, maker, draws
        self.num_workers = max(1, config.dataloader_num_workers)
        self.places: list[dict | None] = [None] * self.num_workers
        self.remaining: Remaining = {}
        self._batches = None

    @property
    def epoch(self) -> int | None:
        return None

    def _draw(self) -> Samples:
        if self._batches is None:
            self._batches = iter(self._loader())
        samples, skipped, (worker, place) = next(self._batches)
        self.places[worker] = place
        self.report(skipped)
        return samples

    def _dataset(self) -> StreamDataset:
        return StreamDataset(
            self.rows,
            self.maker,
            self.text,
            self.draws,
            (self.process_index, self.num_processes),
            self.num_workers,
            Position(self.images_seen, list(self.places), self.remaining),
        )

    def _loader(self) -> DataLoader:
        return make_loader(self._dataset(), self.config)

    @property
    def layout(self) -> dict[str, int]:
        """Settings that the positions of the readers depend on."""
        return {
            "process_index": self.process_index,
            "num_processes": self.num_processes,
            "dataloader_num_workers": self.num_workers,
            "train_batch_size": self.config.train_batch_size,
            "shuffle_buffer_size": self.config.shuffle_buffer_size,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this process after the last returned batch."""
        own = {"places": list(self.places), "layout": self.layout, "remaining": pack(self.remaining)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Resume from a position of the same process, with the same numbers of processes, workers and images per batch.
        """
        if state.get("layout") != self.layout:
            raise ValueError(
                f"The stream was saved with {state.get('layout')}, but this run has {self.layout}: they should be "
                "equal to resume a stream from one process's position."
            )
        super().load_state_dict(state)
        self.places, self.remaining = list(state["places"]), unpack(state.get("remaining", []))

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Resume from the positions of all processes: with the same numbers of them, of workers and of images per batch
        exactly, with others with the rows that are left of each epoch.

        Raises:
            ValueError: If rows were shuffled in blocks of another size, or a position is missing.
        """
        own = states[min(self.process_index, len(states) - 1)]
        if own.get("layout") == self.layout:
            self.load_state_dict(own)
            return
        states = list(states)
        layouts = [state["layout"] for state in states]
        if [layout["process_index"] for layout in layouts] != list(range(layouts[0]["num_processes"])):
            raise ValueError(f"a stream of {layouts[0]['num_processes']} processes has {len(states)} positions")
        if layouts[0]["shuffle_buffer_size"] != self.config.shuffle_buffer_size:
            raise ValueError(
                f"`shuffle_buffer_size` is {self.config.shuffle_buffer_size}, but should be "
                f"{layouts[0]['shuffle_buffer_size']}, with which the stream was read"
            )
        readers = [reader for state in states for reader in self._readers(state)]
        epochs = [reader.state["epoch"] for reader in readers]
        last = max([*epochs, *readers[0].remaining])
        self.remaining = {
            epoch: [piece for reader in readers for piece in reader.left(epoch)]
            for epoch in range(min(epochs), last + 1)
        }
        self.images_seen, self.places = states[0]["images_seen"], [None] * self.num_workers
        self.close()

    def _readers(self, state: dict[str, Any]) -> list[ShardReader]:
        """Return the readers of a process of another run, at its position."""
        layout = state["layout"]
        config = replace(
            self.config,
            dataloader_num_workers=layout["dataloader_num_workers"],
            train_batch_size=layout["train_batch_size"],
        )
        place = (layout["process_index"], layout["num_processes"])
        other = StreamBatches(config, self.text, *place, self.rows, self.maker, self.draws)
        other.load_state_dict(state)
        dataset = other._dataset()
        return [dataset.reader(worker) for worker in range(other.num_workers)]


def make_loader(dataset, config: DataConfig, **kwargs) -> DataLoader:
    """Create a loader of complete batches, which does not use the global random state."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=config.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        **kwargs,
    )


class ValidationBatches:
    """The first batches of a stream, again at each iteration."""

    def __init__(self, stream: BatchStream, num_images: int):
        self.stream = stream
        self.start = stream.state_dict()
        if isinstance(stream, MemoryBatches):
            num_images = min(num_images, len(stream.images))
        elif isinstance(stream, LoaderBatches) and not isinstance(stream, StreamBatches):
            num_images = min(num_images, len(stream.dataset.rows.data))
        self.num_batches = -(-num_images // stream.stride)

    @property
    def needs_encoder(self) -> bool:
        """Whether captions are encoded while batches are drawn."""
        return self.stream.needs_encoder

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        self.stream.load_state_dict(self.start)
        for _ in range(self.num_batches):
            yield next(self.stream)
        self.stream.close()
