"""What fills a slot depends on the seed and the slot alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import Batch, make_train_batches, make_validation_batches
from diffusers_imagen.training.data.slot_draws import BucketOrder, RowOrder, SlotDraws, cumulate, pick


AUGMENTED = {
    "low_resolution": 8,
    "crop_size": 16,
    "random_flip": True,
    "degradation_blur_sigma": [0.2, 1.5],
    "degradation_jpeg_quality": [20, 90],
    "caption_column": ["text", "tags"],
}
ROUTES = {
    "memory": {"in_memory": True},
    "balanced": {"in_memory": True, "balance_by": ["style"]},
    "files": {"in_memory": False},
    "buckets": {"in_memory": False, "aspect_ratio_buckets": "32,32;16,64"},
}


@pytest.fixture
def make_config(imagefolder):
    def make_config(**kwargs) -> TrainingConfig:
        return TrainingConfig(
            **{"train_data_dir": imagefolder, "preset": "emoji_base_64", "resolution": 32, "train_batch_size": 4}
            | kwargs
        )

    return make_config


def take(stream, count: int) -> list[Batch]:
    return [next(stream) for _ in range(count)]


def join(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*batches)))


def assert_equal(a: Batch, b: Batch, **tolerance) -> None:
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, **(tolerance or {"atol": 0, "rtol": 0}))


def test_numbers_of_a_slot_do_not_depend_on_where_the_draw_begins():
    draws = SlotDraws(7)
    whole = draws(0, 100)
    assert np.array_equal(draws(31, 9), whole[31:40])
    assert len(np.unique(whole)) == whole.size and not np.array_equal(whole, SlotDraws(7, 1)(0, 100))
    assert whole.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / whole.size) ** 0.5)


def test_weights_decide_how_often_a_row_is_picked():
    edges = cumulate([1, 0, 3, 0])
    uniform = (np.arange(1000) + 0.5) / 1000
    assert np.bincount(pick(edges, uniform), minlength=4).tolist() == [250, 0, 750, 0]
    assert pick(edges, np.nextafter(1, 0)) == 2


def test_all_rows_come_once_an_epoch():
    order = RowOrder(10, seed=0)
    rows = np.concatenate([order(first, np.zeros((7, 12))) for first in range(0, 70, 7)])
    epochs = rows.reshape(7, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len(np.unique(epochs, axis=0)) == 7
    assert order.replacement(3, 0) != order.replacement(3, 1) or order.replacement(3, 1) != order.replacement(3, 2)


def test_slots_of_a_step_share_a_bucket_drawn_by_its_rows():
    buckets = np.array([0] * 30 + [1] * 10 + [-1] * 5)
    order, draws = BucketOrder(buckets, 8, seed=0), SlotDraws(0)
    drawn = []
    for start in range(0, 8000, 4):
        bucket = order.bucket(start)
        rows = order(start, draws(start, 4), bucket)
        assert set(buckets[rows]) == {bucket}
        drawn.append(bucket)
    assert drawn[::2] == drawn[1::2]
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_processes_and_accumulation_share_the_slots(make_config, encode, route):
    config = make_config(**AUGMENTED, **route)
    whole = take(make_train_batches(replace(config, train_batch_size=8), encode), 3)
    half = [make_train_batches(config, encode, process, 2) for process in range(2)]
    accumulating = replace(config, gradient_accumulation_steps=2)
    parts = make_train_batches(accumulating, encode)
    for batch in whole:
        assert_equal(join([next(stream) for stream in half]), batch)
        assert_equal(join(take(parts, 2)), batch)


def test_images_in_memory_are_those_read_from_files(make_config, encode):
    config = make_config(**AUGMENTED, train_batch_size=32)
    memory, files = (next(make_train_batches(replace(config, in_memory=kept), encode)) for kept in (True, False))
    assert_equal(files._replace(low_res=memory.low_res), memory)
    # the reduction of a crop's surroundings and of the whole image differ by rounding, and JPEG steps once at most
    assert (files.low_res - memory.low_res).abs().mean() < 1e-3
    plain = replace(config, degradation_blur_sigma=None, degradation_jpeg_quality=None)
    memory, files = (next(make_train_batches(replace(plain, in_memory=kept), encode)) for kept in (True, False))
    assert_equal(files, memory, atol=1e-5, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_a_position_is_resumed_exactly(make_config, encode, route, workers):
    if workers and route.get("in_memory"):
        pytest.skip("images in memory need no workers")
    config = make_config(**AUGMENTED, **route, dataloader_num_workers=workers)
    straight = take(make_train_batches(config, encode), 6)
    stream = make_train_batches(config, encode)
    take(stream, 3)
    state = stream.state_dict()
    assert state["images_seen"] == 12
    resumed = make_train_batches(config, encode)
    resumed.load_state_dict(state)
    for batch, expected in zip(take(resumed, 3), straight[3:]):
        assert_equal(batch, expected)
    # in the same object, too, and by other numbers of processes
    stream.load_state_dict({"images_seen": 4})
    assert_equal(next(stream), straight[1])
    if not config.aspect_ratio_buckets:
        pair = [make_train_batches(replace(config, train_batch_size=2), encode, process, 2) for process in range(2)]
        for half in pair:
            half.load_state_dict(state)
        assert_equal(join([next(half) for half in pair]), straight[3])


def test_validation_is_the_same_each_time_and_neither_flipped_nor_degraded(make_config, encode):
    config = make_config(**AUGMENTED, validation_split="train", in_memory=True)
    batches = make_validation_batches(config, encode)
    assert len(batches) == 2  # six images
    first, second = list(batches), list(batches)
    for a, b in zip(first, second):
        assert_equal(a, b)
    plain = replace(
        config, random_flip=False, degradation_blur_sigma=None, degradation_jpeg_quality=None, seed=config.seed
    )
    for a, b in zip(first, make_validation_batches(plain, encode)):
        assert_equal(a, b)
    parts = [list(make_validation_batches(replace(config, train_batch_size=2), encode, i, 2)) for i in range(2)]
    assert_equal(join([parts[0][0], parts[1][0]]), first[0])
    few = make_validation_batches(replace(config, validation_split="validation"), encode)
    assert len(few) == 1 and list(few)[0].images.shape[0] == 4


def test_the_global_random_state_is_left_alone(make_config, encode):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(make_train_batches(make_config(**AUGMENTED, in_memory=False, dataloader_num_workers=1), encode), 2)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
