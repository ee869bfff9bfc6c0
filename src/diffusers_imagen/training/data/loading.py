"""A data set whose rows are at hand but not its pixels: images are read when they are drawn."""

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
    """Which rows fill the slots of a micro-batch."""

    first: int
    rows: list[int]
    bucket: int | None


class BatchPlan(Sampler):
    """The micro-batches of one process, without end.

    Args:
        order (`RowOrder` or `BucketOrder`): Which row fills a slot.
        draws (`SlotDraws`): The slots' numbers.
        start (`int`): Slots of all processes that came before.
        stride (`int`): Slots that all processes take together.
        offset (`int`): Where this process's slots begin among them.
        batch_size (`int`): Slots of a micro-batch.
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
    """Reads the micro-batches of a plan; another row takes the place of one that cannot be used."""

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
        """The samples, and why rows were passed over, by name."""
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
        raise ValueError(f"{len(skipped)} rows one after another cannot be used; {name}: {reason}.")


def image_size(row: dict, index: int, column: str, folder: str) -> dict[str, int | str]:
    """Height and width of an upright image, from its header; zeros where there is none, and why."""
    try:
        with open_image(row[column], folder) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations that lie on their side
            width, height = image.size[::-1] if turned else image.size
    # what reads damaged headers raises whatever it stumbles over
    except Exception as error:
        return {"height": 0, "width": 0, "name": name_image(row[column], index), "reason": str(error)}
    return {"height": height, "width": width, "name": name_image(row[column], index), "reason": ""}


def assign_buckets(rows: Rows, config: DataConfig) -> tuple[np.ndarray, dict[str, str]]:
    """The bucket of each row `(N,)`, by its aspect ratio, -1 for images that cannot be used; and those, with why.

    Raises:
        ValueError: If none can be used.
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
