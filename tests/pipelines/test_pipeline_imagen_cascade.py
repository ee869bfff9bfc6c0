import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from safetensors.torch import load_file

from diffusers_imagen import EDMAdamsScheduler, EDMHeunScheduler, ImagenCascadePipeline
from diffusers_imagen.conversion import load_nemo_unet


NEMO = Path(__file__).parents[1] / "fixtures" / "nemo"


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
    """NeMo v2.3.0's own sampler: 6 steps, guidance 2, dynamic thresholding (shared/reference/nemo)."""
    case = NEMO / "base_default_small"
    weights = load_file(f"{case}.nemo_weights.safetensors")
    vectors = load_file(f"{case}.io.safetensors")
    unet = load_nemo_unet(json.loads(Path(f"{case}.json").read_text()), {k: v.float() for k, v in weights.items()})
    pipe = ImagenCascadePipeline(unet, EDMHeunScheduler(thresholding=True, dynamic_thresholding_ratio=0.995))
    images = pipe(
        prompt_embeds=vectors["text_embed"],
        prompt_attention_mask=vectors["text_mask"],
        latents=vectors["edm_noise"],
        num_inference_steps=6,
        guidance_scale=2.0,
        output_type="latent",
    ).images
    # the pipeline clamps what a stage hands on; NeMo does not
    expected = vectors["edm_sample_6steps_cfg2_dynamic"].clamp(-1, 1)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


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


BAD_INPUTS = {
    "no prompt": ({"prompt": None}, "Exactly one of `prompt`"),
    "prompt not a string": ({"prompt": 3}, "`prompt` is 3"),
    "prompt an empty list": ({"prompt": []}, "`prompt` is []"),
    "prompt a list of numbers": ({"prompt": ["a", 1]}, "`prompt` is ['a', 1]"),
    "unknown resolution": ({"output_resolution": 512}, "`output_resolution` is 512, but the stages"),
    "no steps": ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    "half a step": ({"num_inference_steps": [2, 1.5]}, "`num_inference_steps` is 1.5"),
    "steps of three stages": ({"num_inference_steps": [1, 2, 3]}, "`num_inference_steps` has 3 entries"),
    "steps of another stage": ({"num_inference_steps": {"base": 2}}, "lacks the stages ['sr256']"),
    "scales of one stage": ({"guidance_scale": [1.0]}, "`guidance_scale` has 1 entries"),
    "a scale that is no number": ({"guidance_scale": "high"}, "`guidance_scale` is 'high'"),
    "no noise": ({"low_res_noise_level": 0.0}, "`low_res_noise_level` is 0.0"),
    "no images": ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
    "unknown output": ({"output_type": "gif"}, "`output_type` is 'gif'"),
    "too few generators": ({"generator": [torch.Generator()] * 2}, "`generator` has 2 entries, but 1 images"),
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
