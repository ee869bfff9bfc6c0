"""Callbacks of diffusers and of callers: what they take, what they may return."""

import pytest
import torch
from diffusers.callbacks import (
    MultiPipelineCallbacks,
    PipelineCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

from diffusers_imagen import EDMHeunScheduler


class Recorder(PipelineCallback):
    tensor_inputs = ["latents", "prompt_embeds"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.seen = getattr(self, "seen", []) + [sorted(callback_kwargs)]
        return callback_kwargs


def test_the_tensor_inputs_of_diffusers_callbacks_are_taken(cascade, run):
    expected, recorder = run(cascade).images, Recorder()
    assert torch.equal(run(cascade, callback_on_step_end=recorder).images, expected)
    assert recorder.seen == [["latents", "prompt_embeds"]] * 6


def test_a_cutoff_of_guidance_by_diffusers_turns_it_off(cascade, run, count_calls):
    calls = count_calls(cascade.base_unet)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    out = run(cascade, callback_on_step_end=MultiPipelineCallbacks([cutoff, Recorder()]), guidance_scale=3.0)
    assert calls == [2, 2, 1]

    def by_hand(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0

    assert torch.equal(out.images, run(cascade, callback_on_step_end=by_hand, guidance_scale=3.0).images)


def test_a_callback_sees_the_predicted_clean_image_and_does_not_change_it(cascade, run):
    expected, seen = run(cascade), []

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["pred_original_sample"].clone())
        return {"pred_original_sample": torch.zeros_like(seen[-1])}

    names = ["latents", "pred_original_sample"]
    out = run(cascade, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(out.images, expected.images)
    resolutions = [tensor.shape[-1] for tensor in seen]
    assert resolutions == sorted(resolutions) and set(resolutions) == set(expected.stage_images)
    for resolution, images in expected.stage_images.items():
        last = [tensor for tensor in seen if tensor.shape[-1] == resolution][-1]
        # the last step of every scheduler ends at its prediction
        torch.testing.assert_close(last.clamp(-1, 1), images)


def test_schedulers_that_do_not_return_the_predicted_image_have_none(cascade, run):
    seen, step = [], type(cascade.base_scheduler).step

    class Silent(type(cascade.base_scheduler)):
        def step(self, *args, **kwargs):
            return step(self, *args, **kwargs)[:1]

    for name in ("base_scheduler", "sr256_scheduler"):
        setattr(cascade, name, Silent.from_config(getattr(cascade, name).config))
    run(
        cascade,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors["pred_original_sample"]),
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
    )
    assert seen and all(predicted is None for predicted in seen)


CALLBACKS = {
    "no callable": (3, ["latents"], "`callback_on_step_end` is 3"),
    "a callback of diffusers without tensors": (
        PipelineCallback(),
        ["latents"],
        "PipelineCallback, without `tensor_inputs`",
    ),
    "tensors of other pipelines": (
        SDXLCFGCutoffCallback(),
        ["latents"],
        "`tensor_inputs` of `callback_on_step_end` has",
    ),
    "one name": (None, "latents", "`callback_on_step_end_tensor_inputs` is 'latents'"),
    "no names": (None, None, "`callback_on_step_end_tensor_inputs` is None"),
    "names that are lists": (None, [["latents"]], "`callback_on_step_end_tensor_inputs` is [['latents']]"),
}


@pytest.mark.parametrize("function, names, message", CALLBACKS.values(), ids=CALLBACKS)
def test_callbacks_are_checked_before_any_network_runs(cascade, run, count_calls, function, names, message):
    calls = count_calls(cascade.text_encoder) + count_calls(cascade.base_unet)
    with pytest.raises(ValueError) as error:
        run(cascade, callback_on_step_end=function, callback_on_step_end_tensor_inputs=names)
    assert message in str(error.value) and calls == []


RETURNED = {
    "no dict": (["latents"], "`callback_on_step_end` returned ['latents']"),
    "latents of another shape": ({"latents": torch.zeros(1, 3, 8, 8)}, "returned `latents` as a Tensor of shape"),
    "no tensor": ({"latents": 3}, "returned `latents` as 3"),
    "complex latents": ({"latents": torch.zeros(1, 3, 16, 16) + 1j}, "returned `latents`"),
    "text for fewer images": (
        {"prompt_embeds": torch.zeros(0, 8, 16)},
        "returned `prompt_embeds` as a Tensor of shape",
    ),
}


@pytest.mark.parametrize("returned, message", RETURNED.values(), ids=RETURNED)
def test_what_a_callback_returns_takes_the_place_of_what_it_got(cascade, run, returned, message):
    with pytest.raises(ValueError) as error:
        run(cascade, callback_on_step_end=lambda *_: returned)
    assert message in str(error.value)


@pytest.fixture
def residual_cascade(cascade):
    """The cascade with a super-resolution stage that denoises residuals."""
    unet = cascade.sr256_unet
    cascade.sr256_unet = type(unet).from_config({**unet.config, "residual_scale": 0.25})
    cascade.sr256_unet.load_state_dict(unet.state_dict())
    cascade.sr256_scheduler = EDMHeunScheduler()
    return cascade


@pytest.mark.parametrize("returns", [True, False])
@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "negative_prompt_embeds"])
def test_a_change_in_place_is_that_of_a_new_tensor(residual_cascade, run, name, returns):
    def in_place(pipe, step, timestep, tensors):
        tensors[name][..., :4] = 0.5
        return tensors if returns else None

    def replaced(pipe, step, timestep, tensors):
        changed = tensors[name].clone()
        changed[..., :4] = 0.5
        return {name: changed}

    options = {"callback_on_step_end_tensor_inputs": [name], "guidance_scale": 2.0}
    expected = run(residual_cascade, callback_on_step_end=replaced, **options).stage_images
    found = run(residual_cascade, callback_on_step_end=in_place, **options).stage_images
    plain = run(residual_cascade, guidance_scale=2.0).stage_images
    for resolution, images in expected.items():
        assert torch.equal(found[resolution], images) and not torch.equal(plain[resolution], images)
    looks = run(residual_cascade, callback_on_step_end=lambda *given: given[-1], **options).stage_images
    assert all(torch.equal(looks[resolution], images) for resolution, images in plain.items())


def test_guidance_that_a_callback_sets_is_a_number(cascade, run):
    with pytest.raises(ValueError, match="`callback_on_step_end` set `_guidance_scale` to 'high'"):
        run(cascade, callback_on_step_end=lambda pipe, *_: setattr(pipe, "_guidance_scale", "high"))


def test_a_callback_keeps_the_dict_that_it_returned(cascade, run):
    kept = {"latents": torch.zeros(1, 3, 16, 16)}
    run(cascade, output_resolution=16, callback_on_step_end=lambda *_: kept)
    assert list(kept) == ["latents"]
