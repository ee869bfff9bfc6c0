"""Networks without text in pipelines: the images that are given say how many are made."""

import pytest
import torch
from networks import randomize

from diffusers_imagen import EDMHeunScheduler, ImagenPipeline, ImagenSuperResolutionPipeline
from diffusers_imagen.training.validation.picture_metrics import StageCall


def textless(unet: torch.nn.Module) -> torch.nn.Module:
    unet = randomize(type(unet).from_config({**unet.config, "encoder_hid_dim": None}))
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)  # so that sampling does not end in black and white
    return unet


@pytest.fixture
def enlarging(sr_unet) -> ImagenSuperResolutionPipeline:
    pipe = ImagenSuperResolutionPipeline(textless(sr_unet), EDMHeunScheduler(clip_sample=True), scale_factor=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def painting(base_unet) -> ImagenPipeline:
    pipe = ImagenPipeline(textless(base_unet), EDMHeunScheduler(clip_sample=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def three() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, **kwargs) -> torch.Tensor:
    return pipe(num_inference_steps=2, output_type="latent", **kwargs).images


def test_several_images_in_a_call_are_those_of_a_call_each(enlarging, three, count_calls):
    calls = count_calls(enlarging.unet)
    together = draw(enlarging, image=three, generator=generators(1, 2, 3))
    assert together.shape == (3, 3, 32, 32) and calls == [3] * 3
    enlarging.enable_slicing()
    for given in (three, list(three)):
        sliced = draw(enlarging, image=given, generator=generators(1, 2, 3))
        torch.testing.assert_close(sliced, together, atol=1e-4, rtol=0)
        alone = [draw(enlarging, image=one, generator=of) for one, of in zip(three, generators(1, 2, 3))]
        assert torch.equal(sliced, torch.cat(alone))


def test_every_image_is_made_as_often_as_asked(enlarging, three):
    enlarging.enable_slicing()
    made = draw(enlarging, image=three[:2], num_images_per_prompt=2, generator=generators(1, 2, 3, 4))
    for place, (image, generator) in enumerate(zip(three[[0, 0, 1, 1]], generators(1, 2, 3, 4))):
        assert torch.equal(made[place : place + 1], draw(enlarging, image=image, generator=generator))
    with pytest.raises(ValueError, match="`generator` has 2 entries, but should have 3, one for each image"):
        draw(enlarging, image=three, generator=generators(1, 2))


def test_images_and_masks_count_alike(painting, three):
    painting.enable_slicing()
    masks = torch.zeros(3, 1, 16, 16)
    for i, mask in enumerate(masks):
        mask[:, : 4 + 4 * i] = 1
    made = draw(painting, image=three, mask_image=masks, num_resample_times=1, generator=generators(1, 2, 3))
    for i, generator in enumerate(generators(1, 2, 3)):
        alone = draw(painting, image=three[i], mask_image=masks[i], num_resample_times=1, generator=generator)
        assert torch.equal(made[i : i + 1], alone)
    assert draw(painting, image=three[0], mask_image=masks, num_resample_times=1).shape[0] == 3
    assert draw(painting, image=three, strength=0.5).shape[0] == 3
    with pytest.raises(ValueError, match="`mask_image` has 2 images, but `image` has 3: pass 1 or 3."):
        draw(painting, image=three, mask_image=masks[:2])


def test_a_prompt_that_nothing_reads_does_not_count(cascade, three):
    cascade.sr256_unet = textless(cascade.sr256_unet)
    assert draw(cascade, prompt="a red apple", image=three).shape[0] == 3
    with pytest.raises(ValueError, match="`image` has 3 images, but the number of prompts is 2: pass 1 or 2."):
        draw(cascade, prompt=["a red apple", "a tiger"], image=three)


def test_validation_enlarges_a_batch_in_one_call(enlarging, three, count_calls):
    calls = count_calls(enlarging.unet)
    call = StageCall(enlarging, text=None)
    options = {"num_inference_steps": [2], "guidance_scale": [1.0], "output_resolution": 32}
    made = call(["", "", ""], generators(1, 2, 3), image=list(three), **options)
    assert len(made.images) == 3 and calls == [3] * 3
