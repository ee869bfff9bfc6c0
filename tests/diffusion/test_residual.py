"""The space of residuals: its formula, and a stage that is sampled and trained in it."""

import pytest
import torch

from diffusers_imagen import EDMAdamsScheduler, EfficientUNetModel, ImagenSuperResolutionPipeline
from diffusers_imagen.diffusion.augmentation import upsample_before_noise, upsample_low_res
from diffusers_imagen.diffusion.residual import SampleSpace
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import Batch
from diffusers_imagen.training.objective.losses import Conditioning, denoising_loss, to_device
from diffusers_imagen.training.objective.objectives import make_objective
from diffusers_imagen.training.objective.step_draws import StepDraws
from tests.helpers.networks import randomize


SCALE = 0.25
CONFIG = {"sample_size": 32, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_types": (None, None)}
CONFIG |= {"norm_num_groups": 4, "encoder_hid_dim": None, "residual_scale": SCALE}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def unet():
    return randomize(EfficientUNetModel(**CONFIG))


@pytest.fixture
def pipe(unet):
    pipe = ImagenSuperResolutionPipeline(unet=unet, scheduler=EDMAdamsScheduler(), tokenizer=None, text_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def low_res():
    return torch.rand(1, 3, 8, 8, generator=seeded(3))


def test_a_residual_is_the_scaled_difference():
    images, upsampled = torch.full((1, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), 0.25)
    space = SampleSpace(upsampled, 0.125)
    assert space.encode(images).unique().tolist() == [2.0]
    assert space.decode(torch.full((1, 3, 2, 2), -2.0)).unique().tolist() == [0.0]
    assert SampleSpace().encode(images) is images and SampleSpace().decode(images) is images


def expected_images(unet, low_res, noise, steps):
    """The loop written out: residuals from noise, then the enlarged image added."""
    scheduler = EDMAdamsScheduler()
    scheduler.set_timesteps(steps)
    upsampled = upsample_low_res(low_res * 2 - 1, (32, 32)).expand_as(noise)
    sample = noise * scheduler.init_noise_sigma
    seen = []
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, timestep)
        output = unet(model_input, timestep, low_res_sample=upsampled).sample
        sample = scheduler.step(output, timestep, sample).prev_sample
        seen.append(upsampled + SCALE * sample)
    return seen


@torch.no_grad()
def test_a_pipeline_adds_the_enlarged_image_to_the_sample(pipe, unet, low_res):
    noise = torch.stack([torch.randn(3, 32, 32, generator=seeded(seed)) for seed in (5, 6)])
    seen = []

    def see(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])

    arguments = {"image": low_res, "num_images_per_prompt": 2, "num_inference_steps": 3, "output_type": "pt"}
    images = pipe(**arguments, latents=noise, callback_on_step_end=see).images
    expected = expected_images(unet, low_res, noise, 3)
    torch.testing.assert_close(images, expected[-1].clamp(-1, 1) / 2 + 0.5, atol=2e-6, rtol=0)
    for own, image in zip(seen, expected):  # a callback sees images, with noise
        torch.testing.assert_close(own, image, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_callback_changes_the_image(pipe, low_res):
    target = torch.rand(1, 3, 32, 32, generator=seeded(4)) * 2 - 1

    def replace(pipe, step, timestep, tensors):
        return {"latents": target} if step == 2 else {}

    images = pipe(image=low_res, num_inference_steps=3, output_type="pt", callback_on_step_end=replace).images
    torch.testing.assert_close(images, target / 2 + 0.5, atol=1e-6, rtol=0)


@torch.no_grad()
def test_pixels_outside_of_the_mask_are_kept(cascade, unet):
    cascade.sr256_unet, cascade.sr256_scheduler = unet, EDMAdamsScheduler()
    image, mask = torch.rand(1, 3, 32, 32, generator=seeded(8)), torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    given = {"image": image, "mask_image": mask, "output_type": "pt", "num_inference_steps": 2}
    painted = cascade("a red apple", **given, generator=seeded()).images
    torch.testing.assert_close(painted[..., :16], image[..., :16], atol=1e-5, rtol=0)
    assert (painted[..., 16:] - image[..., 16:]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["clip_sample", "thresholding"])
def test_schedulers_that_clip_images_are_refused(pipe, low_res, name):
    pipe.scheduler = EDMAdamsScheduler(**{name: True})
    with pytest.raises(ValueError, match=f"`{name}` True, but its network denoises residuals.*{name}=False"):
        pipe(image=low_res)


def test_the_loss_is_that_of_the_residuals(unet):
    images, low_res = torch.rand(4, 3, 32, 32, generator=seeded(1)), torch.rand(4, 3, 8, 8, generator=seeded(2))
    config = TrainingConfig(preset="emoji_sr_256", noise_conditioning_augmentation=0)
    objective = make_objective(config)
    draws = StepDraws(objective, 0)
    draws.begin(0, 0, 4)
    batch = Batch(images, low_res, None, None)
    drawn = draws(0, batch)
    loss = denoising_loss(unet, batch, drawn, objective, config, Conditioning.of(unet))
    residuals = batch._replace(images=(images - upsample_low_res(low_res, (32, 32))) / SCALE)
    plain = denoising_loss(unet, residuals, drawn, objective, config)
    torch.testing.assert_close(loss, plain)
    assert (loss - denoising_loss(unet, batch, drawn, objective, config)).abs().max() > 0.1


@pytest.mark.parametrize("preconditioning", ["edm", "variance_preserving", "discrete"])
def test_a_trained_stage_samples_residuals(unet, pipe, low_res, preconditioning):
    config = TrainingConfig(preset="emoji_sr_256", preconditioning=preconditioning)
    pipe.scheduler = make_objective(config).scheduler_for(unet)
    assert pipe.scheduler.config.sigma_data == config.sigma_data
    images = pipe(image=low_res, num_inference_steps=2, output_type="latent", generator=seeded()).images
    assert images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "0.2"])
def test_a_scale_is_a_number_above_zero(value):
    with pytest.raises(ValueError, match="`residual_scale` is .*, but should be None or a finite number above 0"):
        EfficientUNetModel(**{**CONFIG, "residual_scale": value})


def test_only_super_resolution_has_residuals():
    with pytest.raises(
        ValueError, match="`residual_scale` is 0.25, but should be None but with `low_res_conditioning`"
    ):
        EfficientUNetModel(**CONFIG, low_res_conditioning=False)


class DiscreteUNet(EfficientUNetModel):
    """A network whose low-resolution image is upsampled before it gets its noise."""

    @property
    def low_res_augmentation(self):
        return "discrete"


@torch.no_grad()
def test_the_upsampled_image_is_that_of_the_network(low_res):
    unet = randomize(DiscreteUNet(**CONFIG, low_res_noise_conditioning=True))
    pipe = ImagenSuperResolutionPipeline(unet=unet, scheduler=EDMAdamsScheduler(), tokenizer=None, text_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def see(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {"latents": torch.zeros_like(seen[-1])}

    unet.forward = lambda sample, *args, **kwargs: (torch.zeros_like(sample),)
    pipe(image=low_res, num_inference_steps=2, output_type="pt", generator=seeded(), callback_on_step_end=see)
    # the first call left an image of zeros; the last one leads from there to the end
    scheduler = EDMAdamsScheduler()
    scheduler.set_timesteps(2)
    zeros = torch.zeros(1, 3, 32, 32)
    scheduler.step(zeros, scheduler.timesteps[0], zeros)
    upsampled = upsample_before_noise(low_res * 2 - 1, (32, 32))
    last = scheduler.step(zeros, scheduler.timesteps[1], -upsampled / SCALE).prev_sample
    torch.testing.assert_close(seen[1], upsampled + SCALE * last, atol=1e-5, rtol=0)
    batch = to_device(
        Batch(torch.zeros(1, 3, 32, 32), low_res, None, None), torch.device("cpu"), True, Conditioning.of(unet)
    )
    assert torch.equal(Conditioning.of(unet).space(batch).upsampled, upsample_before_noise(low_res, (32, 32)))
