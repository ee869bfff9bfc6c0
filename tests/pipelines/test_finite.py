"""What is not finite in a stage ends the call with the stage and the likely cause, and nothing is returned."""

import math
from copy import deepcopy

import pytest
import torch

from diffusers_imagen import EDMAdamsScheduler, EDMHeunScheduler


def spoil(module: torch.nn.Module, name: str, value: float = math.nan) -> None:
    with torch.no_grad():
        module.get_parameter(name).flatten()[0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("stage", ["base", "sr256"])
def test_a_weight_that_is_not_finite_is_named_with_its_stage(cascade, run, stage, value):
    spoil(getattr(cascade, f"{stage}_unet"), "conv_out.weight", value)
    with pytest.raises(FloatingPointError, match=rf"`{stage}`.* first in call 1 of 3: the weight `conv_out.weight`"):
        run(cascade)


# dynamic thresholding and clamping make finite numbers of infinite ones: what is asked is the prediction before them
@pytest.mark.parametrize("settings", [{"clip_sample": True}, {"thresholding": True}, {}])
@pytest.mark.parametrize("scheduler_class", [EDMHeunScheduler, EDMAdamsScheduler])
def test_thresholding_hides_nothing(base_pipeline, run, scheduler_class, settings):
    base_pipeline.scheduler = scheduler_class(**settings)
    spoil(base_pipeline.unet, "conv_out.bias", math.inf)
    with pytest.raises(FloatingPointError, match="the weight `conv_out.bias` of its network `unet` is not finite"):
        run(base_pipeline, guidance_scale=1.0)


def test_activations_that_overflow_are_told_from_weights(base_pipeline, run):
    with torch.no_grad():
        base_pipeline.unet.conv_out.weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match="whose weights are finite, overflow in torch.float32"):
        run(base_pipeline)
    base_pipeline.unet.to(torch.float16)
    with torch.no_grad():
        base_pipeline.unet.conv_out.weight.fill_(6e4)
    with pytest.raises(FloatingPointError, match="overflow in torch.float16: load it in torch.bfloat16 or"):
        run(base_pipeline)


def test_the_network_that_guides_is_told_from_the_guided_one(base_pipeline, run):
    base_pipeline.guidance_unet = deepcopy(base_pipeline.unet)
    spoil(base_pipeline.guidance_unet, "conv_in.bias")
    with pytest.raises(FloatingPointError, match="`conv_in.bias` of its network `guidance_unet` is not finite"):
        run(base_pipeline, guidance_scale=2.0)
    assert run(base_pipeline, guidance_scale=1.0).images.isfinite().all()  # which does not run it


def test_what_a_callback_spoils_is_its_own(cascade, run):
    def latents(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * (math.nan if step == 4 else 1)}

    with pytest.raises(FloatingPointError, match="`sr256`.* in call 2 of 3: `callback_on_step_end` returned"):
        run(cascade, callback_on_step_end=latents)

    def guidance(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1e308

    with pytest.raises(FloatingPointError, match=r"`base`.* in call 2 of 3: guidance with the scale 1e\+308"):
        run(cascade, callback_on_step_end=guidance, guidance_scale=2.0)

    def text(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * math.nan}

    with pytest.raises(FloatingPointError, match="in call 2 of 3: `prompt_embeds`, the embeddings of the text"):
        run(cascade, callback_on_step_end=text, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_guidance_beyond_floating_point_is_refused_with_its_stage(cascade, run):
    with pytest.raises(ValueError, match=r"`guidance_scale` is 1e\+308 for the stage `sr256`"):
        run(cascade, guidance_scale=[1.0, 1e308])


def test_the_device_is_asked_once_a_stage(cascade, run, monkeypatch):
    asked = []
    original = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: asked.append(1) or original(tensor))
    run(cascade, num_inference_steps=2)
    few = len(asked)
    asked.clear()
    run(cascade, num_inference_steps=9)
    assert len(asked) == few


def test_a_text_encoder_with_nan_is_refused_with_the_weights_name(cascade, run):
    spoil(cascade.text_encoder, "embeddings.LayerNorm.weight")
    with pytest.raises(ValueError, match="`text_encoder`.*not finite.* its weight `embeddings.LayerNorm.weight`"):
        run(cascade)
