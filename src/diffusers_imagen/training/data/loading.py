"""Data set with random access to rows, whose images are read when they are drawn."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from diffusers.training_utils import find_nearest_bucket
from torch.utils.data import Dataset, Sampler

from ...text.source import TextSource
from .batch import Sample, Samples
from .captions import BadCaption
from .data_config import DataConfig
from .pixels import BadImage, name_image, open_image
from .samples import SampleMaker
from .slot_draws import MAX_ATTEMPTS, BucketOrder, RowOrder, SlotDraws
from .sources import Rows


class PlannedBatch(NamedTuple):
    """Rows for the slots of a micro-batch."""

    first: int
    rows: list[int]
    bucket: int | None


class BatchPlan(Sampler):
    """Infinite sequence of one process's micro-batches.

    Args:
        order (`RowOrder` or `BucketOrder`): Selects the row of a slot.
        draws (`SlotDraws`): Random numbers of the slots.
        start (`int`): Number of earlier slots of all processes.
        stride (`int`): Number of slots that all processes use together.
        offset (`int`): Position of this process's slots among them.
        batch_size (`int`): Number of slots of a micro-batch.
    """

    def __init__(
        self, order: RowOrder | BucketOrder, draws: SlotDraws, start: int, stride: int, offset: int, batch_size: int
    ):
        self.order, self.draws = order, draws
        self.start, self.stride, self.offset, self.batch_size = start, stride, offset, batch_size

    def __iter__(self) -> Iterator[PlannedBatch]:
        start = self.start
        while True:
            first = start + self.offset
            draws = self.draws(first, self.batch_size)
            if isinstance(self.order, BucketOrder):
                bucket = self.order.bucket(start)
                yield PlannedBatch(first, self.order(first, draws, bucket).tolist(), bucket)
            else:
                yield PlannedBatch(first, self.order(first, draws).tolist(), None)
            start += self.stride


class SlotDataset(Dataset):
    """Reads the micro-batches of a plan; rows that cannot be used are replaced by others."""

    def __init__(
        self,
        rows: Rows,
        maker: SampleMaker,
        order: RowOrder | BucketOrder,
        draws: SlotDraws,
        shapes: list[tuple[int, int]] | None,
        text: TextSource | None,
    ):
        self.rows, self.maker, self.order, self.draws, self.shapes = rows, maker, order, draws, shapes
        self.text = None if text is None or text.needs_encoder else text

    def __getitem__(self, plan: PlannedBatch) -> tuple[Samples, dict[str, str]]:
        """Return the samples, and the skipped rows by name, with the reasons."""
        skipped: dict[str, str] = {}
        draws = self.draws(plan.first, len(plan.rows))
        samples = [self._sample(plan, i, draws[i], skipped) for i in range(len(plan.rows))]
        return Samples.stack(samples, self.text), skipped

    def _sample(self, plan: PlannedBatch, i: int, draws: np.ndarray, skipped: dict[str, str]) -> Sample:
        group = () if plan.bucket is None else (plan.bucket,)
        shape = None if plan.bucket is None or self.shapes is None else self.shapes[plan.bucket]
        index = plan.rows[i]
        for attempt in range(MAX_ATTEMPTS):
            row = self.rows.data[index]
            try:
                return self.maker(row, draws, shape)
            except (BadImage, BadCaption) as error:
                skipped[name_image(row[self.rows.image_column], index)] = str(error)
            index = self.order.replacement(plan.first + i, attempt, *group)
        name, reason = next(iter(skipped.items()))
        raise ValueError(f"{len(skipped)} consecutive rows cannot be used; {name}: {reason}.")


def image_size(row: dict, index: int, column: str, folder: str) -> dict[str, int | str]:
    """Return height and width of an upright image, from its header; zeros if there is none, with the reason."""
    try:
        with open_image(row[column], folder) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations that swap height and width
            width, height = image.size[::-1] if turned else image.size
    # damaged headers raise errors of any type
    except Exception as error:
        return {"height": 0, "width": 0, "name": name_image(row[column], index), "reason": str(error)}
    return {"height": height, "width": width, "name": name_image(row[column], index), "reason": ""}


def assign_buckets(rows: Rows, config: DataConfig) -> tuple[np.ndarray, dict[str, str]]:
    """
    Return the bucket of each row `(N,)`, by its aspect ratio, -1 for unusable images; and these images, with reasons.

    Raises:
        ValueError: If no image can be used.
    """
    shapes = config.bucket_shapes()
    sizes = rows.data.map(
        image_size,
        with_indices=True,
        fn_kwargs={"column": rows.image_column, "folder": rows.folder},
        remove_columns=rows.data.column_names,
        desc="Reading image sizes",
    )
    height, width = np.array(sizes["height"][:]), np.array(sizes["width"][:])
    buckets = np.array([find_nearest_bucket(h, w, shapes) for h, w in zip(height, width)])
    lowest = max(1, config.min_resolution or 1)
    bad = np.flatnonzero(np.minimum(height, width) < lowest)
    buckets[bad] = -1
    skipped = {}
    for row in sizes.select(bad) if len(bad) else []:
        skipped[row["name"]] = row["reason"] or f"{row['width']}x{row['height']} is below `min_resolution` {lowest}"
    if len(bad) == len(buckets):
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"None of the {len(buckets)} images can be used for `aspect_ratio_buckets`; {name}: {reason}."
        )
    return buckets, skipped
