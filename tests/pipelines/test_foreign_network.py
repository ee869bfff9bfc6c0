"""A network of another family is a stage like this package's own: sampled, saved and composed."""

import inspect

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from foreign_network import ConditionedUNet2D

import diffusers_imagen
from diffusers_imagen import (
    EDMAdamsScheduler,
    EDMHeunScheduler,
    ImagenCascadePipeline,
    ImagenPipeline,
    ImagenSuperResolutionPipeline,
)
from diffusers_imagen.models.interface import StageNetwork
from diffusers_imagen.models.unet_base import ConditionalUNet


@pytest.fixture(autouse=True)
def registered():
    diffusers_imagen.register_network(ConditionedUNet2D)


def make(seed: int = 0, **config) -> ConditionedUNet2D:
    torch.manual_seed(seed)
    return ConditionedUNet2D(**config).eval()


@torch.no_grad()
def test_it_is_sampled_as_a_plain_loop_does(tokenizer, text_encoder, run):
    unet, scheduler = make(text_width=text_encoder.config.hidden_size), EDMAdamsScheduler(clip_sample=True)
    pipe = ImagenPipeline(unet, scheduler, tokenizer, text_encoder)
    embeds, mask, negative, _ = pipe.encode_prompt("a red apple")
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    out = run(pipe, prompt=None, latents=noise, guidance_scale=3.0, num_inference_steps=4, prompt_embeds=embeds,
              prompt_attention_mask=mask)  # fmt: skip
    scheduler.set_timesteps(4)
    sample = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x = scheduler.scale_model_input(sample, timestep)
        without, with_text = (
            unet.unet(x, timestep, e, encoder_attention_mask=mask).sample for e in (negative, embeds)
        )
        sample = scheduler.step(without + 3.0 * (with_text - without), timestep, sample).prev_sample
    torch.testing.assert_close(out.images, sample.clamp(-1, 1), atol=2e-5, rtol=0)


def test_it_is_saved_and_composed(tokenizer, text_encoder, run, tmp_path):
    width = text_encoder.config.hidden_size
    base = ImagenPipeline(make(text_width=width), EDMHeunScheduler(clip_sample=True), tokenizer, text_encoder)
    upscaler = ImagenSuperResolutionPipeline(
        make(1, resolution=32, text_width=width, takes_low_res=True),
        EDMHeunScheduler(clip_sample=True),
        scale_factor=2,
    )
    base.save_pretrained(tmp_path / "base")
    upscaler.save_pretrained(tmp_path / "sr")
    composed = ImagenCascadePipeline.from_stages(tmp_path / "base", tmp_path / "sr")
    assert type(composed.base_unet) is type(composed.sr256_unet) is ConditionedUNet2D
    expected = ImagenCascadePipeline.from_stages(base, upscaler)
    assert [stage.is_base for stage in composed.stages] == [True, False]
    assert torch.equal(run(composed).images, run(expected).images) and run(composed).images.shape[-1] == 32


def test_it_is_not_taken_for_an_untrained_one():
    unet = make()
    assert not unet.zero_initialized() and not unet.is_untrained()
    for parameter in unet.parameters():
        parameter.data.zero_()
    assert not unet.is_untrained()  # nothing tells


def test_its_text_is_encoded_under_the_hook_of_offloading_once():
    calls = []

    class Further(ConditionedUNet2D):  # inherits the method
        pass

    class Mixin:
        def encode_text(self, encoder_hidden_states, encoder_attention_mask=None):
            return encoder_hidden_states, encoder_attention_mask

    class Mixed(Mixin, ConditionedUNet2D):
        pass

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module))
            return args, kwargs

    for network_class in (ConditionedUNet2D, Further, Mixed):
        unet = network_class()
        add_hook_to_module(unet, Counting())
        unet.encode_text(torch.zeros(1, 2, 16))
    assert calls == [ConditionedUNet2D, Further, Mixed]


def test_it_has_one_resolution_unless_it_says_otherwise():
    class Fixed(ConditionedUNet2D):
        at_resolution = StageNetwork.at_resolution

    unet = Fixed(resolution=16)
    assert unet.at_resolution(16) is unet
    with pytest.raises(ValueError, match="`resolution` is 32, but should be 16, the only one of this Fixed"):
        unet.at_resolution(32)


def test_the_interface_has_the_signature_of_forward():
    names = [list(inspect.signature(one.forward).parameters) for one in (StageNetwork, ConditionalUNet)]
    assert names[0] == names[1]
    with pytest.raises(NotImplementedError):
        StageNetwork()(torch.zeros(1, 3, 8, 8), 0)
