import pytest
import torch
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
    c_skip, c_out, c_in = edm.scalings(torch.tensor(0.002, dtype=torch.float64), 0.5)
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
    sigmas = centred_sigmas(10, 0.002, 80.0, 0.5)
    assert scheduler.order == 1 and scheduler.num_inference_steps == 10 and scheduler.init_noise_sigma == 80.0
    torch.testing.assert_close(scheduler.sigmas, torch.cat([sigmas, sigmas.new_zeros(1)]).float())
    torch.testing.assert_close(scheduler.timesteps, edm.c_noise(sigmas).float())


def test_sigmas_and_timesteps_of_the_caller():
    scheduler = EDMAdamsScheduler()
    scheduler.set_timesteps(sigmas=[40.0, 10.0, 1.0, 0.0])
    assert scheduler.sigmas.tolist() == [40, 10, 1, 0] and scheduler.init_noise_sigma == 40
    timesteps = scheduler.timesteps
    scheduler.set_timesteps(timesteps=timesteps)
    torch.testing.assert_close(scheduler.timesteps, timesteps)
    assert scheduler.num_inference_steps == 3


def test_start_inside_the_schedule():
    """A run from noise level k on is the run over the noise levels from k on."""
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
        c_skip, c_out, _ = edm.scalings(scheduler.sigmas[index].double(), 0.5)
        x = scheduler.step(-c_skip / c_out * x, t, x).prev_sample
        x = x + (1.0 if index == 1 else 0.0)
    torch.testing.assert_close(x, torch.full_like(x, 0.5), rtol=0, atol=1e-9)


def test_timesteps_are_no_indices():
    with pytest.raises(ValueError, match=r"`timesteps` is \[999, 500\], but should be in float32 or float64"):
        EDMAdamsScheduler().set_timesteps(timesteps=[999, 500])
