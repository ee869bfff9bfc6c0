import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from diffusers.training_utils import compute_snr

from diffusers_imagen.diffusion import continuous_ddpm as ddpm
from diffusers_imagen.diffusion import edm
from diffusers_imagen.schedulers import ContinuousDDPMScheduler, EDMHeunScheduler


MEAN, STD = 0.3, 0.4
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def gaussian_network(prediction_type="epsilon"):
    """An ideal network for data ~ Normal(MEAN, STD^2): it sees x_t and the log-SNR only."""

    def network(x_t, log_snr):
        alpha, sigma = ddpm.alpha_sigma(log_snr.double())
        x_0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t.double() - alpha * MEAN)
        noise = (x_t - alpha * x_0) / sigma
        return {"epsilon": noise, "sample": x_0, "v_prediction": alpha * noise - sigma * x_0}[prediction_type]

    return network


def gaussian_edm_network(x_in, c_noise):
    sigma = edm.c_noise_to_sigma(c_noise.double())
    c_skip, c_out, c_in = edm.scalings(sigma, 0.5)
    x = x_in / c_in
    return (MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN) - c_skip * x) / c_out


def sample(scheduler, steps, network, latents, seed=0):
    """The loop of any diffusers pipeline."""
    scheduler.set_timesteps(steps)
    x, generator = latents * scheduler.init_noise_sigma, torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
    return x


def unit_noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


# ---- closed forms


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
def test_sampling_reproduces_a_gaussian(eta, schedule):
    scheduler = ContinuousDDPMScheduler(beta_schedule=schedule, eta=eta, clip_sample=False)
    x = sample(scheduler, 400, gaussian_network(), unit_noise(20_000, 1))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x.std().item() == pytest.approx(STD, rel=0.03)


def test_deterministic_steps_converge_to_the_probability_flow():
    latents = unit_noise(64, 1)
    exact = MEAN + STD * latents  # what the flow makes of a Gaussian, up to the noise that t = 0 leaves

    def error(steps):
        scheduler = ContinuousDDPMScheduler(eta=0.0, clip_sample=False)
        return (sample(scheduler, steps, gaussian_network(), latents) - exact).abs().mean().item()

    assert error(400) < 2e-3 and error(50) / error(100) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_all_predictions_take_the_same_way(eta):
    latents = unit_noise(16, 1)
    results = []
    for prediction_type in PREDICTIONS:
        scheduler = ContinuousDDPMScheduler(prediction_type=prediction_type, eta=eta, clip_sample=False)
        results.append(sample(scheduler, 20, gaussian_network(prediction_type), latents))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(results[2], results[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_edm_network_takes_the_same_way(eta):
    latents = unit_noise(16, 1)
    expected = sample(
        ContinuousDDPMScheduler(prediction_type="sample", eta=eta, clip_sample=False),
        20,
        gaussian_network("sample"),
        latents,
    )
    config = {**EDMHeunScheduler().config, "eta": eta}
    scheduler = ContinuousDDPMScheduler.from_config(config)
    assert scheduler.config.preconditioning == "edm"
    torch.testing.assert_close(sample(scheduler, 20, gaussian_edm_network, latents), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("thresholds", [{"clip_sample": False}, {}, {"thresholding": True, "sample_max_value": 1.5}])
def test_one_step_is_that_of_ddim(prediction_type, thresholds, eta):
    ours = ContinuousDDPMScheduler(prediction_type=prediction_type, eta=eta, **thresholds)
    ours.set_timesteps(timesteps=[800, 600])
    ddim = DDIMScheduler(prediction_type=prediction_type, **thresholds)
    ddim.alphas_cumprod = ours.alphas_cumprod
    ddim.set_timesteps(5)  # its steps are 200 long
    x, output = unit_noise(2, 2, 3, 8, 8, dtype=torch.float32).unbind()
    result = ours.step(output, ours.timesteps[0], x, generator=torch.Generator().manual_seed(0))
    # "use_clipped_model_output": the direction to x_t comes from the thresholded image, as in the ancestral step
    expected = ddim.step(
        output, 800, x, eta=eta, use_clipped_model_output=True, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(result.prev_sample, expected.prev_sample, rtol=0, atol=2e-5)
    torch.testing.assert_close(result.pred_original_sample, expected.pred_original_sample, rtol=0, atol=2e-5)


# ---- the schedule


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
def test_published_schedule(schedule):
    scheduler = ContinuousDDPMScheduler(beta_schedule=schedule)
    scheduler.set_timesteps(8)
    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    expected = ddpm.log_snr(times, schedule)
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1 and scheduler.num_inference_steps == 8
    torch.testing.assert_close(scheduler.timesteps, expected[:-1].float())
    torch.testing.assert_close(scheduler.sigmas, torch.exp(-expected / 2).float())


def test_one_step():
    scheduler = ContinuousDDPMScheduler(prediction_type="sample")
    x = sample(scheduler, 1, lambda x, t: torch.full_like(x, 0.25), unit_noise(2, 3))
    torch.testing.assert_close(x, torch.full_like(x, 0.25), rtol=0, atol=1e-4)


def test_timesteps_and_sigmas_of_the_caller():
    scheduler = ContinuousDDPMScheduler()
    scheduler.set_timesteps(4)
    published = scheduler.timesteps.clone()
    for custom in ({"timesteps": published}, {"timesteps": [1000, 750, 500, 250]}, {"sigmas": scheduler.sigmas[:-1]}):
        scheduler.set_timesteps(**custom)
        torch.testing.assert_close(scheduler.timesteps, published, rtol=1e-5, atol=1e-5)
        assert scheduler.num_inference_steps == 4 and len(scheduler.sigmas) == 5


def test_start_inside_the_schedule():
    scheduler, x = ContinuousDDPMScheduler(), torch.zeros(2, 3)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    noisy = scheduler.add_noise(x, torch.ones_like(x), scheduler.timesteps[4:5])
    torch.testing.assert_close(noisy, ddpm.alpha_sigma(scheduler.timesteps[4]).sigma.expand_as(x))
    for t in scheduler.timesteps[4:]:
        x = scheduler.step(x, t, x).prev_sample
    assert scheduler.step_index == 10 and scheduler.begin_index == 4
    scheduler.set_timesteps(10)
    assert scheduler.step_index is None and scheduler.begin_index is None


# ---- training


def test_integer_timesteps_are_fractions_of_time():
    scheduler = ContinuousDDPMScheduler(num_train_timesteps=500)
    k = torch.tensor([0, 20, 250, 499])
    log_snr = ddpm.log_snr(k / 500)
    torch.testing.assert_close(scheduler.conditioning(k), log_snr)
    torch.testing.assert_close(compute_snr(scheduler, k), log_snr.exp(), rtol=1e-3, atol=0)
    assert scheduler.alphas_cumprod.shape == (500,) and len(scheduler) == len(scheduler.timesteps) == 500

    oracle = DDPMScheduler(num_train_timesteps=500)
    oracle.alphas_cumprod = scheduler.alphas_cumprod
    x_0, noise = unit_noise(2, 4, 3, 4, 4, dtype=torch.float32).unbind()
    for timesteps in (k, scheduler.conditioning(k)):
        torch.testing.assert_close(scheduler.add_noise(x_0, noise, timesteps), oracle.add_noise(x_0, noise, k))
        torch.testing.assert_close(scheduler.get_velocity(x_0, noise, timesteps), oracle.get_velocity(x_0, noise, k))


def test_an_edm_network_is_conditioned_on_c_noise():
    scheduler = ContinuousDDPMScheduler(preconditioning="edm")
    sigma = ddpm.log_snr_to_sigma(ddpm.log_snr(torch.tensor([0.5])))
    torch.testing.assert_close(scheduler.conditioning(torch.tensor([500])), edm.c_noise(sigma))
    x = torch.ones(1, 3)
    value = edm.c_noise(sigma)
    expected = torch.sqrt(1 + sigma**2) * edm.scalings(sigma, 0.5).c_in
    torch.testing.assert_close(scheduler.scale_model_input(x, value), x * expected)


# ---- randomness


def test_noise_comes_from_the_callers_generator():
    state = torch.get_rng_state()
    latents, network = unit_noise(4, 3), gaussian_network()
    runs = [sample(ContinuousDDPMScheduler(), 5, network, latents, seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    runs = [sample(ContinuousDDPMScheduler(eta=0.0), 5, network, latents, seed) for seed in (0, 1)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(torch.get_rng_state(), state)


# ---- configuration


def test_defaults_reach_other_schedulers(tmp_path):
    live = ContinuousDDPMScheduler()
    live.save_pretrained(tmp_path)
    for scheduler in (live, ContinuousDDPMScheduler.from_pretrained(tmp_path)):
        other = DDPMScheduler.from_config(scheduler.config)
        assert other.config.beta_schedule == "squaredcos_cap_v2" and other.config.sample_max_value is None
        back = ContinuousDDPMScheduler.from_config(other.config)
        assert all(back.config[key] == live.config[key] for key in live.config if not key.startswith("_"))
    heun = EDMHeunScheduler.from_config(live.config)
    assert heun.config.preconditioning == "variance_preserving" and heun.config.clip_sample


def test_from_config_of_diffusers_schedulers():
    scheduler = ContinuousDDPMScheduler.from_config(DDPMScheduler(beta_schedule="squaredcos_cap_v2").config)
    assert scheduler.config.preconditioning == "discrete" and scheduler.config.beta_schedule == "squaredcos_cap_v2"
    scheduler = ContinuousDDPMScheduler.from_config(EDMEulerScheduler(sigma_data=0.6).config)
    assert scheduler.config.preconditioning == "edm" and scheduler.config.sigma_data == 0.6
    assert not scheduler.config.clip_sample


# ---- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"timesteps": [500, 600]}, "decrease strictly"),
        ({"timesteps": [500, 0]}, "above that of t = 0"),
        ({"timesteps": [1001, 0]}, r"`timesteps` is \[1001, 0\], but .*between 0 and 1000"),
        ({"timesteps": [2.0, 1.0]}, "decrease strictly"),
        ({"sigmas": [1.0, 0.001]}, "`sigmas` ends at 0.001, but .* above that of t = 0"),
    ],
)
def test_bad_schedule(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContinuousDDPMScheduler().set_timesteps(**arguments)
