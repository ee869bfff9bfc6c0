"""Networks trained with discrete betas, which are told an index, driven by this package's schedulers."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from ideal_networks import discrete_network, sample

from diffusers_imagen.diffusion import continuous_ddpm, discrete_ddpm
from diffusers_imagen.schedulers import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler


OF_EDM = [EDMAdamsScheduler, EDMHeunScheduler]
OURS = [*OF_EDM, ContinuousDDPMScheduler]
BETAS = {"beta_schedule": "squaredcos_cap_v2"}
COSINE = discrete_ddpm.trained_log_snrs(1000, "squaredcos_cap_v2", 0.0001, 0.02)
IF_THRESHOLDS = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
for_each = pytest.mark.parametrize("scheduler_class", OURS)


def unit_noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def plain(**config):
    """The configuration of diffusers' DDPM without thresholding."""
    return DDPMScheduler(**BETAS, clip_sample=False, **config).config


# ---- closed forms

MEAN, STD = 0.3, 0.4


def gaussian_network(x_t, index):
    """The noise that an ideal network of data ~ Normal(MEAN, STD^2) predicts: it sees x_t and the index only."""
    alpha, sigma = continuous_ddpm.alpha_sigma(discrete_ddpm.index_to_log_snr(index.double(), COSINE))
    return sigma * (x_t.double() - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


@pytest.mark.parametrize(
    "scheduler_class, steps, factor, limit",
    [(EDMAdamsScheduler, 40, 8, 2e-4), (EDMHeunScheduler, 40, 4, 2e-3), (ContinuousDDPMScheduler, 100, 2, 5e-3)],
)
def test_sampling_converges_to_the_ode(scheduler_class, steps, factor, limit):
    latents = unit_noise(64, 1)
    eta = {"eta": 0.0} if scheduler_class is ContinuousDDPMScheduler else {}
    scheduler = scheduler_class.from_config(plain(), **eta)
    # the EDM image at sigma 80; a sample of unit noise is x_t, alpha times that
    x_start = latents * (1 + 80**2) ** 0.5 if eta else latents * 80
    # the EDM schedulers solve the ODE down to `sigma_min`, and end at the denoised image there
    sigma = 0 if eta else scheduler.config.sigma_min
    x = MEAN + ((STD**2 + sigma**2) / (STD**2 + 80**2)) ** 0.5 * (x_start - MEAN)
    exact = MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)

    def error(count):
        return (sample(scheduler, count, gaussian_network, latents=latents) - exact).abs().mean().item()

    errors = error(steps), error(2 * steps)
    assert errors[1] < limit and errors[0] / errors[1] == pytest.approx(factor, rel=0.3)


@pytest.mark.parametrize("prediction_type", continuous_ddpm.PREDICTION_TYPES)
@pytest.mark.parametrize("scheduler_class", OF_EDM)
def test_a_discrete_network_takes_the_way_of_an_edm_network(scheduler_class, prediction_type):
    scheduler = scheduler_class.from_config(plain(prediction_type=prediction_type))
    x = sample(scheduler, 18, discrete_network(prediction_type, COSINE))
    expected = sample(scheduler_class(sigma_min=scheduler.config.sigma_min), 18)
    # what is left is the rounding of the published index to float32
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ancestral_sampling_reproduces_a_gaussian(eta):
    scheduler = ContinuousDDPMScheduler.from_config(plain(), eta=eta)
    x = sample(
        scheduler, 400, gaussian_network, latents=unit_noise(20_000, 1), generator=torch.Generator().manual_seed(0)
    )
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x.std().item() == pytest.approx(STD, rel=0.03)


# ---- against diffusers


@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("thresholds", [{"clip_sample": False}, {"clip_sample": True}, IF_THRESHOLDS])
def test_trajectories_are_those_of_ddim(thresholds, guidance):
    ddim = DDIMScheduler(**BETAS, **thresholds)
    ours = ContinuousDDPMScheduler.from_config(ddim.config, eta=0.0)
    ddim.set_timesteps(50)
    ours.set_timesteps(timesteps=ddim.timesteps.tolist())
    assert torch.equal(ours.timesteps, ddim.timesteps.float())
    x = y = unit_noise(2, 3, 16, 16, dtype=torch.float32)

    def network(x_t, t):
        noise = gaussian_network(x_t, t).float()
        return noise + guidance * 0.1 * torch.sin(2 * x_t)

    for t, k in zip(ours.timesteps, ddim.timesteps):
        # "use_clipped_model_output": the direction to x_t comes from the thresholded image
        x = ours.step(network(ours.scale_model_input(x, t), t), t, x).prev_sample
        y = ddim.step(network(y, k), k, y, use_clipped_model_output=True).prev_sample
    assert (x - y).norm() < 1e-5 * y.norm()


@pytest.mark.parametrize("thresholds", [{"clip_sample": False}, IF_THRESHOLDS])
def test_ancestral_trajectories_are_those_of_ddpm(thresholds):
    ddpm = DDPMScheduler(**BETAS, **thresholds, variance_type="fixed_small")
    ours = ContinuousDDPMScheduler.from_config(ddpm.config)
    ddpm.set_timesteps(50)
    ours.set_timesteps(timesteps=ddpm.timesteps)
    x = y = unit_noise(2, 3, 16, 16, dtype=torch.float32)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for t, k in zip(ours.timesteps, ddpm.timesteps):
        x = ours.step(gaussian_network(x, t).float() + torch.sin(x), t, x, generator=generators[0]).prev_sample
        y = ddpm.step(gaussian_network(y, k).float() + torch.sin(y), k, y, generator=generators[1]).prev_sample
    # diffusers' variances are of betas in float32
    assert (x - y).norm() < 2e-5 * y.norm()


@for_each
def test_noise_is_that_of_ddpm_at_integers_and_floats(scheduler_class):
    ddpm = DDPMScheduler(**BETAS)
    ours = scheduler_class.from_config(ddpm.config)
    k = torch.tensor([0, 20, 250, 990])
    x_0, noise = unit_noise(2, 4, 3, 4, 4, dtype=torch.float32).unbind()
    # the EDM schedulers' image is x_t / alpha
    alpha = ddpm.alphas_cumprod[k].sqrt().reshape(4, 1, 1, 1) if scheduler_class in OF_EDM else 1
    for timesteps in (k, k.float()):
        noisy = ours.add_noise(x_0, noise, timesteps)
        torch.testing.assert_close(alpha * noisy, ddpm.add_noise(x_0, noise, k), rtol=1e-5, atol=1e-5)


def test_training_helpers_are_those_of_ddpm():
    ddpm = DDPMScheduler(**BETAS)
    ours = ContinuousDDPMScheduler.from_config(ddpm.config)
    k = torch.tensor([0, 20, 250, 999])
    torch.testing.assert_close(ours.alphas_cumprod, ddpm.alphas_cumprod, rtol=1e-4, atol=0)
    torch.testing.assert_close(compute_snr(ours, k), compute_snr(ddpm, k), rtol=1e-3, atol=0)
    torch.testing.assert_close(ours.conditioning(k), k.float(), rtol=0, atol=1e-3)
    assert torch.equal(ours.timesteps, ddpm.timesteps.float()) and len(ours.sigmas) == 1001 and ours.sigmas[-1] == 0
    x_0, noise = unit_noise(2, 4, 3, 4, 4, dtype=torch.float32).unbind()
    torch.testing.assert_close(ours.get_velocity(x_0, noise, k), ddpm.get_velocity(x_0, noise, k))


# ---- configuration


@for_each
@pytest.mark.parametrize(
    "values",
    [
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "v_prediction",
        },
        {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.3], **IF_THRESHOLDS},
        {"num_train_timesteps": 3, "trained_betas": np.array([0.1, 0.2, 0.3])},
    ],
)
def test_configuration_round_trip(scheduler_class, values, tmp_path):
    scheduler = scheduler_class(preconditioning="discrete", **values)
    scheduler.save_pretrained(tmp_path)
    kept = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    assert {
        key: list(value) if key == "trained_betas" else value for key, value in values.items()
    }.items() <= kept.items()
    latents, draws = unit_noise(4, 3), "generator" in inspect.signature(scheduler.step).parameters
    for other in (scheduler_class.from_pretrained(tmp_path), scheduler_class.from_config(scheduler.config)):
        assert {key: other.config[key] for key in kept} == kept
        runs = [
            sample(
                each,
                2,
                lambda x, t: torch.sin(x + t),
                latents=latents,
                **({"generator": torch.Generator().manual_seed(0)} if draws else {}),
            )
            for each in (scheduler, other)
        ]
        assert torch.equal(*runs) and torch.equal(scheduler.timesteps, other.timesteps)


@for_each
@pytest.mark.parametrize("other", OURS)
def test_configurations_go_round_among_ours(scheduler_class, other):
    config = DDPMScheduler(beta_schedule="linear", num_train_timesteps=500, **IF_THRESHOLDS).config
    first = scheduler_class.from_config(config)
    there = other.from_config(first.config)
    back = scheduler_class.from_config(there.config)
    assert all(back.config[key] == first.config[key] for key in first.config if not key.startswith("_"))
    for index in (0.0, 17.5, 499.0):
        assert there.timestep_to_sigma(index) == first.timestep_to_sigma(index)


# ---- the schedule


@for_each
def test_runs_start_at_sigma_80_and_not_at_the_last_index(scheduler_class):
    scheduler = scheduler_class.from_config(DDPMScheduler(**BETAS).config)
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[0].item() == pytest.approx(80) and scheduler.sigmas[-1] == 0
    assert scheduler.timesteps[0].item() == pytest.approx(990.978, abs=1e-3)
    assert (scheduler.timesteps.diff() <= 0).all() and scheduler.timesteps[-1] >= 0
    if scheduler_class in OF_EDM:
        assert scheduler.config.sigma_max == 80 and scheduler.config.sigma_min == pytest.approx(0.006425, abs=1e-6)
        assert scheduler.timesteps[-1].item() == pytest.approx(0, abs=1e-9)


def test_times_are_evenly_spaced_indices():
    scheduler = ContinuousDDPMScheduler(preconditioning="discrete", beta_schedule="linear")
    scheduler.set_timesteps(5)  # sigma 80 lies below the last one, 157
    start = scheduler.timesteps[0].item()
    expected = torch.linspace(start, -1, 6)[:-1]
    torch.testing.assert_close(scheduler.timesteps, expected, rtol=0, atol=1e-3)
    scheduler = ContinuousDDPMScheduler(num_train_timesteps=20, preconditioning="discrete", beta_schedule="linear")
    scheduler.set_timesteps(20)
    torch.testing.assert_close(scheduler.timesteps, torch.arange(19.0, -1, -1), rtol=0, atol=1e-5)


@for_each
def test_timesteps_and_sigmas_of_the_caller(scheduler_class):
    scheduler = scheduler_class(preconditioning="discrete", **BETAS)
    scheduler.set_timesteps(timesteps=[999, 500, 250, 0])
    step = scheduler.order
    torch.testing.assert_close(scheduler.timesteps[::step], torch.tensor([999.0, 500, 250, 0]), rtol=0, atol=1e-5)
    sigmas = [20_290.0, 71.3, 0.4268, 0.00643]
    scheduler.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(scheduler.sigmas[:-1:step], torch.tensor(sigmas))
    published = scheduler.sigmas[:-1:step]
    scheduler.set_timesteps(sigmas=published)
    scheduler.set_timesteps(timesteps=scheduler.timesteps[::step])


@for_each
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sigmas": [1.0, 0.002]}, r"`sigmas` is \[1.0, 0.002\], but .* noise levels within the range of training, in \[0.00642541, 20291"),
        ({"sigmas": [3e4, 1.0]}, "`sigmas` is .*noise levels within the range of training"),
        ({"timesteps": [1000, 500]}, r"`timesteps` is \[1000, 500\], but should be in \[0, 999\]"),
        ({"timesteps": [500.0, -0.5]}, r"`timesteps` .* in \[0, 999\], the indices"),
        ({"timesteps": [float("nan")]}, r"`timesteps` .* in \[0, 999\], the indices"),
        ({"timesteps": [500, 600]}, "decrease strictly"),
    ],
)  # fmt: skip
def test_bad_schedule(scheduler_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduler_class(preconditioning="discrete", **BETAS).set_timesteps(**arguments)


def test_no_more_steps_than_indices():
    with pytest.raises(ValueError, match="`num_inference_steps` is 1000, but should be at most 991"):
        ContinuousDDPMScheduler(preconditioning="discrete", **BETAS).set_timesteps(1000)


def test_churn_stays_within_the_noise_levels_of_training():
    scheduler = EDMHeunScheduler(preconditioning="discrete", beta_schedule="scaled_linear", s_churn=40.0)
    top = scheduler.config.sigma_max
    assert top < 80
    scheduler.set_timesteps(10)
    assert scheduler.sigmas.max().item() == pytest.approx(top) and scheduler.init_noise_sigma == pytest.approx(top)
    assert scheduler.timesteps[0] == 999 and scheduler.sigmas[2] > scheduler.sigmas[1]


@for_each
def test_integers_out_of_range_are_refused(scheduler_class):
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"`timesteps` is \[1000\], but should be in \[0, 999\], the indices"):
        scheduler_class(preconditioning="discrete").add_noise(x, x, torch.tensor([1000]))
