"""Guidance, images to start from, kept pixels, slices: what the loop does, counted and measured."""

import math
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch

from diffusers_imagen import ContinuousDDPMScheduler, EDMHeunScheduler, ImagenPipeline, ImagenUNetModel
from diffusers_imagen.diffusion.guidance import classifier_free_guidance, rescale_guidance
from diffusers_imagen.pipelines.planning import NoiseLevel, noise_levels_of_steps
from diffusers_imagen.pipelines.runner import KnownPixels, add_more_noise


def randomized_copy(unet, seed):
    other = deepcopy(unet)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return other


def test_outside_its_interval_guidance_costs_nothing(base_pipeline, run, count_calls):
    calls = count_calls(base_pipeline.unet)
    run(base_pipeline, num_inference_steps=4, guidance_scale=3.0, guidance_interval=(0.1, 10.0))
    # the levels of the calls, by Karras' schedule: 80, 9.7, 9.7, 0.47, 0.47, 0.002, 0.002
    sigmas = base_pipeline.scheduler.sigmas[:-1].tolist()
    assert calls == [2 if 0.1 <= sigma <= 10.0 else 1 for sigma in sigmas]
    assert sorted(set(calls)) == [1, 2]


def test_guidance_interval_of_everything_is_no_interval(base_pipeline, run):
    whole = run(base_pipeline, guidance_scale=3.0, guidance_interval=(0.0, math.inf)).images
    torch.testing.assert_close(whole, run(base_pipeline, guidance_scale=3.0).images, atol=0, rtol=0)
    nothing = run(base_pipeline, guidance_scale=3.0, guidance_interval=(1e3, 1e4)).images
    torch.testing.assert_close(nothing, run(base_pipeline, guidance_scale=1.0).images, atol=0, rtol=0)


def spied_outputs(pipe, run, **kwargs):
    """Inputs and outputs of the first call of `scheduler.step`, and the raw outputs of the network."""
    seen = {"network": []}
    handle = pipe.unet.register_forward_hook(lambda module, args, output: seen["network"].append(output[0].clone()))
    step = pipe.scheduler.step

    def spy(output, timestep, sample, **rest):
        seen.setdefault("output", output.clone())
        return step(output, timestep, sample, **rest)

    pipe.scheduler.step = spy
    run(pipe, num_inference_steps=1, **kwargs)
    handle.remove()
    del pipe.scheduler.step
    return seen


def test_guidance_rescale_is_that_of_the_formula(base_pipeline, run):
    seen = spied_outputs(base_pipeline, run, guidance_scale=2000.0, guidance_rescale=0.7)
    uncond, cond = seen["network"][0].chunk(2)
    expected = rescale_guidance(classifier_free_guidance(cond, uncond, 2000.0), cond, 0.7)
    torch.testing.assert_close(seen["output"], expected)
    assert (seen["output"] - classifier_free_guidance(cond, uncond, 2000.0)).abs().max() > 1e-3


def test_autoguidance_is_away_from_the_weaker_network_with_the_same_prompt(base_pipeline, run, count_calls):
    weak = base_pipeline.guidance_unet = randomized_copy(base_pipeline.unet, 5)
    outputs = []
    weak.register_forward_hook(lambda module, args, output: outputs.append(output[0].clone()))
    calls = count_calls(base_pipeline.unet)
    seen = spied_outputs(base_pipeline, run, guidance_scale=2.0)
    assert calls == [1]
    torch.testing.assert_close(seen["output"], outputs[0] + 2.0 * (seen["network"][0] - outputs[0]))
    # a network that is guided away from itself is not guided
    base_pipeline.guidance_unet = base_pipeline.unet
    same = run(base_pipeline, guidance_scale=2.0).images
    torch.testing.assert_close(same, run(base_pipeline, guidance_scale=1.0).images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", [EDMHeunScheduler(), ContinuousDDPMScheduler(preconditioning="edm")])
def test_levels_are_those_of_the_schedule(scheduler):
    scheduler.set_timesteps(5)
    levels = noise_levels_of_steps(scheduler)
    assert list(levels) == list(range(0, len(scheduler.timesteps), scheduler.order))
    for index, level in levels.items():
        assert level.noise / level.signal == pytest.approx(scheduler.sigmas[index].item(), rel=1e-4)
    is_vp = isinstance(scheduler, ContinuousDDPMScheduler)
    norms = [math.hypot(*level) if is_vp else level.signal for level in levels.values()]
    assert norms == pytest.approx([1.0] * 5, rel=1e-5)


@pytest.mark.parametrize("low, high", [((1.0, 0.5), (1.0, 4.0)), ((0.9, math.sqrt(0.19)), (0.3, math.sqrt(0.91)))])
def test_more_noise_leads_to_the_marginal_of_the_higher_level(low, high):
    """x = a x_0 + s eps at one level becomes a sample of the other: mean and standard deviation of Gaussians."""
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0))[None, None, None]
    sample = low[0] * 0.7 + low[1] * noise
    higher = add_more_noise(sample, NoiseLevel(*low), NoiseLevel(*high), [torch.Generator().manual_seed(1)])
    assert higher.mean().item() == pytest.approx(high[0] * 0.7, abs=0.03)
    assert higher.std().item() == pytest.approx(high[1], rel=0.01)


def test_known_pixels_are_the_original_under_noise_of_the_level():
    image = torch.full((1, 3, 64, 64), 0.25)
    repainted = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    repainted[..., :32] = True
    sample = torch.full((1, 3, 64, 64), 9.0)
    known = KnownPixels(image, repainted)
    put = known.put_into(sample, NoiseLevel(0.8, 2.0), [torch.Generator().manual_seed(0)])
    assert (put[..., :32] == 9.0).all()
    assert put[..., 32:].mean().item() == pytest.approx(0.2, abs=0.1)
    assert put[..., 32:].std().item() == pytest.approx(2.0, rel=0.03)
    assert torch.equal(known.put_into(sample, NoiseLevel(1.0, 0.0), None)[..., 32:], image[..., 32:])


@pytest.mark.parametrize("scheduler", [EDMHeunScheduler(s_churn=5.0), ContinuousDDPMScheduler(preconditioning="edm")])
def test_inpainting_keeps_the_known_pixels_at_every_level(base_pipeline, run, picture, count_calls, scheduler):
    base_pipeline.scheduler = scheduler
    image, mask = picture[..., ::2, ::2], torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    residuals, calls = [], count_calls(base_pipeline.unet)

    def callback(pipe, step, timestep, tensors):
        residuals.append((tensors["latents"] - (image * 2 - 1))[..., 8:].std().item())
        return {}

    out = run(
        base_pipeline,
        image=image,
        mask_image=mask,
        num_inference_steps=4,
        num_resample_times=3,
        guidance_scale=1.0,
        callback_on_step_end=callback,
    )
    torch.testing.assert_close(out.images[..., 8:], (image * 2 - 1)[..., 8:], atol=1e-6, rtol=0)
    assert (out.images - (image * 2 - 1))[..., :8].abs().mean() > 0.1
    order = scheduler.order
    assert len(calls) == 3 * 3 * order + 1 == base_pipeline.num_timesteps  # the last step is done once
    if order == 2:  # after each step the known pixels have the noise of its end, after a jump that of its start
        sigmas = [scheduler.sigmas[2 * step].item() for step in range(4)]
        expected = [sigmas[0], sigmas[0], sigmas[1], sigmas[1], sigmas[1], sigmas[2]]
        assert residuals[1:12:2] == pytest.approx(expected, rel=0.15)


def test_resampling_once_is_no_resampling(base_pipeline, run, picture):
    mask = torch.ones(1, 1, 16, 16)  # everything anew: what is known has no say
    image = picture[..., ::2, ::2]
    out = run(base_pipeline, image=image, mask_image=mask, num_resample_times=1).images
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    anew = run(base_pipeline, image=image, mask_image=mask, num_resample_times=1, latents=noise).images
    torch.testing.assert_close(anew, run(base_pipeline, latents=noise).images, atol=0, rtol=0)
    torch.testing.assert_close(out, run(base_pipeline).images, atol=0, rtol=0)


def test_strength_is_the_share_of_the_steps_that_run(base_pipeline, run, picture, count_calls):
    calls = count_calls(base_pipeline.unet)
    image = picture[..., ::2, ::2]
    distances = []
    for strength, steps in ((0.25, 2), (0.5, 4), (1.0, 8)):
        out = run(base_pipeline, image=image, strength=strength, num_inference_steps=8, guidance_scale=1.0).images
        assert len(calls) == 2 * steps - 1
        calls.clear()
        distances.append((out - (image * 2 - 1)).abs().mean().item())
    assert distances[0] < 0.05 and distances == sorted(distances)
    # all of the way is from noise alone
    everything = run(base_pipeline, num_inference_steps=8, guidance_scale=1.0).images
    torch.testing.assert_close(out, everything, atol=0, rtol=0)


def test_image_to_image_starts_at_the_level_of_its_first_step(base_pipeline, run, picture):
    samples = []
    scale = base_pipeline.scheduler.scale_model_input
    base_pipeline.scheduler.scale_model_input = lambda x, t: samples.append(x.clone()) or scale(x, t)
    image = picture[..., ::2, ::2]
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    run(base_pipeline, image=image, strength=0.5, num_inference_steps=4, latents=noise)
    sigma = base_pipeline.scheduler.sigmas[4].item()
    torch.testing.assert_close(samples[0], image * 2 - 1 + sigma * noise, atol=1e-5, rtol=1e-5)


def test_in_slices_of_one_an_image_is_the_same_alone_and_in_a_batch(cascade, run, count_calls):
    cascade.enable_slicing()
    calls = count_calls(cascade.sr256_unet)
    own = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    prompts = ["a red apple", "a blue face", "a tiger"]
    batch = run(cascade, prompts, generator=own, guidance_scale=3.0)
    assert calls == [2] * 9
    alone = run(cascade, prompts[1], generator=torch.Generator().manual_seed(6), guidance_scale=3.0)
    for side in (16, 32):
        assert torch.equal(batch.stage_images[side][1:2], alone.stage_images[side])
    cascade.disable_slicing()
    whole = run(cascade, prompts, generator=[torch.Generator().manual_seed(s) for s in (5, 6, 7)], guidance_scale=3.0)
    torch.testing.assert_close(whole.images, batch.images, atol=1e-4, rtol=0)


def test_callbacks_change_the_text_and_the_guidance(base_pipeline, run):
    names = ["latents", "prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask"]
    other = base_pipeline.encode_prompt("a blue tiger")

    def change(pipe, step, timestep, tensors):
        assert list(tensors) == names and tensors["prompt_embeds"].shape == (1, 8, 16)
        return {"prompt_embeds": other[0], "prompt_attention_mask": other[1]} if step == 0 else {}

    changed = run(base_pipeline, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names).images
    assert (changed - run(base_pipeline).images).abs().max() > 1e-4

    def more(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return {}

    run(base_pipeline, guidance_scale=2.0, callback_on_step_end=more)
    assert base_pipeline.guidance_scale == 2.0 + base_pipeline.num_timesteps


@pytest.fixture
def scales_of_calls(cascade, run):
    """Runs the cascade with a callback on its guidance: the scale at each call, before the callback."""

    def scales_of_calls(change, **kwargs):
        scales = []

        def callback(pipe, step, timestep, tensors):
            scales.append(pipe.guidance_scale)
            change(pipe, step)

        run(cascade, callback_on_step_end=callback, **kwargs)
        return scales

    return scales_of_calls


def test_each_stage_starts_at_the_scale_that_was_asked_for_it(cascade, run, scales_of_calls):
    def no_guidance_from_the_second_call_on(pipe, step):
        if step == 1:
            pipe._guidance_scale = 1.0

    asked = {"base": 4.0, "sr256": 2.0}
    assert scales_of_calls(no_guidance_from_the_second_call_on, guidance_scale=asked) == [4.0, 4.0, 1.0] + [2.0] * 3
    assert cascade.guidance_scale == 2.0
    # what happened in one call says nothing about the next
    assert scales_of_calls(lambda pipe, step: None, guidance_scale=asked) == [4.0] * 3 + [2.0] * 3


def test_what_a_callback_adds_is_counted_through_all_stages(cascade, run, scales_of_calls):
    """As diffusers' test of a pipeline's callbacks counts it, `test_callback_cfg`."""

    def more(pipe, step):
        pipe._guidance_scale += 0.5

    scales = scales_of_calls(more, guidance_scale={"base": 3.3, "sr256": 2.0})
    assert scales == pytest.approx([3.3, 3.8, 4.3, 2.0, 2.5, 3.0])
    assert cascade.guidance_scale == 2.0 + 0.5 * cascade.num_timesteps
    run(cascade, guidance_scale={"base": 3.3, "sr256": 1.0})
    assert cascade.guidance_scale == 1.0


def test_own_noise_levels(base_pipeline, run, count_calls):
    sigmas = [80.0, 10.0, 1.0]
    calls = count_calls(base_pipeline.unet)
    out = run(base_pipeline, sigmas=sigmas, guidance_scale=1.0).images
    assert len(calls) == 5
    assert base_pipeline.scheduler.sigmas.tolist() == pytest.approx([80.0, 10.0, 10.0, 1.0, 1.0, 0.0])
    timesteps = [math.log(sigma) / 4 for sigma in sigmas]
    same = run(base_pipeline, timesteps=timesteps, guidance_scale=1.0).images
    torch.testing.assert_close(same, out, atol=1e-5, rtol=0)


def test_two_stages_may_have_one_scheduler(cascade, run):
    expected = run(cascade, num_inference_steps=[3, 2]).images
    cascade.sr256_scheduler = cascade.base_scheduler
    assert torch.equal(run(cascade, num_inference_steps=[3, 2]).images, expected)


def test_a_network_without_text_needs_no_prompt():
    unet = ImagenUNetModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_resolutions=(),
        attention_type="self",
        attention_head_dim=8,
        encoder_hid_dim=None,
        norm_num_groups=4,
    )
    pipe = ImagenPipeline(unet, EDMHeunScheduler())
    out = pipe(num_images_per_prompt=2, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    assert out.images.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="but should be 1: the stage is not conditioned on text"):
        pipe(guidance_scale=4.0)
    with pytest.raises(ValueError, match="no stage of this pipeline is conditioned on text"):
        pipe("a red apple", guidance_scale=1.0)


@pytest.mark.parametrize("shares", ["the pipeline", "the scheduler"])
def test_calls_of_several_threads_wait_for_each_other(shares, base_pipeline, run):
    other = base_pipeline
    if shares == "the scheduler":
        other = ImagenPipeline.from_pipe(base_pipeline)
        other.set_progress_bar_config(disable=True)
    calls = [
        (pipe, {"num_inference_steps": n, "guidance_scale": n}) for n in (2, 3) for pipe in (base_pipeline, other)
    ]
    expected = [run(pipe, **kwargs).images for pipe, kwargs in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        results = list(pool.map(lambda call: run(call[0], **call[1]).images, calls))
    for result, images in zip(results, expected):
        assert torch.equal(result, images)


def test_a_callback_cannot_call_its_pipeline_but_a_copy(base_pipeline, run):
    expected = run(base_pipeline).images
    with pytest.raises(ValueError, match="called by its own `callback_on_step_end`"):
        run(base_pipeline, callback_on_step_end=lambda pipe, *rest: run(pipe))
    other = deepcopy(base_pipeline)
    images = run(base_pipeline, callback_on_step_end=lambda *rest: run(other) and {}).images
    assert torch.equal(images, expected)
