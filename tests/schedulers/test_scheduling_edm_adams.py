import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from ideal_networks import LATENTS, distance, edm_network, sample, variance_preserving_network

from diffusers_imagen.diffusion import edm
from diffusers_imagen.diffusion.multistep import centred_sigmas
from diffusers_imagen.schedulers import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler


# the least of the errors of NVlabs/edm's Heun and diffusers' EDMEuler and EDMDPMSolverMultistep (orders 2 and 3), by
# calls of the network, on the reference mixture
BEST_OF_THE_OTHERS = {5: 0.1118, 10: 0.0804, 18: 0.0230, 35: 0.0021}


# ---- against the reference


@pytest.mark.parametrize("calls, limit", BEST_OF_THE_OTHERS.items())
def test_error_is_below_that_of_every_other_scheduler(calls, limit):
    assert distance(sample(EDMAdamsScheduler(), calls)) < limit
    assert distance(sample(EDMAdamsScheduler(), calls, dtype=torch.float32)) < limit


def test_error_falls_eightfold_when_steps_double():
    errors = [distance(sample(EDMAdamsScheduler(), steps)) for steps in (64, 128, 256)]
    assert errors[0] / errors[1] == pytest.approx(8, abs=1.5)
    assert errors[1] / errors[2] == pytest.approx(8, abs=1.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_variance_preserving_network_takes_the_same_way(prediction_type):
    trained = ContinuousDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    x = sample(EDMAdamsScheduler.from_config(trained.config), 18, variance_preserving_network(prediction_type))
    torch.testing.assert_close(x, sample(EDMAdamsScheduler(), 18), rtol=0, atol=1e-5)


def test_v_prediction_is_the_output_with_its_sign_turned():
    x = sample(EDMAdamsScheduler(prediction_type="v_prediction"), 10, lambda x, t: -edm_network(x, t))
    assert torch.equal(x, sample(EDMAdamsScheduler(), 10))


def test_one_and_two_steps():
    """One step is the denoised image at sigma_max; two are Euler's step from there, and the denoised image again."""
    one = sample(EDMAdamsScheduler(), 1)
    scheduler = EDMHeunScheduler()
    torch.testing.assert_close(one, sample(scheduler, 1), rtol=0, atol=1e-12)

    start = edm.c_noise(torch.tensor(80.0))
    c_skip, c_out, c_in = edm.preconditioning(torch.tensor(0.002, dtype=torch.float64), 0.5)
    sigma = torch.tensor(0.002, dtype=torch.float64)
    x = LATENTS * 0.002 + one * (1 - 0.002 / 80)
    expected = c_skip * x + c_out * edm_network(c_in * x, edm.c_noise(sigma))
    torch.testing.assert_close(sample(EDMAdamsScheduler(), 2), expected, rtol=0, atol=1e-5)
    assert EDMAdamsScheduler().timesteps[0] == start


# ---- the schedule


def test_published_schedule():
    scheduler = EDMAdamsScheduler()
    assert scheduler.init_noise_sigma == 80.0 and len(scheduler) == len(scheduler.timesteps) == 1000
    scheduler.set_timesteps(10)
    levels = centred_sigmas(10, 0.002, 80.0, 0.5)
    assert scheduler.order == 1 and scheduler.num_inference_steps == 10 and scheduler.init_noise_sigma == 80.0
    torch.testing.assert_close(scheduler.sigmas, torch.cat([levels, levels.new_zeros(1)]).float())
    torch.testing.assert_close(scheduler.timesteps, edm.c_noise(levels).float())


def test_sigmas_and_timesteps_of_the_caller():
    scheduler = EDMAdamsScheduler()
    scheduler.set_timesteps(sigmas=[40.0, 10.0, 1.0, 0.0])
    assert scheduler.sigmas.tolist() == [40, 10, 1, 0] and scheduler.init_noise_sigma == 40
    timesteps = scheduler.timesteps
    scheduler.set_timesteps(timesteps=timesteps)
    torch.testing.assert_close(scheduler.timesteps, timesteps)
    assert scheduler.num_inference_steps == 3


def test_start_inside_the_schedule():
    """A run from level k on is the run over the levels from k on."""
    part, alone = EDMAdamsScheduler(), EDMAdamsScheduler()
    part.set_timesteps(10)
    part.set_begin_index(4)
    alone.set_timesteps(timesteps=part.timesteps[4:])
    x = y = part.add_noise(torch.zeros_like(LATENTS), LATENTS, part.timesteps[4])
    torch.testing.assert_close(x, LATENTS * part.sigmas[4], rtol=1e-5, atol=0)
    for t, s in zip(part.timesteps[4:], alone.timesteps):
        x = part.step(edm_network(part.scale_model_input(x, t), t.double()), t, x).prev_sample
        y = alone.step(edm_network(alone.scale_model_input(y, s), s.double()), s, y).prev_sample
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert part.step_index == 10 and part.begin_index == 4


def test_a_second_run_forgets_the_first():
    scheduler = EDMAdamsScheduler()
    first = sample(scheduler, 6)
    scheduler.set_timesteps(6)
    scheduler.step(LATENTS, scheduler.timesteps[0], LATENTS)  # a run that was broken off
    assert torch.equal(sample(scheduler, 6), first)


def test_what_a_callback_changes_in_the_sample_counts():
    """Of a network that sees black everywhere only the shrinking sample is left, with what was added on the way."""
    scheduler = EDMAdamsScheduler()
    scheduler.set_timesteps(sigmas=[8.0, 4.0, 2.0, 1.0])
    x = torch.zeros(1, 2, dtype=torch.float64)
    for index, t in enumerate(scheduler.timesteps[:3]):
        c_skip, c_out, _ = edm.preconditioning(scheduler.sigmas[index].double(), 0.5)
        x = scheduler.step(-c_skip / c_out * x, t, x).prev_sample
        x = x + (1.0 if index == 1 else 0.0)
    torch.testing.assert_close(x, torch.full_like(x, 0.5), rtol=0, atol=1e-9)


# ---- precision, devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    scheduler = EDMAdamsScheduler(thresholding=True)
    scheduler.set_timesteps(6)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        x, denoised = scheduler.step(x_in * 0.1, t, x, return_dict=False)
        assert x_in.dtype == x.dtype == denoised.dtype == dtype and x.isfinite().all()
    assert x.abs().max() <= 1


def test_no_step_waits_for_a_device():
    # reading a number from a meta tensor raises
    scheduler = EDMAdamsScheduler(thresholding=True)
    scheduler.set_timesteps(5, device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(2, 3, 8, 8, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
    assert x.device.type == "meta"


@pytest.mark.parametrize("config", [{"clip_sample": True}, {"thresholding": True, "sample_max_value": 1.2}])
def test_thresholding(config):
    x, output = (80 * torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).unbind()
    oracle = DDPMScheduler(**{"clip_sample": False, **config})

    def denoised(**config):
        scheduler = EDMAdamsScheduler(**config)
        scheduler.set_timesteps(5)
        result = scheduler.step(output, scheduler.timesteps[0], x)
        # the first step is Euler's
        ratio = scheduler.sigmas[1] / scheduler.sigmas[0]
        expected = ratio * x + (1 - ratio) * result.pred_original_sample
        torch.testing.assert_close(result.prev_sample, expected, rtol=1e-4, atol=1e-4)
        return result.pred_original_sample

    plain = denoised()
    assert plain.abs().max() > 2
    expected = oracle._threshold_sample(plain) if config.get("thresholding") else plain.clamp(-1, 1)
    torch.testing.assert_close(denoised(**config), expected)


# ---- configuration


def test_configuration_round_trip(tmp_path):
    scheduler = EDMAdamsScheduler(sigma_max=40.0, sigma_data=0.6, thresholding=True)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "EDMAdamsScheduler"
    for other in (EDMAdamsScheduler.from_pretrained(tmp_path), EDMAdamsScheduler.from_config(scheduler.config)):
        values = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        assert {key: other.config[key] for key in values} == values
        assert torch.equal(sample(other, 5), sample(scheduler, 5))


@pytest.mark.parametrize("ours", [EDMAdamsScheduler, EDMHeunScheduler])
@pytest.mark.parametrize("other", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_configurations_of_diffusers_edm_schedulers_keep_their_meaning(ours, other):
    values = {"sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 0.6, "prediction_type": "v_prediction"}
    there = other.from_config(ours(**values).config)
    assert {key: there.config[key] for key in values} == values
    back = ours.from_config(other(rho=5.0, **values).config)
    assert {key: back.config[key] for key in values} == values and back.config.preconditioning == "edm"
    assert other.from_config(back.config).config.rho == 5.0
    with pytest.raises(ValueError, match="final_sigmas_type='zero'"):
        ours.from_config(other(final_sigmas_type="sigma_min").config)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("ours", [EDMAdamsScheduler, EDMHeunScheduler])
@pytest.mark.parametrize("other", [DDPMScheduler, DDIMScheduler])
def test_discrete_schedulers_and_edm_networks_refuse_each_other(ours, other, live, tmp_path):
    scheduler = ours()
    if not live:
        scheduler.save_pretrained(tmp_path)
        scheduler = ours.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="none: EDM noise levels is not implemented for .*" + other.__name__):
        other.from_config(scheduler.config)
    with pytest.raises(ValueError, match="beta_start=0.0001.*conditioned on an index"):
        ours.from_config(other().config)


@pytest.mark.parametrize("ours", [EDMAdamsScheduler, EDMHeunScheduler])
def test_configurations_go_round_among_ours(ours):
    trained = ContinuousDDPMScheduler(beta_schedule="linear", prediction_type="v_prediction", clip_sample=False)
    there = ours.from_config(trained.config)
    back = ContinuousDDPMScheduler.from_config(there.config)
    assert all(back.config[key] == trained.config[key] for key in trained.config if not key.startswith("_"))
    assert ContinuousDDPMScheduler.from_config(ours().config).config.preconditioning == "edm"
    heun = EDMHeunScheduler(rho=5.0, s_churn=3.0)
    again = EDMHeunScheduler.from_config(ours.from_config(heun.config).config)
    assert again.config.rho == 5.0 and again.config.s_churn == 3.0


# ---- bad input


@pytest.mark.parametrize(
    "config, message",
    [
        ({"sigma_min": 2.0, "sigma_max": 2.0}, "sigma_min=2.0"),
        ({"sigma_data": 0.0}, "sigma_data.*got 0"),
        ({"prediction_type": "sample"}, r"\['epsilon', 'v_prediction'\].*got 'sample'"),
        ({"preconditioning": "flow"}, "variance_preserving.*got 'flow'"),
        ({"sample_max_value": 0.5}, "got 0.5"),
        ({"num_train_timesteps": 0}, "got 0"),
    ],
)
def test_bad_configuration(config, message):
    with pytest.raises(ValueError, match=message):
        EDMAdamsScheduler(**config)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one"),
        ({"num_inference_steps": 3, "sigmas": [3.0, 2.0, 1.0]}, "exactly one"),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "integer, got 2.5"),
        ({"sigmas": [1.0, 2.0]}, r"decrease strictly, got \[1.0, 2.0\]"),
        ({"sigmas": []}, "above 0"),
        ({"sigmas": [math.nan, 1.0]}, "finite"),
        ({"timesteps": [999, 500]}, "float32 or float64"),
    ],
)
def test_bad_schedule(arguments, message):
    with pytest.raises(ValueError, match=message):
        EDMAdamsScheduler().set_timesteps(**arguments)


def test_bad_steps():
    scheduler, x = EDMAdamsScheduler(), torch.ones(1, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="between .* and .*; got 123"):
        scheduler.step(x, 123.0, x)
    with pytest.raises(ValueError, match="not an index; got 0"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match="shape of `sample`"):
        scheduler.step(torch.ones(1, 4), scheduler.timesteps[0], x)
    sample(scheduler, 3)
    with pytest.raises(ValueError, match="all of them"):
        scheduler.step(x, scheduler.timesteps[0], x)
