"""What a process knows of its data does not grow with the rows: 400 million of them, simulated."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import pytest
from data_files import samples, tar, write
from datasets import Dataset, IterableDataset

from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data.permutation import Permutation
from diffusers_imagen.training.data.shards import MOST_EXAMINED, Shard, check_shards, examine
from diffusers_imagen.training.data.slot_draws import RowOrder, SlotDraws, philox_key
from diffusers_imagen.training.data.sources import draw_weights, keep_rows, take
from diffusers_imagen.training.data.streaming import ShardReader


ROWS, SHARDS = 400_000_000, 20_000
PER_SHARD = ROWS // SHARDS


@contextmanager
def at_most(mib: float) -> Iterator[None]:
    """Python and numpy may allocate so much beyond what they have."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < mib * 2**20, f"{peak / 2**20:.1f} MiB"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 97, 1000, 4097])
def test_a_permutation_has_every_entry_once(count):
    orders = [Permutation(count, philox_key(0, epoch))(np.arange(count)) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(count)) for order in orders)
    assert count < 10 or len({tuple(order.tolist()) for order in orders}) == 3


def test_all_permutations_are_equally_likely():
    drawn = Counter(tuple(Permutation(4, philox_key(seed))(np.arange(4)).tolist()) for seed in range(2400))
    chi2 = sum((count - 100) ** 2 / 100 for count in drawn.values())
    assert len(drawn) == 24 and chi2 < 49.7  # the 0.1 % quantile of 23 degrees of freedom


def test_numbered_rows_need_no_list():
    """Four processes with batches of 256, of which one is resumed by two with batches of 512."""
    order, draws = RowOrder(ROWS, seed=0), SlotDraws(0)
    with at_most(1):
        seen = [order(first, draws(first, 256)) for first in range(0, 4 * 256 * 8, 256)]
        resumed = [RowOrder(ROWS, seed=0)(first, draws(first, 512)) for first in range(4 * 256 * 8, 4 * 256 * 12, 512)]
        later = [order(first, draws(first, 256)) for first in range(4 * 256 * 8, 4 * 256 * 12, 256)]
    assert np.array_equal(np.concatenate(resumed), np.concatenate(later))
    rows = np.concatenate([*seen, *later])
    assert len(np.unique(rows)) == len(rows) and 0 <= rows.min() and rows.max() < ROWS
    assert rows.mean() / ROWS == pytest.approx(0.5, abs=4 * (1 / 12 / len(rows)) ** 0.5)
    ends = order(ROWS - 2, draws(ROWS - 2, 4))  # the next epoch has another order
    assert np.array_equal(ends[2:], order(ROWS, draws(ROWS, 2))) and ends[2] != seen[0][0]


def numbered(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        for row in range(PER_SHARD):
            yield {"row": shard * PER_SHARD + row}


@pytest.fixture(scope="module")
def stream() -> IterableDataset:
    return IterableDataset.from_generator(numbered, gen_kwargs={"shards": list(range(SHARDS))})


def test_readers_of_a_stream_know_its_shards_only(stream):
    """Four readers, of which one goes on to its second shard and is resumed there."""
    rows = [[row["row"] for row in islice(ShardReader(stream, 0, reader, 4, 1000), 1500)] for reader in (0, 3)]
    with at_most(64):  # a list of 400 million rows takes 3 GiB
        reader = ShardReader(stream, 0, 2, 4, 1000)
        before = [row["row"] for row in islice(reader, PER_SHARD + 1500)]
        resumed = ShardReader(stream, 0, 2, 4, 1000)
        resumed.state = json.loads(json.dumps(reader.state))
        after = [row["row"] for row in islice(resumed, 700)]
    straight = [row["row"] for row in islice(reader, 700)]
    assert after == straight
    seen = [row for part in rows for row in part] + before + after
    assert len(set(seen)) == len(seen)
    shard = before[0] // PER_SHARD
    assert sorted(before[:PER_SHARD]) == list(range(shard * PER_SHARD, (shard + 1) * PER_SHARD))
    assert len({row // PER_SHARD for row in before[PER_SHARD:] + after} | {shard}) == 2


def test_columns_are_read_in_parts(monkeypatch):
    monkeypatch.setattr("diffusers_imagen.training.data.sources.ROWS_AT_ONCE", 7)
    styles = [("flat", "3d", "noto")[i % 5 % 3] for i in range(50)]
    data = Dataset.from_dict({"row": list(range(50)), "style": styles, "weight": [1.0 + i for i in range(50)]})
    kept = keep_rows(data, {"style": ["flat", "noto"]}, "train")
    assert kept["row"][:] == [i for i in range(50) if styles[i] != "3d"]
    config = TrainingConfig(preset="emoji_base_64", balance_by=["style"], weight_column="weight")
    expected = [(1 + i) / styles.count(styles[i]) for i in range(50)]
    np.testing.assert_allclose(draw_weights(data, config), expected, rtol=1e-15)
    some = take(data, 20, seed=3)["row"][:]
    assert (
        len(set(some)) == 20 and some != sorted(some) and sorted(take(data, 99, seed=3)["row"][:]) == list(range(50))
    )


def test_of_many_shards_some_are_examined_and_the_ends_of_all(tmp_path, monkeypatch):
    whole = {f"{i}.tar": tar(samples([i])) for i in range(9)}
    shards = [Shard.at(f"{write(tmp_path / 'd', whole)}/{name}") for name in whole]
    examined = []
    monkeypatch.setattr(
        "diffusers_imagen.training.data.shards.examine", lambda shard: examined.append(shard) or examine(shard)
    )
    assert len(check_shards(shards, 3)) == 3 and examined == [shards[0], shards[4], shards[8]]
    write(tmp_path / "d", {"3.tar": whole["3.tar"][:2000]})
    shards[3] = Shard.at(shards[3].path)
    with pytest.raises(
        ValueError, match="3.tar' cannot be read: unexpected end of data .0 samples can be read.: write"
    ):
        check_shards(shards, 3)
    assert MOST_EXAMINED >= 256
