"""What is drawn for an image: by its slot number alone, whoever draws it and in whatever company.

The images of a run are numbered over processes, batches and accumulation steps: these are its slots. A slot owns a
fixed stretch of the counter-based generator Philox (Salmon et al. 2011), so that two processes with batches of 8 see
what one process with batches of 16 sees, and a resumed run what the stopped one would have seen.
"""

from collections.abc import Sequence

import numpy as np

from .permutation import Permutation


VALIDATION_SEED = 1  # words after the run's seed: each names a sequence that no other draw shares
ORDER_SEED = 2
REPLACEMENT_SEED = 3
BLOCK_SEED = 4
SUBSET_SEED = 5

ROW, CAPTION, CROP_TOP, CROP_LEFT, FLIP, BLUR, JPEG, PLACE_TOP, PLACE_LEFT, BUCKET = range(10)
DRAWS_PER_SLOT = 12
PHILOX_WORDS = 4  # a step of the counter gives four numbers
MAX_ATTEMPTS = 64  # rows tried for a slot before the data set is given up


def philox_key(seed: int, *words: int) -> np.ndarray:
    """The key of a seed and the words that follow it."""
    return np.random.SeedSequence((seed, *words)).generate_state(2, np.uint64)


def philox(seed: int, *words: int, step: int = 0) -> np.random.Generator:
    """The generator of a seed and the words that follow it, from a step of its counter on."""
    return np.random.Generator(np.random.Philox(key=philox_key(seed, *words), counter=step))


class SlotDraws:
    """Uniform numbers of slots.

    Args:
        seed (`int`): The run's seed.
        words (`int`): Distinguish sequences of the same seed.
    """

    def __init__(self, seed: int, *words: int):
        self.key = philox_key(seed, *words)

    def __call__(self, first: int, count: int, draws: int = DRAWS_PER_SLOT) -> np.ndarray:
        """Numbers in [0, 1) of `count` slots from `first` on: `(count, draws)`; `draws` is a multiple of 4."""
        counter = first * (draws // PHILOX_WORDS)
        return np.random.Generator(np.random.Philox(key=self.key, counter=counter)).random((count, draws))


def cumulate(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Running sums of weights, the last of which is 1, for `pick`."""
    edges = np.cumsum(weights, dtype=np.float64)
    return edges / edges[-1]


def pick(edges: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Indices that are drawn in proportion to the weights whose running sums are `edges`."""
    return edges.searchsorted(uniform, side="right")


def whole(uniform: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers below `count`."""
    return (uniform * count).astype(np.int64)


class RowOrder:
    """Which row fills a slot.

    Without weights all rows come once an epoch, in an order of its own, of which nothing is kept; with weights each slot
    draws its row, and the running sums of the weights are kept.

    Args:
        num_rows (`int`): Rows of the data set.
        seed (`int`): The run's seed.
        weights (`np.ndarray`, *optional*): `(num_rows,)`, how often each row is drawn.
    """

    def __init__(self, num_rows: int, seed: int, weights: np.ndarray | None = None):
        self.num_rows = num_rows
        self.seed = seed
        self.edges = None if weights is None else cumulate(weights)
        self.replacements = SlotDraws(seed, REPLACEMENT_SEED)

    def __call__(self, first: int, draws: np.ndarray) -> np.ndarray:
        """Rows of the slots from `first` on, whose numbers are `draws` `(count, DRAWS_PER_SLOT)`."""
        if self.edges is not None:
            return pick(self.edges, draws[:, ROW])
        epochs, places = np.divmod(np.arange(first, first + len(draws)), self.num_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            order = Permutation(self.num_rows, philox_key(self.seed, ORDER_SEED, int(epoch)))
            rows[epochs == epoch] = order(places[epochs == epoch])
        return rows

    def replacement(self, slot: int, attempt: int) -> int:
        """The row in place of one that cannot be used; a slot has `MAX_ATTEMPTS` of them."""
        uniform = self.replacements(slot, 1, MAX_ATTEMPTS)[0, attempt]
        return int(whole(uniform, self.num_rows) if self.edges is None else pick(self.edges, uniform))


class BucketOrder:
    """Which row fills a slot where the slots of an optimizer step share a shape.

    A step draws its bucket in proportion to the bucket's rows, or their weights, and a slot draws its row from it.

    Args:
        buckets (`np.ndarray`): `(num_rows,)`, the bucket of each row; rows with -1 are never drawn.
        slots_per_step (`int`): Slots that share a shape.
        seed (`int`): The run's seed.
        weights (`np.ndarray`, *optional*): `(num_rows,)`, how often each row is drawn.
    """

    def __init__(self, buckets: np.ndarray, slots_per_step: int, seed: int, weights: np.ndarray | None = None):
        weights = np.ones(len(buckets)) if weights is None else weights
        self.slots_per_step = slots_per_step
        self.members = [np.flatnonzero(buckets == bucket) for bucket in range(buckets.max() + 1)]
        filled = ((bucket, rows) for bucket, rows in enumerate(self.members) if len(rows))
        self.orders = {bucket: RowOrder(len(rows), seed, weights[rows]) for bucket, rows in filled}
        self.edges = cumulate([weights[rows].sum() for rows in self.members])
        self.draws = SlotDraws(seed)

    def bucket(self, start: int) -> int:
        """The bucket of the step that the slot `start` belongs to."""
        step = start // self.slots_per_step
        return int(pick(self.edges, self.draws(step * self.slots_per_step, 1)[0, BUCKET]))

    def __call__(self, first: int, draws: np.ndarray, bucket: int) -> np.ndarray:
        """As `RowOrder`, from one bucket."""
        return self.members[bucket][self.orders[bucket](first, draws)]

    def replacement(self, slot: int, attempt: int, bucket: int) -> int:
        """As `RowOrder.replacement`, from the same bucket."""
        return int(self.members[bucket][self.orders[bucket].replacement(slot, attempt)])
