"""Random numbers for the processing of images, determined by the slot number, independent of process and batch.

The images of a run are numbered over processes, batches and accumulation steps: these numbers are its slots. A slot
has a fixed range of the counter-based generator Philox (Salmon et al. 2011), so that two processes with batches of 8
see the same images as one process with batches of 16, and a resumed run the same as an uninterrupted one.
"""

from collections.abc import Sequence

import numpy as np

from .permutation import Permutation


VALIDATION_SEED = 1  # words after the run's seed, one for each independent sequence
ORDER_SEED = 2
REPLACEMENT_SEED = 3
BLOCK_SEED = 4
SUBSET_SEED = 5

ROW, CAPTION, CROP_TOP, CROP_LEFT, FLIP, BLUR, JPEG, PLACE_TOP, PLACE_LEFT, BUCKET = range(10)
DRAWS_PER_SLOT = 12
PHILOX_WORDS = 4  # numbers per step of the counter
MAX_ATTEMPTS = 64  # rows tried for a slot before an error is raised


def philox_key(seed: int, *words: int) -> np.ndarray:
    """Return the key for a seed and the words after it."""
    return np.random.SeedSequence((seed, *words)).generate_state(2, np.uint64)


def philox(seed: int, *words: int, step: int = 0) -> np.random.Generator:
    """Return the generator for a seed and the words after it, starting at a step of its counter."""
    return np.random.Generator(np.random.Philox(key=philox_key(seed, *words), counter=step))


class SlotDraws:
    """Uniform random numbers of slots.

    Args:
        seed (`int`): The run's seed.
        words (`int`): Words that distinguish sequences of the same seed.
    """

    def __init__(self, seed: int, *words: int):
        self.key = philox_key(seed, *words)

    def __call__(self, first: int, count: int, draws: int = DRAWS_PER_SLOT) -> np.ndarray:
        """
        Return numbers in [0, 1) for `count` slots, starting at `first`: `(count, draws)`; `draws` is a multiple of 4.
        """
        counter = first * (draws // PHILOX_WORDS)
        return np.random.Generator(np.random.Philox(key=self.key, counter=counter)).random((count, draws))


def cumulate(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return cumulative sums of weights, normalized to end at 1, for `pick`."""
    edges = np.cumsum(weights, dtype=np.float64)
    return edges / edges[-1]


def pick(edges: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return indices drawn in proportion to the weights with cumulative sums `edges`."""
    return edges.searchsorted(uniform, side="right")


def whole(uniform: np.ndarray, count: int) -> np.ndarray:
    """Convert uniform numbers to integers below `count`."""
    return (uniform * count).astype(np.int64)


class RowOrder:
    """Selects the row of a slot.

    Without weights each epoch is a permutation of all rows, which is not stored; with weights each slot draws its row,
    and the cumulative sums of the weights are stored.

    Args:
        num_rows (`int`): Number of rows of the data set.
        seed (`int`): The run's seed.
        weights (`np.ndarray`, *optional*): `(num_rows,)`, relative frequencies of the rows.
    """

    def __init__(self, num_rows: int, seed: int, weights: np.ndarray | None = None):
        self.num_rows = num_rows
        self.seed = seed
        self.edges = None if weights is None else cumulate(weights)
        self.replacements = SlotDraws(seed, REPLACEMENT_SEED)

    def __call__(self, first: int, draws: np.ndarray) -> np.ndarray:
        """Return the rows of the slots starting at `first`, with random numbers `draws` `(count, DRAWS_PER_SLOT)`."""
        if self.edges is not None:
            return pick(self.edges, draws[:, ROW])
        epochs, places = np.divmod(np.arange(first, first + len(draws)), self.num_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            order = Permutation(self.num_rows, philox_key(self.seed, ORDER_SEED, int(epoch)))
            rows[epochs == epoch] = order(places[epochs == epoch])
        return rows

    def replacement(self, slot: int, attempt: int) -> int:
        """Return the replacement of a row that cannot be used; a slot has `MAX_ATTEMPTS` of them."""
        uniform = self.replacements(slot, 1, MAX_ATTEMPTS)[0, attempt]
        return int(whole(uniform, self.num_rows) if self.edges is None else pick(self.edges, uniform))


class BucketOrder:
    """Selects the row of a slot if the slots of an optimizer step have the same shape.

    A step draws its bucket in proportion to the bucket's rows, or their weights, and a slot draws its row from it.

    Args:
        buckets (`np.ndarray`): `(num_rows,)`, the bucket of each row; rows with -1 are never drawn.
        slots_per_step (`int`): Number of slots with the same shape.
        seed (`int`): The run's seed.
        weights (`np.ndarray`, *optional*): `(num_rows,)`, relative frequencies of the rows.
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
        """Return the bucket of the step with the slot `start`."""
        step = start // self.slots_per_step
        return int(pick(self.edges, self.draws(step * self.slots_per_step, 1)[0, BUCKET]))

    def __call__(self, first: int, draws: np.ndarray, bucket: int) -> np.ndarray:
        """Return rows like `RowOrder`, from one bucket."""
        return self.members[bucket][self.orders[bucket](first, draws)]

    def replacement(self, slot: int, attempt: int, bucket: int) -> int:
        """Return a replacement like `RowOrder.replacement`, from the same bucket."""
        return int(self.members[bucket][self.orders[bucket].replacement(slot, attempt)])
