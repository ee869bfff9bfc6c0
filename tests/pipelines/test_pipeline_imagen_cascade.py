import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from nemo_archives import check_samples, read_case
from networks import randomize
from PIL import Image

from diffusers_imagen import EDMAdamsScheduler, EDMHeunScheduler, EfficientUNetModel, ImagenCascadePipeline
from diffusers_imagen.conversion import load_nemo_unet


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe, prompt="a red apple", **kwargs):
    arguments = {"num_inference_steps": 2, "generator": seeded(), "output_type": "np", **kwargs}
    return pipe(prompt, **arguments)


def count_calls(module: torch.nn.Module) -> list[int]:
    """Batch sizes of the calls of a network from now on."""
    calls = []
    module.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


def test_samples_like_nemo():
    config, weights, vectors = read_case("base_default_small")
    unet = load_nemo_unet(config, weights)
    pipe = ImagenCascadePipeline(unet, EDMHeunScheduler(thresholding=True, dynamic_thresholding_ratio=0.995))
    check_samples(pipe, vectors)


def test_stages_and_output_types(cascade):
    out = run(cascade, ["a red apple", "a blue face"], num_images_per_prompt=2)
    assert sorted(out.stage_images) == [16, 32]
    assert out.stage_images[16].shape == (4, 16, 16, 3)
    assert out.images is out.stage_images[32] and out.images.shape == (4, 32, 32, 3)
    assert 0 <= out.images.min() and out.images.max() <= 1 and out.images.std() > 0.01

    tensors = run(cascade, ["a red apple", "a blue face"], num_images_per_prompt=2, output_type="pt").images
    np.testing.assert_array_equal(tensors.permute(0, 2, 3, 1).numpy(), out.images)
    latents = run(cascade, ["a red apple", "a blue face"], num_images_per_prompt=2, output_type="latent").images
    torch.testing.assert_close(latents / 2 + 0.5, tensors)
    pictures = run(cascade, ["a red apple", "a blue face"], num_images_per_prompt=2, output_type="pil").images
    np.testing.assert_array_equal(np.asarray(pictures[3]), (out.images[3] * 255).round().astype("uint8"))
    last, by_resolution = run(cascade, return_dict=False)
    assert last is by_resolution[32]


def test_output_resolution_stops_early(cascade):
    calls = count_calls(cascade.sr256_unet)
    out = run(cascade, output_resolution=16)
    assert list(out.stage_images) == [16] and calls == []
    np.testing.assert_array_equal(out.images, run(cascade).stage_images[16])


def test_an_image_depends_on_seed_and_place_not_on_batch_size(cascade):
    batch = run(cascade, num_images_per_prompt=3).images
    alone = run(cascade).images
    np.testing.assert_allclose(alone[0], batch[0], atol=1e-4)  # kernels sum a batch in another order
    assert np.abs(batch[0] - batch[1]).max() > 0.01

    own = [seeded(5), seeded(6), seeded(7)]
    listed = run(cascade, num_images_per_prompt=3, generator=own).images
    np.testing.assert_allclose(run(cascade, generator=[seeded(6)]).images[0], listed[1], atol=1e-4)


def test_the_prompt_and_the_seed_matter(cascade):
    image = run(cascade).images
    np.testing.assert_array_equal(image, run(cascade).images)
    assert np.abs(image - run(cascade, "a blue tiger").images).max() > 1e-3
    assert np.abs(image - run(cascade, generator=seeded(1)).images).max() > 1e-3
    assert np.abs(image - run(cascade, negative_prompt="face").images).max() > 1e-4


def test_guidance_is_one_batched_call_a_step(cascade):
    calls = count_calls(cascade.base_unet)
    run(cascade, num_inference_steps=[3, 1], guidance_scale=[4.0, 1.0], num_images_per_prompt=2)
    assert calls == [4] * 5  # Heun: 2 N - 1 calls, each with both branches
    calls.clear()
    scales = {"base": 1.0, "sr256": 1.0}
    run(cascade, num_inference_steps=[3, 1], guidance_scale=scales, num_images_per_prompt=2)
    assert calls == [2] * 5


def test_guidance_is_linear_in_the_scale_for_one_step(cascade):
    """With one Euler step from sigma_max the denoised image is linear in the scale (before any clipping)."""
    cascade.base_scheduler = EDMHeunScheduler()
    cascade.base_scheduler._threshold = lambda x: x
    results = []
    hook = lambda pipe, i, t, kwargs: results.append(kwargs["latents"].clone()) or {}  # noqa: E731
    for scale in (1.0, 2.0, 4.0):
        run(cascade, output_resolution=16, num_inference_steps=1, guidance_scale=scale, callback_on_step_end=hook)
    torch.testing.assert_close(results[2] - results[0], 3 * (results[1] - results[0]), atol=1e-4, rtol=1e-4)


def test_embeddings_in_place_of_the_prompt(cascade):
    embeds, mask, negative, negative_mask = cascade.encode_prompt("a red apple", "face")
    given = run(
        cascade,
        None,
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask,
    ).images
    np.testing.assert_array_equal(given, run(cascade, negative_prompt="face").images)
    assert (embeds[~mask] == 0).all() and mask.sum() == 5  # [CLS] a red apple [SEP]


def test_the_text_encoder_runs_once_and_the_text_is_projected_once(cascade):
    encoder = []
    cascade.text_encoder.register_forward_hook(lambda *args: encoder.append(1))
    projections = []
    cascade.base_unet.text_embedding.register_forward_hook(lambda *args: projections.append(1))
    run(cascade, num_inference_steps=3, num_images_per_prompt=2)
    assert len(encoder) == 1 and len(projections) == 1


@pytest.mark.parametrize("scheduler_class", [EDMAdamsScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_other_edm_schedulers_drive_the_stages(cascade, scheduler_class):
    cascade.base_scheduler = scheduler_class(sigma_max=80.0, sigma_data=0.5)
    many = run(cascade, output_resolution=16, num_inference_steps=100, output_type="latent").images
    cascade.base_scheduler = EDMHeunScheduler()
    reference = run(cascade, output_resolution=16, num_inference_steps=100, output_type="latent").images
    assert (many - reference).abs().mean() < 0.05 * reference.abs().mean()


def test_save_load_reload_gives_identical_images(cascade, tmp_path):
    expected = run(cascade).images
    cascade.save_pretrained(tmp_path / "one")
    index = json.loads((tmp_path / "one" / "model_index.json").read_text())
    assert index["base_unet"] == ["diffusers_imagen", "ImagenUNetModel"]
    assert index["sr1024_unet"] == [None, None]
    for loader in (ImagenCascadePipeline, DiffusionPipeline, AutoPipelineForText2Image):
        loaded = loader.from_pretrained(tmp_path / "one")
        assert type(loaded) is ImagenCascadePipeline
        loaded.set_progress_bar_config(disable=True)
        np.testing.assert_array_equal(run(loaded).images, expected)
    loaded.save_pretrained(tmp_path / "two")
    again = ImagenCascadePipeline.from_pretrained(tmp_path / "two", sr256_unet=None, sr256_scheduler=None)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(run(again).images, run(cascade, output_resolution=16).images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(cascade, dtype):
    expected = run(cascade).images
    cascade.to(dtype=dtype)
    images = run(cascade).images
    assert np.isfinite(images).all()
    assert np.abs(images - expected).mean() < 0.02


def test_callback_sees_every_call_and_can_change_and_interrupt(cascade):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = run(cascade, callback_on_step_end=callback)
    assert seen == [(0, (1, 3, 16, 16)), (1, (1, 3, 16, 16)), (2, (1, 3, 16, 16))] + [
        (i, (1, 3, 32, 32)) for i in (3, 4, 5)
    ]
    assert cascade.num_timesteps == 6
    assert (out.images == 0.5).all()

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    out = run(cascade, callback_on_step_end=interrupt)
    assert list(out.stage_images) == [16]


def test_a_long_prompt_is_cut_with_a_warning(cascade, caplog):
    import logging

    logging.getLogger("diffusers_imagen").propagate = True
    run(cascade, "a red apple of a blue tiger face", output_resolution=16)
    assert "'tiger face' is lost" in caplog.text


PICTURE = torch.linspace(0, 1, 32)[None, None, None].expand(1, 3, 32, 32)
SCALES = {"base": 4.0, "sr256": 1.0}
BAD_INPUTS = {
    "no prompt": ({"prompt": None}, "Exactly one of `prompt`"),
    "prompt not a string": ({"prompt": 3}, "`prompt` is 3"),
    "prompt an empty list": ({"prompt": []}, "`prompt` is []"),
    "prompt a list of numbers": ({"prompt": ["a", 1]}, "`prompt` is ['a', 1]"),
    "unknown resolution": ({"output_resolution": 512}, "`output_resolution` is 512, but should be"),
    "no steps": ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    "half a step": ({"num_inference_steps": [2, 1.5]}, "`num_inference_steps` is 1.5"),
    "steps of three stages": ({"num_inference_steps": [1, 2, 3]}, "`num_inference_steps` has 3 entries"),
    "steps of another cascade's stage": ({"num_inference_steps": {"base": 2, "sr1024": 2}}, "has ['sr1024']"),
    "noise in the image of a base stage": (
        {"low_res_noise_level": {"base": 0.1}},
        "`low_res_noise_level` has ['base'], but should have stage names among ['sr256']",
    ),
    "scales of one stage": ({"guidance_scale": [1.0]}, "`guidance_scale` has 1 entries"),
    "a scale that is no number": ({"guidance_scale": "high"}, "`guidance_scale` is 'high'"),
    "no noise": ({"low_res_noise_level": 0.0}, "`low_res_noise_level` is 0.0"),
    "no images": ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
    "unknown output": ({"output_type": "gif"}, "`output_type` is 'gif'"),
    "too few generators": ({"generator": [torch.Generator()] * 2}, "`generator` has 2 entries, but should have 1"),
    "latents of another batch": ({"latents": torch.zeros(2, 3, 16, 16)}, "`latents` has shape (2, 3, 16, 16)"),
    "latents of odd size": ({"latents": torch.zeros(1, 3, 15, 16)}, "multiples of 2"),
    "embeddings too wide": ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 17)}, "has width 17"),
    "embeddings without batch": ({"prompt": None, "prompt_embeds": torch.zeros(4, 16)}, "has shape (4, 16)"),
    "mask of other length": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 4, 16), "prompt_attention_mask": torch.ones(1, 5)},
        "`prompt_attention_mask` has shape (1, 5)",
    ),
    "both prompts": ({"prompt_embeds": torch.zeros(1, 4, 16)}, "Exactly one of `prompt`"),
    "two negative prompts": ({"negative_prompt": ["a", "b"]}, "2 negative prompts, but 1 prompts"),
    "embeddings without a mask": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 8, 16)},
        "without `prompt_attention_mask`, of shape (1, 8)",
    ),
    "embeddings with NaN": (
        {"prompt": None, "prompt_embeds": torch.full((1, 8, 16), math.nan), "prompt_attention_mask": torch.ones(1, 8)},
        "`prompt_embeds` has values that are not finite",
    ),
    "negative embeddings of another length": (
        {"negative_prompt_embeds": torch.zeros(1, 4, 16), "negative_prompt_attention_mask": torch.ones(1, 4)},
        "Prompts have 8 tokens and negative prompts 4",
    ),
    "a stage that there is not": ({"guidance_scale": {**SCALES, "sr512": 1.0}}, "`guidance_scale` has ['sr512']"),
    "an interval upside down": ({"guidance_interval": (5.0, 1.0)}, "`guidance_interval` is (5.0, 1.0)"),
    "an interval of one number": ({"guidance_interval": 5.0}, "`guidance_interval` is 5.0"),
    "rescale above one": ({"guidance_rescale": 1.5}, "`guidance_rescale` is 1.5"),
    "one list of levels for two stages": ({"sigmas": [80.0, 1.0]}, "pass a dict with a list for each stage"),
    "levels that rise": ({"sigmas": {"base": [1.0, 80.0]}}, "decrease strictly"),
    "sigmas and timesteps": ({"sigmas": {"base": [1.0]}, "timesteps": {"base": [0.0]}}, "Only one of `sigmas`"),
    "a height between strides": (
        {"height": 34},
        "`height` is 34, but should be a multiple of 4",
    ),
    "a width that is no number": ({"width": 32.0}, "`width` is 32.0"),
    "latents of another size": (
        {"latents": torch.zeros(1, 3, 16, 16), "height": 64},
        "`height` is 64, but should be 32 for `latents`",
    ),
    "strength without image": ({"strength": 0.5}, "`strength` is given without `image`"),
    "mask without image": ({"mask_image": PICTURE[:, :1]}, "`mask_image` is given without `image`"),
    "too much strength": ({"image": PICTURE, "strength": 1.5}, "`strength` is 1.5"),
    "too little strength": ({"image": PICTURE, "strength": 0.4}, "leaves none of the 2 steps of the stage `base`"),
    "a mask of another size": ({"image": PICTURE, "mask_image": PICTURE[:, :1, 1:]}, "`mask_image` is 31x32"),
    "a mask of nothing": ({"image": PICTURE, "mask_image": PICTURE[:, :1] * 0}, "has no pixels to repaint"),
    "two images": ({"image": torch.cat([PICTURE] * 2)}, "`image` has 2 images, but there are 1 prompts"),
    "an image with NaN": ({"image": PICTURE * math.nan}, "`image` has values that are not finite"),
    "an image to 255 in floating point": ({"image": PICTURE * 255}, "`image` has values from 0 to 255"),
    "an image of two channels": ({"image": PICTURE[:, :2]}, "`image` has shape (2, 32, 32)"),
    "an image that is a name": ({"image": "tiger.png"}, "`image` is of class str"),
    "nothing left to run": ({"image": PICTURE, "output_resolution": 16}, "`output_resolution` is 16, but should be"),
    "no resampling": ({"num_resample_times": 0}, "`num_resample_times` is 0"),
    "unknown callback tensor": ({"callback_on_step_end_tensor_inputs": ["x"]}, "['x']"),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_refused_before_any_network_runs(cascade, arguments, message):
    calls = count_calls(cascade.base_unet)
    with pytest.raises(ValueError) as error:
        run(cascade, **{"prompt": "a red apple", **arguments})
    assert message in str(error.value)
    assert calls == []


def test_a_prompt_needs_a_text_encoder(cascade):
    cascade.text_encoder = None
    with pytest.raises(ValueError, match="`prompt` needs a text encoder"):
        run(cascade)


def test_noise_of_another_shape_is_carried_through_the_stages(cascade):
    out = run(cascade, latents=torch.randn(1, 3, 16, 24, generator=seeded()))
    assert out.stage_images[16].shape == (1, 16, 24, 3) and out.images.shape == (1, 32, 48, 3)


def test_height_and_width_go_through_all_stages(cascade):
    out = run(cascade, height=64, width=48)
    assert out.stage_images[16].shape == (1, 32, 24, 3) and out.images.shape == (1, 64, 48, 3)
    first = run(cascade, height=32, width=24, output_resolution=16).images
    np.testing.assert_array_equal(first, out.stage_images[16])


def test_super_resolution_starts_from_a_given_image(cascade):
    base_calls, sr_calls = count_calls(cascade.base_unet), count_calls(cascade.sr256_unet)
    drawn = run(cascade, output_resolution=16, output_type="pt").images
    base_calls.clear()
    out = run(cascade, image=drawn, num_inference_steps=[2], output_type="pt")
    assert base_calls == [] and sr_calls == [1, 1, 1] and list(out.stage_images) == [32]
    # every form of the image leads to the same
    as_uint8 = (drawn * 255).round().to(torch.uint8)
    pil = Image.fromarray(as_uint8[0].permute(1, 2, 0).numpy())
    forms = [pil, [pil], np.asarray(pil), np.asarray(pil)[None], as_uint8, as_uint8[0], np.asarray(pil) / 255.0]
    expected = run(cascade, image=as_uint8 / 255).images
    for form in forms:
        np.testing.assert_array_equal(run(cascade, image=form).images, expected)
    np.testing.assert_allclose(expected, out.images.permute(0, 2, 3, 1).numpy(), atol=0.02)
    # one image for each prompt, and of any size
    two = run(cascade, ["a", "red"], image=[pil, pil.resize((40, 50))], num_images_per_prompt=2)
    assert two.images.shape == (4, 32, 32, 3)
    assert run(cascade, image=pil.resize((40, 60)), height=48, width=32).images.shape == (1, 48, 32, 3)


def test_the_given_image_is_what_is_enlarged(cascade):
    seen = []
    cascade.sr256_unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["low_res_sample"]), with_kwargs=True
    )
    run(cascade, image=PICTURE, low_res_noise_level=0.002)
    small = torch.nn.functional.interpolate(PICTURE * 2 - 1, (16, 16), mode="bicubic", antialias=True)
    large = torch.nn.functional.interpolate(small, (32, 32), mode="bicubic")
    torch.testing.assert_close(seen[0], large / (0.5**2 + 0.002**2) ** 0.5, atol=0.03, rtol=0)
    assert all(torch.equal(image, seen[0]) for image in seen)  # drawn once


def test_a_stretched_image_is_said_so(cascade, caplog):
    import logging

    logging.getLogger("diffusers_imagen").propagate = True
    run(cascade, image=PICTURE[..., :16])
    assert "stretched to 16x16" in caplog.text


def test_inpainting_keeps_pixels_through_all_stages(cascade):
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    out = run(cascade, image=PICTURE, mask_image=mask, output_type="pt")
    torch.testing.assert_close(out.images[..., 16:], PICTURE[..., 16:], atol=1e-6, rtol=0)
    small = torch.nn.functional.interpolate(PICTURE * 2 - 1, (16, 16), mode="bicubic", antialias=True) / 2 + 0.5
    torch.testing.assert_close(out.stage_images[16][..., 8:], small[..., 8:], atol=1e-6, rtol=0)
    assert (out.images - PICTURE)[..., :16].abs().mean() > 0.05
    # an image without the pixels of the last stage says nothing about them
    small_out = run(cascade, image=small, mask_image=mask[..., ::2, ::2], output_type="pt")
    torch.testing.assert_close(small_out.stage_images[16][..., 8:], small[..., 8:], atol=1e-6, rtol=0)
    assert (small_out.images - PICTURE)[..., 16:].abs().max() > 1e-3


def test_image_to_image_goes_through_all_stages(cascade):
    calls = count_calls(cascade.base_unet)
    out = run(cascade, image=PICTURE, strength=0.5, num_inference_steps=[4, 2])
    assert len(calls) == 3 and sorted(out.stage_images) == [16, 32]


def test_an_encoder_of_another_width_is_refused(cascade):
    config = cascade.text_encoder.config
    config.hidden_size = 24
    with pytest.raises(ValueError, match="embeddings of width 24, but a network of the stage `base` needs width 16"):
        run(cascade)


def test_an_encoder_that_overflows_is_refused(cascade):
    with torch.no_grad():
        cascade.text_encoder.embeddings.LayerNorm.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="returned embeddings that are not finite: load it in torch.bfloat16"):
        run(cascade)


def test_a_tokenizer_without_length_is_refused(cascade):
    cascade.tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="`tokenizer.model_max_length` is not set"):
        run(cascade)


def test_a_prompt_is_taken_where_the_stage_that_runs_reads_no_text(cascade, monkeypatch):
    config = {**cascade.sr256_unet.config, "encoder_hid_dim": None, "attention_types": (None, None)}
    cascade.sr256_unet = randomize(EfficientUNetModel.from_config(config))
    small = PICTURE[..., ::2, ::2]
    without = run(cascade, prompt=None, image=small, output_type="pt").images
    monkeypatch.setattr(cascade.text_encoder, "forward", None)  # nothing is encoded
    torch.testing.assert_close(run(cascade, image=small, output_type="pt").images, without, atol=0, rtol=0)
    two = run(cascade, prompt=["a red apple", "a blue fish"], image=small, output_type="pt").images
    assert len(two) == 2
    with pytest.raises(ValueError, match="`prompt` is 3"):
        run(cascade, prompt=3, image=small)
