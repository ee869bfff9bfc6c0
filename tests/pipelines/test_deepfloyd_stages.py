"""Stages of DeepFloyd IF's kind in this package's pipelines, beside diffusers' own pipelines of IF."""

import pytest
import torch
from deepfloyd_networks import STAGE_1, STAGE_2, TEXT_WIDTH, TOKENS
from diffusers import DDIMScheduler, DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from diffusers.pipelines.deepfloyd_if import pipeline_if_superresolution
from diffusers.utils.torch_utils import randn_tensor
from networks import randomize

from diffusers_imagen import EDMAdamsScheduler, ImagenCascadePipeline, ImagenPipeline, ImagenSuperResolutionPipeline
from diffusers_imagen.conversion.deepfloyd import unet_from_deepfloyd
from diffusers_imagen.diffusion.augmentation import augment_upsampled
from diffusers_imagen.diffusion.continuous_ddpm import log_snr_to_sigma
from diffusers_imagen.diffusion.discrete_ddpm import trained_log_snrs
from diffusers_imagen.pipelines.inputs import per_image_generators


OTHER_PARTS = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
# the noise level of index 250, which IF's super-resolution pipeline has by default: 0.4268
SIGMA_250 = log_snr_to_sigma(trained_log_snrs(1000, "squaredcos_cap_v2", 0.0, 0.0)[250]).item()


def schedule(**kwargs) -> DDPMScheduler:
    """As IF's repositories have it, with fewer steps of training, so that a test's step is not a tenth of all."""
    options = {"variance_type": "learned_range", "thresholding": True, "dynamic_thresholding_ratio": 0.95}
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, sample_max_value=1.5, **options, **kwargs
    )


def seeded(seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed)]


@pytest.fixture
def text() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    embeds, negative = torch.randn(2, 1, TOKENS, TEXT_WIDTH, generator=generator)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}


@pytest.fixture
def masks() -> dict[str, torch.Tensor]:
    """What a tokenizer says of padding, which these networks attend to."""
    mask = (torch.arange(TOKENS) < 3)[None]
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}


def network(config: dict, seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return randomize(UNet2DConditionModel(**config)).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stage_1_is_that_of_diffusers(text, masks):
    unet = network(STAGE_1 | {"block_out_channels": (32, 64, 96, 128)}, 0)
    theirs = quiet(IFPipeline(unet=unet, scheduler=schedule(), **OTHER_PARTS, requires_safety_checker=False))
    ours = quiet(ImagenPipeline(unet_from_deepfloyd(unet), schedule()))
    settings = {"num_inference_steps": 5, "guidance_scale": 7.0, "output_type": "pt"}
    expected = theirs(**text, **settings, height=16, width=16, generator=per_image_generators(seeded(), 1)).images
    images = ours(**text, **masks, **settings, generator=seeded()).images
    torch.testing.assert_close(images * 2 - 1, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1


def test_stage_2_is_that_of_diffusers(text, masks, monkeypatch):
    widths = {"block_out_channels": (32, 64, 64, 96, 128), "layers_per_block": (1, 1, 2, 3, 3)}
    unet = network(STAGE_2 | widths, 1)
    theirs = quiet(
        IFSuperResolutionPipeline(
            unet=unet,
            scheduler=schedule(),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            **OTHER_PARTS,
            requires_safety_checker=False,
        )
    )
    ours = quiet(ImagenSuperResolutionPipeline(unet_from_deepfloyd(unet), schedule(), scale_factor=2))
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    low_res = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(8)) * 2 - 1
    given = iter([noise])  # the first that diffusers draws is the sample's, the second that of the low resolution
    monkeypatch.setattr(pipeline_if_superresolution, "randn_tensor", lambda *a, **kw: draw(given, *a, **kw))
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "pt"}
    generators = per_image_generators(seeded(), 1)
    expected = theirs(
        image=low_res, **text, **settings, height=32, width=32, noise_level=250, generator=generators
    ).images
    images = ours(
        image=low_res, **text, **masks, **settings, latents=noise, low_res_noise_level=SIGMA_250, generator=seeded()
    ).images
    torch.testing.assert_close(images * 2 - 1, expected.clamp(-1, 1), atol=1e-4, rtol=0)


def draw(given, *args, **kwargs) -> torch.Tensor:
    """What is given, as long as there is any, and then fresh noise."""
    found = next(given, None)
    return randn_tensor(*args, **kwargs) if found is None else found


@pytest.mark.parametrize("index", [0, 20, 250, 999])
def test_the_low_resolution_is_diffused_as_ddpm_does(index):
    image, noise = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    alpha_squared = scheduler.alphas_cumprod[index].double()
    noisy, found = augment_upsampled(image, ((1 - alpha_squared) / alpha_squared).sqrt(), noise)
    torch.testing.assert_close(found, torch.full((2,), float(index)), atol=0.02, rtol=0)
    torch.testing.assert_close(noisy, scheduler.add_noise(image, noise, torch.tensor([index])), atol=1e-5, rtol=0)


def test_a_scheduler_that_reads_a_variance_needs_a_network_that_predicts_one(base_pipeline, run):
    base_pipeline.scheduler = schedule()
    with pytest.raises(ValueError, match="`variance_type` is 'learned_range', but the network predicts no variance"):
        run(base_pipeline)


def test_one_cascade_has_stages_of_both_kinds(text, masks, base_unet, tokenizer, text_encoder, run):
    """Our networks get what they get alone, and IF's the embeddings at padded positions and those of the empty text."""
    width = text_encoder.config.hidden_size
    config = {**STAGE_2, "encoder_hid_dim": width, "cross_attention_dim": 64}
    upscaler = unet_from_deepfloyd(network(config, 1))
    scheduler = EDMAdamsScheduler.from_config(schedule().config)
    mixed = quiet(ImagenCascadePipeline(base_unet, EDMAdamsScheduler(), tokenizer, text_encoder, upscaler, scheduler))
    alone = quiet(ImagenPipeline(base_unet, EDMAdamsScheduler(), tokenizer, text_encoder))
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    out = run(mixed, **options)
    assert torch.equal(out.stage_images[16], run(alone, **options).images)
    embeds, mask, negative, _ = mixed.encode_prompt("a red apple")
    assert embeds[~mask].abs().min() > 0  # not zero at padded positions
    assert torch.equal(negative, mixed.encode_prompt("")[0])
    enlarge = quiet(ImagenSuperResolutionPipeline(upscaler, scheduler, tokenizer, text_encoder, scale_factor=2))
    image = torch.rand(1, 3, 16, 16)
    images = [
        enlarge(prompt, image=image, generator=seeded()[0], output_type="pt", negative_prompt=other, **options).images
        for prompt, other in (("a red apple", None), ("a red apple", ""))
    ]
    assert torch.equal(*images)


def test_no_text_has_to_be_given_where_nothing_encodes_it(text, masks):
    pipe = quiet(
        ImagenPipeline(unet_from_deepfloyd(network(STAGE_1, 0)), EDMAdamsScheduler.from_config(schedule().config))
    )
    with pytest.raises(
        ValueError, match="`negative_prompt_embeds` is None, but should be the embeddings of the empty"
    ):
        pipe(prompt_embeds=text["prompt_embeds"], prompt_attention_mask=masks["prompt_attention_mask"])


def test_tiles_and_slices_take_six_channels(text, masks):
    unet = unet_from_deepfloyd(network(STAGE_2, 1))
    pipe = quiet(ImagenSuperResolutionPipeline(unet, schedule(), scale_factor=2))
    arguments = {
        **text, **masks, "image": torch.rand(1, 3, 16, 16), "num_inference_steps": 2, "output_type": "pt",
    }  # fmt: skip
    whole = pipe(**arguments, generator=seeded()[0]).images
    pipe.enable_tiling(32, 0)  # one tile of the image's size
    pipe.enable_slicing(1)
    torch.testing.assert_close(pipe(**arguments, generator=seeded()[0]).images, whole, atol=1e-5, rtol=0)
    pipe.enable_tiling(16, 0)
    assert pipe(**arguments, generator=seeded()[0]).images.isfinite().all()


def test_ddim_of_diffusers_runs_unchanged(text, masks):
    unet = network(STAGE_1, 0)
    scheduler = DDIMScheduler.from_config(schedule().config, thresholding=False, clip_sample=False)
    plain = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    plain.register_to_config(variance_type="fixed_small")  # which diffusers' pipeline asks for
    theirs = quiet(IFPipeline(unet=unet, scheduler=plain, **OTHER_PARTS, requires_safety_checker=False))
    ours = quiet(ImagenPipeline(unet_from_deepfloyd(unet), scheduler))  # `variance_type` of DDPM is left in it
    settings = {"num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "pt"}
    expected = theirs(**text, **settings, height=16, width=16, generator=per_image_generators(seeded(), 1)).images
    images = ours(**text, **masks, **settings, generator=seeded()).images
    torch.testing.assert_close((images * 2 - 1).clamp(-1, 1), expected.clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("output_resolution", [16, 32])
def test_embeddings_alone_serve_stages_of_both_kinds(base_unet, tokenizer, text_encoder, run, output_resolution):
    """Without an encoder too, networks that mask padding read zeros there."""
    width = text_encoder.config.hidden_size
    upscaler = unet_from_deepfloyd(network({**STAGE_2, "encoder_hid_dim": width}, 1))
    scheduler = EDMAdamsScheduler.from_config(schedule().config)
    mixed = quiet(ImagenCascadePipeline(base_unet, EDMAdamsScheduler(), tokenizer, text_encoder, upscaler, scheduler))
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    given = dict(zip(names, mixed.encode_prompt("a red apple", "a cat")))
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_resolution": output_resolution}
    expected = run(mixed, "a red apple", negative_prompt="a cat", **options).stage_images
    mixed.text_encoder = mixed.tokenizer = None
    images = run(mixed, prompt=None, **given, **options).stage_images
    assert images.keys() == expected.keys()
    assert all(torch.equal(images[resolution], expected[resolution]) for resolution in images)
