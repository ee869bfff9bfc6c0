"""How many images a network is called with at once; that slices change no image."""

import pytest
import torch

from diffusers_imagen.pipelines import slicing
from diffusers_imagen.pipelines.slicing import make_slices, size_of_stage
from diffusers_imagen.pipelines.tiling import Tiling


PROMPTS = ["a red apple", "a blue face", "a tiger", "a red face", "a blue tiger", "a face of a tiger"]


@pytest.mark.parametrize(
    "num_images, size, lengths",
    [(6, 4, [3, 3]), (7, 4, [4, 3]), (8, 4, [4, 4]), (5, 2, [2, 2, 1]), (3, 9, [3]), (3, 1, [1, 1, 1])],
)
def test_slices_are_of_one_length_if_they_can_be(num_images, size, lengths):
    slices = make_slices(num_images, size)
    assert [len(range(num_images)[images]) for images in slices] == lengths
    assert [place for images in slices for place in range(num_images)[images]] == list(range(num_images))


@pytest.mark.parametrize(
    "height, width, tiling, number",
    [
        (64, 64, None, 256),
        (256, 256, None, 16),
        (1024, 1024, None, 1),
        (2048, 1024, None, 1),
        (2048, 1024, Tiling(256, 64), 16),
        (128, 512, Tiling(256, 64), 32),
    ],
)
def test_a_call_has_a_bounded_number_of_pixels(height, width, tiling, number):
    assert size_of_stage(None, "sr256", height, width, tiling) == number
    assert size_of_stage({"base": 3}, "sr256", height, width, tiling) == number
    assert size_of_stage({"sr256": 3}, "sr256", height, width, tiling) == 3
    assert size_of_stage(5, "sr256", height, width, tiling) == 5


def draw(pipe, run) -> dict[int, torch.Tensor]:
    own = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return run(pipe, PROMPTS, generator=own, guidance_scale=[3.0, 1.0], num_inference_steps=[2, 1]).stage_images


def test_the_base_stage_runs_in_one_batch_and_super_resolution_in_slices(cascade, run, count_calls, monkeypatch):
    cascade.disable_slicing()
    whole = draw(cascade, run)
    base, upscaling = count_calls(cascade.base_unet), count_calls(cascade.sr256_unet)

    def sizes() -> tuple[set[int], list[int]]:
        result = set(base), list(upscaling)
        base.clear(), upscaling.clear()
        return result

    for slice_size, expected in [({"sr256": 4}, [3, 3]), ({"sr256": 1}, [1] * 6), ({"base": 9}, [6])]:
        cascade.enable_slicing(slice_size)
        drawn = draw(cascade, run)
        assert sizes() == ({12}, expected)  # both branches of guidance in the base stage
        for resolution, images in drawn.items():
            torch.testing.assert_close(images, whole[resolution], atol=1e-4, rtol=0)
    monkeypatch.setattr(slicing, "PIXELS_AT_ONCE", 2 * 32 * 32)
    cascade.slice_size = type(cascade).slice_size  # as in a new pipeline
    draw(cascade, run)
    assert sizes() == ({12}, [2, 2, 2])
    cascade.disable_slicing()
    draw(cascade, run)
    assert sizes() == ({12}, [6])


@pytest.mark.parametrize(
    "slice_size, message",
    [
        ({}, "`slice_size` is {}, but should be a number, or a dict"),
        ({"sr256": 0}, "`slice_size` is 0"),
        ({"sr512": 1}, r"`slice_size` has \['sr512'\], but should have stage names among \['base', 'sr256'\]"),
        ({"sr1024": 1}, r"`slice_size` has \['sr1024'\]"),  # of another cascade
        ([4], r"`slice_size` is \[4\]"),
    ],
)
def test_other_sizes_are_refused(cascade, slice_size, message):
    with pytest.raises(ValueError, match=message):
        cascade.enable_slicing(slice_size)
    assert cascade.slice_size is None
