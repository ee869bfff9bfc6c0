import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_imagen.diffusion import continuous_ddpm, discrete_ddpm
from diffusers_imagen.diffusion.preconditioning import DiscretePreconditioning


SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
    "sigmoid": {"num_train_timesteps": 500},
}
NAMES = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02}
COSINE = discrete_ddpm.trained_log_snrs(**NAMES, beta_schedule="squaredcos_cap_v2")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_are_those_of_diffusers(schedule):
    names = {**NAMES, "beta_schedule": schedule, **SCHEDULES[schedule]}
    diffusers = DDPMScheduler(**names)
    betas = discrete_ddpm.scheduled_betas(**names)
    assert betas.dtype == torch.float64
    # diffusers' are differences of numbers near 1 in places
    torch.testing.assert_close(betas.float(), diffusers.betas, rtol=2e-5, atol=1e-7)
    log_snrs = discrete_ddpm.trained_log_snrs(**names)
    assert log_snrs.dtype == torch.float64 and (log_snrs.diff() < 0).all()
    torch.testing.assert_close(log_snrs.sigmoid().float(), diffusers.alphas_cumprod, rtol=1e-4, atol=1e-8)
    assert tuple(discrete_ddpm.BETA_SCHEDULES) == tuple(SCHEDULES)


def test_given_betas_go_before_the_schedule():
    betas = (0.1, 0.2, 0.5)
    log_snrs = discrete_ddpm.trained_log_snrs(3, "linear", 0.1, 0.2, betas)
    alpha_squared = torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64)
    torch.testing.assert_close(log_snrs, alpha_squared.logit())


def test_unknown_schedule():
    with pytest.raises(ValueError, match="`beta_schedule` is 'laplace', but should be one of .*'sigmoid'"):
        discrete_ddpm.scheduled_betas(1000, "laplace", 0.1, 0.2)


def test_noise_levels_of_deepfloyd():
    index = torch.tensor([0, 250, 990, 999], dtype=torch.float64)
    sigma = continuous_ddpm.log_snr_to_sigma(discrete_ddpm.index_to_log_snr(index, COSINE))
    torch.testing.assert_close(sigma, torch.tensor([0.006425, 0.4268, 71.3, 20291.0]).double(), rtol=2e-4, atol=0)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 5e-4)])
def test_indices_go_there_and_back(dtype, atol):
    index = torch.cat([torch.arange(1000), torch.tensor([0.25, 17.5, 998.9])]).to(dtype).reshape(17, 59)
    log_snr = discrete_ddpm.index_to_log_snr(index, COSINE)
    back = discrete_ddpm.log_snr_to_index(log_snr, COSINE)
    assert log_snr.dtype == back.dtype == dtype
    torch.testing.assert_close(back, index, rtol=0, atol=atol)
    torch.testing.assert_close(log_snr.flatten()[:1000], COSINE.to(dtype))


def test_the_log_snr_is_linear_between_indices_and_constant_beyond():
    index = torch.tensor([41.25, -3.0, 1005.0], dtype=torch.float64)
    expected = torch.stack([0.75 * COSINE[41] + 0.25 * COSINE[42], COSINE[0], COSINE[999]])
    torch.testing.assert_close(discrete_ddpm.index_to_log_snr(index, COSINE), expected)
    beyond = torch.tensor([50.0, -50.0], dtype=torch.float64)
    assert discrete_ddpm.log_snr_to_index(beyond, COSINE).tolist() == [0, 999]


@pytest.mark.parametrize("prediction_type", continuous_ddpm.PREDICTION_TYPES)
def test_denoised_images_are_those_of_diffusers(prediction_type):
    """At 28 noise levels, in float32, as the published formula has them in its own rounding."""
    ddpm = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False)
    ours = DiscretePreconditioning(prediction_type, beta_schedule="squaredcos_cap_v2", **NAMES, trained_betas=None)
    x_t, output = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for k in torch.linspace(0, 999, 28).long():
        expected = ddpm.step(output, k, x_t).pred_original_sample
        sigma = ours.timestep_to_sigma(k.float())
        scalings = ours.scalings(sigma)
        denoised = scalings.c_skip / scalings.c_in * x_t + scalings.c_out * output
        assert (denoised - expected).norm() < 1e-5 * expected.norm(), k
        torch.testing.assert_close(ours.sigma_to_timestep(sigma), k.float(), rtol=0, atol=1e-3)
