"""A network of another family is a stage like this package's own: sampled, saved and composed."""

import pytest
import torch
from foreign_network import ConditionedUNet2D

import diffusers_imagen
from diffusers_imagen import (
    EDMAdamsScheduler,
    EDMHeunScheduler,
    ImagenCascadePipeline,
    ImagenPipeline,
    ImagenSuperResolutionPipeline,
)


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
