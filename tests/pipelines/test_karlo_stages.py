"""Karlo's super-resolution networks in this package's pipelines, beside diffusers' UnCLIPPipeline."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UnCLIPPipeline, UnCLIPScheduler, UNet2DModel
from networks import randomize

from diffusers_imagen import (
    ContinuousDDPMScheduler,
    EDMAdamsScheduler,
    EDMHeunScheduler,
    ImagenCascadePipeline,
    ImagenSuperResolutionPipeline,
)
from diffusers_imagen.conversion.karlo import unet_from_karlo


PAGE = Path(__file__).parents[2] / "docs" / "deepfloyd.md"
SIDE, SMALL = 32, 8


class ToldDDIM(DDIMScheduler):
    """Takes the next timestep, of which UnCLIPPipeline tells its schedulers, and which DDIM knows by itself."""

    def step(self, *args, prev_timestep=None, **kwargs):
        return super().step(*args, **kwargs)


class SuperResolution(UnCLIPPipeline):
    """The last part of UnCLIPPipeline: what comes before it takes no steps, and leaves the image as it is given."""

    _execution_device = torch.device("cpu")

    def __init__(self, network, scheduler):
        nothing = SimpleNamespace(timesteps=torch.empty(0), set_timesteps=lambda *a, **kw: None, init_noise_sigma=1.0)
        self.prior_scheduler = self.decoder_scheduler = nothing
        self.prior = SimpleNamespace(config=SimpleNamespace(embedding_dim=4), post_process_latents=lambda x: x)
        self.text_proj = lambda **kwargs: (torch.zeros(1, 3, 4), None)
        self.text_proj.clip_extra_context_tokens = 0
        self.decoder = SimpleNamespace(config=SimpleNamespace(in_channels=3, sample_size=SMALL))
        self.super_res_first = self.super_res_last = network
        self.super_res_scheduler = scheduler
        self.set_progress_bar_config(disable=True)

    def maybe_free_model_hooks(self):
        pass

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


@pytest.fixture
def network() -> UNet2DModel:
    """Of the kind that diffusers' script for Karlo's checkpoints makes."""
    return randomize(
        UNet2DModel(
            sample_size=SIDE,
            in_channels=6,
            out_channels=3,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            resnet_time_scale_shift="scale_shift",
            add_attention=False,
        )
    )


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, SMALL, SMALL, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def make(network: UNet2DModel, scheduler, scale_factor: int = SIDE // SMALL) -> ImagenSuperResolutionPipeline:
    pipe = ImagenSuperResolutionPipeline(unet_from_karlo(network), scheduler, scale_factor=scale_factor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def enlarge_as_unclip(network: UNet2DModel, image: torch.Tensor, noise: torch.Tensor, scheduler, steps: int):
    """UnCLIPPipeline's super-resolution, with one network for all steps; values in [0, 1]."""
    images = SuperResolution(network, scheduler)(
        text_model_output=(torch.zeros(1, 4), torch.zeros(1, 3, 4)),
        text_attention_mask=torch.ones(1, 3, dtype=torch.bool),
        prior_latents=torch.zeros(1, 4),
        prior_guidance_scale=1.0,
        decoder_guidance_scale=1.0,
        decoder_latents=image,
        super_res_latents=noise,
        super_res_num_inference_steps=steps,
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_the_first_network_alone_draws_what_unclip_does(network, image, noise):
    options = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
    expected = enlarge_as_unclip(network, image, noise, ToldDDIM(**options), steps=7)
    pipe = make(network, DDIMScheduler(**options))
    arguments = {"image": image, "latents": noise, "num_inference_steps": 7, "output_type": "pt"}
    images = pipe(**arguments).images
    assert expected.std() > 0.1
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    pipe.unet.register_to_config(low_res_upsampling="bicubic")  # another kernel: -0.75 in the place of -0.5
    assert (pipe(**arguments).images - expected).abs().max() > 1e-2


@pytest.mark.parametrize("ours", [EDMAdamsScheduler, EDMHeunScheduler, ContinuousDDPMScheduler])
@pytest.mark.parametrize("live", [True, False])
def test_unclips_configuration_has_discrete_betas(ours, live, tmp_path):
    theirs = UnCLIPScheduler(clip_sample_range=1.5)
    theirs.save_pretrained(tmp_path)
    scheduler = ours.from_config(theirs.config) if live else ours.from_pretrained(tmp_path)
    config = scheduler.config
    assert (config.preconditioning, config.beta_schedule) == ("discrete", "squaredcos_cap_v2")
    assert (config.clip_sample, config.clip_sample_range) == (True, 1.5)
    same = ours.from_config(
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, clip_sample_range=1.5).config
    )
    for each in (scheduler, same):
        each.set_timesteps(5)
    assert torch.equal(scheduler.timesteps, same.timesteps)
    back = UnCLIPScheduler.from_config(config)
    assert {key: back.config[key] for key in theirs.config if key[0] != "_"} == {
        key: value for key, value in theirs.config.items() if key[0] != "_"
    }


def test_unclips_own_scheduler_is_refused_before_any_step(network, image):
    pipe = make(network, UnCLIPScheduler())
    with pytest.raises(
        ValueError, match="`sr256`, of class UnCLIPScheduler, is not supported: its `step` .*EDMAdamsScheduler"
    ) as e:
        pipe(image=image, num_inference_steps=3)
    assert "\n" not in str(e.value)


def test_the_pages_code_enlarges(network, image, tmp_path):
    section = PAGE.read_text(encoding="utf-8").partition("## Karlo")[2]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    network.save_pretrained(tmp_path / "super_res_first")
    UnCLIPScheduler().save_pretrained(tmp_path / "super_res_scheduler")
    names = {"image": image}
    exec(compile(code.replace('"kakaobrain/karlo-v1-alpha"', repr(str(tmp_path))), PAGE.name, "exec"), names)
    assert names["images"][0].size == (SIDE, SIDE)


def test_a_cascade_ends_in_it(network, base_unet, tokenizer, text_encoder, run):
    scheduler = EDMAdamsScheduler.from_config(UnCLIPScheduler().config)
    pipe = ImagenCascadePipeline(
        base_unet, EDMAdamsScheduler(), tokenizer, text_encoder, unet_from_karlo(network), scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    images = run(pipe, num_inference_steps=2).stage_images
    assert images[SIDE].isfinite().all() and images[SIDE].shape[-1] == SIDE
