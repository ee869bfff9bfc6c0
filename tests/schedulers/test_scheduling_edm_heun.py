import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from ideal_networks import (
    LATENTS,
    REFERENCE,
    TOLERANCE,
    denoise,
    distance,
    edm_network,
    sample,
    variance_preserving_network,
)

from diffusers_imagen.diffusion import edm
from diffusers_imagen.schedulers import ContinuousDDPMScheduler, EDMHeunScheduler, scheduling_edm_heun


CHURN = {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}


# ---- against the reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "name, steps, config",
    [
        ("heun_deterministic_6", 6, {}),
        ("heun_deterministic_18", 18, {}),
        ("heun_deterministic_36", 36, {}),
        ("heun_smin0.01_smax20_rho5_12", 12, {"sigma_min": 0.01, "sigma_max": 20.0, "rho": 5.0}),
    ],
)
def test_reference_trajectories(name, steps, config, dtype):
    x = sample(EDMHeunScheduler(**config), steps, dtype=dtype)
    torch.testing.assert_close(x, REFERENCE[name], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_trajectory_with_churn(monkeypatch, dtype):
    sigmas = edm.karras_sigmas(18, 0.002, 80.0)
    draws = REFERENCE["churn_noise"][(sigmas >= 0.05) & (sigmas <= 50)]  # edm_sampler draws in every step
    iterator = iter(draws)
    monkeypatch.setattr(scheduling_edm_heun, "randn_tensor", lambda shape, dtype, **_: next(iterator).to(dtype))
    x = sample(EDMHeunScheduler(**CHURN), 18, dtype=dtype)
    torch.testing.assert_close(x, REFERENCE["heun_churn_18"], rtol=0, atol=TOLERANCE[dtype])
    assert next(iterator, None) is None


def test_error_falls_fourfold_when_steps_double():
    errors = [distance(sample(EDMHeunScheduler(), steps)) for steps in (32, 64, 128)]
    assert errors[0] / errors[1] == pytest.approx(4, abs=1)
    assert errors[1] / errors[2] == pytest.approx(4, abs=1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_variance_preserving_network_takes_the_same_way(prediction_type):
    trained = ContinuousDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler = EDMHeunScheduler.from_config(trained.config)
    x = sample(scheduler, 18, variance_preserving_network(prediction_type))
    # what is left is the rounding of the published log-SNR to float32
    torch.testing.assert_close(x, REFERENCE["heun_deterministic_18"], rtol=0, atol=1e-5)


def test_v_prediction_is_the_output_with_its_sign_turned():
    scheduler = EDMHeunScheduler(prediction_type="v_prediction")
    x = sample(scheduler, 18, lambda x, t: -edm_network(x, t))
    torch.testing.assert_close(x, REFERENCE["heun_deterministic_18"], rtol=0, atol=1e-6)


# ---- the schedule


def test_published_schedule():
    scheduler = EDMHeunScheduler(**CHURN)
    scheduler.set_timesteps(18)
    sigmas = edm.karras_sigmas(18, 0.002, 80.0)
    raised = edm.churned_sigmas(sigmas, 40.0, 0.05, 50.0)
    assert scheduler.order == 2 and scheduler.num_inference_steps == 18
    assert scheduler.timesteps.shape == (35,) and scheduler.timesteps.dtype == torch.float32
    torch.testing.assert_close(scheduler.timesteps[::2], edm.c_noise(raised).float())
    torch.testing.assert_close(scheduler.timesteps[1::2], edm.c_noise(sigmas[1:]).float())
    torch.testing.assert_close(scheduler.sigmas[:-1], edm.c_noise_to_sigma(scheduler.timesteps), rtol=1e-5, atol=0)
    assert scheduler.sigmas[-1] == 0 and scheduler.init_noise_sigma == 80.0


def test_the_first_churn_is_part_of_the_initial_noise():
    scheduler = EDMHeunScheduler(s_churn=1.0, s_noise=1.5)
    assert scheduler.init_noise_sigma == 80.0
    scheduler.set_timesteps(10)
    raised = 80 * 1.1
    assert scheduler.sigmas[0].item() == pytest.approx(raised)
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(80**2 + 1.5**2 * (raised**2 - 80**2)))


@pytest.mark.parametrize("churn", [{}, {"s_churn": 10.0}])
def test_one_step(churn):
    scheduler = EDMHeunScheduler(**churn)
    x = sample(scheduler, 1)
    assert len(scheduler.timesteps) == 1
    sigma = scheduler.sigmas[0].double()
    torch.testing.assert_close(x, denoise(LATENTS * scheduler.init_noise_sigma, sigma), rtol=0, atol=1e-6)


def test_sigmas_and_timesteps_of_the_caller():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(sigmas=[80.0, 10.0, 1.0])
    assert scheduler.sigmas.tolist() == [80, 10, 10, 1, 1, 0] and scheduler.num_inference_steps == 3
    timesteps = scheduler.timesteps
    scheduler.set_timesteps(sigmas=torch.tensor([80.0, 10.0, 1.0, 0.0]))
    assert torch.equal(scheduler.timesteps, timesteps)
    scheduler.set_timesteps(timesteps=timesteps[[0, 2, 4]])
    assert torch.equal(scheduler.timesteps, timesteps)
    sigmas = edm.karras_sigmas(18, 0.002, 80.0)
    x = sample(scheduler, 18)
    scheduler.set_timesteps = lambda steps: EDMHeunScheduler.set_timesteps(scheduler, sigmas=sigmas)
    assert torch.equal(sample(scheduler, 18), x)


@pytest.mark.parametrize("churn", [{}, {"s_churn": 10.0}])
def test_start_inside_the_schedule(churn):
    whole, part = EDMHeunScheduler(**churn), EDMHeunScheduler(**churn)
    whole.set_timesteps(8)
    part.set_timesteps(8)
    part.set_begin_index(6)
    x = LATENTS * whole.init_noise_sigma
    generator = torch.Generator().manual_seed(0)
    for index, t in enumerate(whole.timesteps):
        if index == 6:
            # the noise level that image-to-image adds noise of is that of the sample at this point
            noisy = part.add_noise(torch.zeros_like(x), torch.ones_like(x), part.timesteps[6:7])
            torch.testing.assert_close(noisy, torch.full_like(x, part.sigmas[6].item()), rtol=1e-5, atol=0)
            y = x
        x_next = whole.step(edm_network(whole.scale_model_input(x, t), t.double()), t, x, generator=generator)
        if index >= 6:
            other = part.step(edm_network(part.scale_model_input(y, t), t.double()), t, y, generator=generator)
            if index % 2 == 0 or not churn:
                torch.testing.assert_close(other.prev_sample, x_next.prev_sample)
            y = x_next.prev_sample
        x = x_next.prev_sample
    assert part.step_index == whole.step_index == 15 and part.begin_index == 6


def test_a_start_is_found_by_its_timestep():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(8)
    scheduler.step(torch.zeros(1, 2), scheduler.timesteps[6].item(), torch.ones(1, 2))
    assert scheduler.step_index == 7


def test_scale_model_input_before_set_timesteps():
    scheduler = EDMHeunScheduler()
    torch.testing.assert_close(
        scheduler.scale_model_input(torch.ones(1, 3), 0.0), torch.full((1, 3), 1 / math.sqrt(1.25))
    )
    assert scheduler.step_index is None
    assert len(scheduler) == len(scheduler.timesteps) == 1000


# ---- randomness


def test_no_noise_is_drawn_without_churn():
    generator, state = torch.Generator().manual_seed(0), torch.get_rng_state()
    before = generator.get_state()
    sample(EDMHeunScheduler(), 6, generator=generator)
    sample(EDMHeunScheduler(s_churn=10.0, s_max=1e-3), 6, generator=generator)
    assert torch.equal(generator.get_state(), before) and torch.equal(torch.get_rng_state(), state)


def test_churn_draws_from_the_callers_generator():
    def run(seed):
        state = torch.get_rng_state()
        x = sample(EDMHeunScheduler(**CHURN), 6, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), state)
        return x

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    generators = [torch.Generator().manual_seed(index) for index in range(64)]
    alone = sample(EDMHeunScheduler(**CHURN), 6, latents=LATENTS[3:4], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample(EDMHeunScheduler(**CHURN), 6, generator=generators)[3:4], alone)


# ---- preconditioning


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_preconditioning_is_that_of_diffusers(prediction_type):
    euler = EDMEulerScheduler(prediction_type=prediction_type)
    heun = EDMHeunScheduler.from_config(euler.config)
    x, output = torch.randn(2, 2, 3, 4, 4).unbind()
    for sigma in (0.002, 0.5, 80.0):
        torch.testing.assert_close(heun.precondition_inputs(x, sigma), euler.precondition_inputs(x, sigma))
        torch.testing.assert_close(heun.precondition_noise(sigma), euler.precondition_noise(sigma)[0])
        torch.testing.assert_close(
            heun.precondition_outputs(x, output, sigma), euler.precondition_outputs(x, output, sigma)
        )


def test_add_noise():
    scheduler = EDMHeunScheduler()
    x, noise = torch.randn(2, 2, 3, 4, 4).unbind()
    timesteps = edm.c_noise(torch.tensor([0.5, 3.0]))
    noisy = scheduler.add_noise(x, noise, timesteps)
    torch.testing.assert_close(noisy, x + torch.tensor([0.5, 3.0]).reshape(2, 1, 1, 1) * noise)
    for wrong in (torch.tensor([3, 4]), timesteps.half()):
        with pytest.raises(ValueError, match="float32 or float64"):
            scheduler.add_noise(x, noise, wrong)


# ---- configuration


@pytest.mark.parametrize("other", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_from_config_keeps_the_meaning(other):
    values = {"sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 0.6, "rho": 5.0, "prediction_type": "v_prediction"}
    for scheduler in (other.from_config(EDMHeunScheduler(**values).config), other(**values)):
        heun = EDMHeunScheduler.from_config(scheduler.config)
        assert {key: heun.config[key] for key in values} == {key: scheduler.config[key] for key in values} == values
    # a default of the other class that differs from ours
    assert EDMHeunScheduler.from_config(EDMDPMSolverMultistepScheduler().config).config.sample_max_value == 1.0


# ---- bad input


def test_bad_steps():
    scheduler, x = EDMHeunScheduler(s_churn=5.0), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"`timesteps` is \[999, 500\], but should be in float32 or float64"):
        scheduler.set_timesteps(timesteps=[999, 500])
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="second half"):
        scheduler.step(x, scheduler.timesteps[1], x)
    with pytest.raises(ValueError, match="`begin_index` is 3, but .* multiple of the order 2"):
        scheduler.set_begin_index(3)
