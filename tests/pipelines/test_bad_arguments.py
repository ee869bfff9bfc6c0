"""Single faults in every argument of the pipelines: a ValueError that names it, before any network runs."""

import decimal
import io
import math
import threading

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm


HUGE = 10**400  # beyond floating point
NO_NUMBERS = [math.nan, math.inf, -math.inf, -1, True, "3", b"3", [], {}, 2j, decimal.Decimal(3), HUGE, -(10**5000)]
NO_NUMBERS += [
    np.float64("nan"),
    np.bool_(True),
    np.array([1, 2]),
    torch.tensor([1, 2]),
    object(),
    [math.nan],
    range(2),
]
TEXT = {"prompt": None, "prompt_embeds": torch.zeros(1, 8, 16), "prompt_attention_mask": torch.ones(1, 8)}
NEGATIVE = {
    "negative_prompt_embeds": torch.zeros(1, 8, 16),
    "negative_prompt_attention_mask": torch.ones(1, 8),
}


def no_tensors(*shape: int) -> list:
    """What is no dense, finite tensor in floating point of this shape."""
    zeros = torch.zeros(shape)
    dtypes = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    tensors = [zeros.to(dtype) for dtype in dtypes] + [zeros.to("meta"), zeros.to_sparse(), zeros * math.nan]
    tensors += [torch.zeros(()), torch.zeros(0), zeros[0], zeros[:0], torch.full(shape, math.inf)]
    return [np.zeros(shape), zeros.tolist(), "a.pt", 3, object(), torch.nested.nested_tensor([zeros[0]]), *tensors]


NO_MASKS = [value for value in no_tensors(1, 8) if getattr(value, "dtype", None) not in (torch.int64, torch.bool)]
NO_MASKS += [torch.full((1, 8), 2.0), torch.ones(1, 7), torch.ones(2, 8)]
NO_LEVELS = [math.nan, "a", 3, [math.nan], ["80"], [[80.0]], [], [None], [True], [1.0, 80.0], [2.0, 2.0], [HUGE], [2j]]
NO_LEVELS += [[80.0] * 20_000, np.array([[80.0]]), np.array(["a"]), torch.tensor(3.0), torch.ones(1, device="meta")]
NO_PROMPTS = [
    3,
    b"a",
    ["a", b"b"],
    (),
    ("a",),
    [],
    [None],
    [["a"]],
    {"a": 1},
    np.array(["a"]),
    "a" * 200_000,
    "\ud800",
]
NO_PROMPTS += [["a"] * 20_000]
COUNTS = [*NO_NUMBERS, 0, 0.5, 10**9, "many", (1, 2, 3)]
FAULTS = {
    "num_inference_steps": [*COUNTS, [None, 1]],
    "num_images_per_prompt": COUNTS + [None, 100_000_000],
    "num_resample_times": COUNTS + [None],
    "height": COUNTS + [32.0],
    "width": COUNTS + [32.0],
    "output_resolution": COUNTS + [16.0],
    "guidance_scale": [*NO_NUMBERS, 1e308, [1.0, None]],
    "guidance_rescale": [*NO_NUMBERS, [None, 0.5], 1.5],
    "low_res_noise_level": [*NO_NUMBERS, 0, 1e300],
    "strength": [*NO_NUMBERS, 1.5],
    "guidance_interval": [math.nan, (math.nan, 1), (1,), ("a", "b"), (2, 1), (-1, 1), (2j, 1), np.array([0.0, 1.0])],
    "sigmas": [{"base": levels} for levels in NO_LEVELS] + [[80.0, 1.0], {"base": [1e308, 1.0]}, {"base": [1e-320]}],
    "timesteps": [{"base": levels} for levels in NO_LEVELS[:-6]] + [{"base": [80.0, 1.0]}],
    "prompt": NO_PROMPTS,
    "negative_prompt": NO_PROMPTS[:-1],
    "prompt_embeds": no_tensors(1, 8, 16),
    "negative_prompt_embeds": no_tensors(1, 8, 16),
    "prompt_attention_mask": NO_MASKS,
    "negative_prompt_attention_mask": NO_MASKS,
    "latents": no_tensors(1, 3, 16, 16),
    "generator": [(torch.Generator(),), [None], [], "seed", 0, np.random.default_rng(0), [torch.Generator(), "a"]],
    "output_type": ["gif", None, 3, [], ["pil"], b"pil", np.array(["pil"])],
    "return_dict": ["yes", None, 1, [], np.array([True, False])],
}


def arguments_for(name: str, value) -> dict:
    """A call in which nothing but this argument is wrong."""
    arguments = {"num_inference_steps": 2, "generator": torch.Generator()}
    if name == "strength":
        arguments["image"] = torch.zeros(1, 3, 16, 16)
    if "embeds" in name or "mask" in name:
        arguments.update(NEGATIVE if name.startswith("negative") else TEXT)
    return {**arguments, name: value}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_an_argument_is_named_before_any_network_runs(cascade, count_calls, name):
    calls = [count_calls(module) for module in (cascade.text_encoder, cascade.base_unet, cascade.sr256_unet)]
    for value in FAULTS[name]:
        with pytest.raises(ValueError) as error:
            cascade(**{"prompt": "a red apple", **arguments_for(name, value)})
        assert f"`{name}" in str(error.value) and len(str(error.value)) < 700
    assert calls == [[], [], []]


@pytest.mark.parametrize("name", ["num_inference_steps", "guidance_scale", "low_res_noise_level", "sigmas", "latents"])
def test_single_stages_check_what_the_cascade_checks(base_pipeline, sr_pipeline, count_calls, name):
    for pipe in (base_pipeline, sr_pipeline):
        if pipe is base_pipeline and name == "low_res_noise_level":
            continue
        calls = count_calls(pipe.unet)
        extra = {"image": torch.zeros(1, 3, 16, 16)} if pipe is sr_pipeline else {}
        for value in NO_LEVELS if name == "sigmas" else FAULTS[name]:
            with pytest.raises(ValueError, match=f"`{name}"):
                pipe(**{"prompt": "a red apple", "num_inference_steps": 1, **extra, name: value})
        assert calls == []


def test_numbers_of_numpy_are_numbers(cascade, run):
    expected = run(cascade, num_inference_steps=2, guidance_scale=2.0, height=64, num_images_per_prompt=1).images
    numbers = {"num_inference_steps": np.int64(2), "guidance_scale": np.float32(2), "height": np.int32(64)}
    assert torch.equal(run(cascade, **numbers, num_images_per_prompt=np.uint8(1)).images, expected)
    levels = [run(cascade, sigmas={"base": kind([80.0, 1.0])}).images for kind in (list, np.array, torch.tensor)]
    assert torch.equal(levels[0], levels[1]) and torch.equal(levels[0], levels[2])


def test_the_pixels_of_a_call_are_bounded(cascade):
    with pytest.raises(ValueError, match="`height` and `width` are 32768 and 65536 for 1 images.* at most 1073741824"):
        cascade("a red apple", height=32768, width=65536)
    with pytest.raises(ValueError, match="`num_images_per_prompt` is 6000 for 2 prompts.* at most 10000 images"):
        cascade(["a", "red"], num_images_per_prompt=6000)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "prompt_embeds", "prompt_attention_mask"])
def test_encode_prompt_checks_by_itself(cascade, count_calls, name):
    calls = count_calls(cascade.text_encoder)
    given = TEXT if name.startswith("prompt_") else {"prompt": "a red apple"}
    for value in FAULTS[name]:
        with pytest.raises(ValueError, match=f"`{name}"):
            cascade.encode_prompt(**{**given, name: value})
    assert calls == []


def test_sizes_of_tiles_and_slices_are_whole_numbers(base_pipeline, cascade):
    for value in [*NO_NUMBERS, 0.5, None]:
        with pytest.raises(ValueError, match="`slice_size`"):
            cascade.enable_slicing(value)
        for pipe in (base_pipeline, cascade):
            with pytest.raises(ValueError, match="`tile_size`"):
                pipe.enable_tiling(tile_size=value, overlap=0)
            with pytest.raises(ValueError, match="`overlap`"):
                pipe.enable_tiling(tile_size=64, overlap=value)
            assert pipe.tiling is None


@pytest.mark.parametrize("arguments", [{"nonsense": 1}, {"total": 5}, {"ncols": "a"}, {"file": 3}, {"desc": 3}])
def test_a_progress_bar_is_refused_before_a_call(cascade, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        cascade.set_progress_bar_config(**arguments)
    other = threading.Thread(target=lambda: next(iter(tqdm([1], file=io.StringIO()))), daemon=True)
    other.start()
    other.join(30)
    assert not other.is_alive()  # the refused bar has left the lock of all bars free
    cascade.set_progress_bar_config(disable=True, leave=False)
