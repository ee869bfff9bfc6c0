import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_imagen.diffusion import continuous_ddpm as ddpm
from diffusers_imagen.diffusion import edm


# From the `ddpm_*` tensors that NVIDIA NeMo v2.3.0 computed for the case base_default_small (cosine schedule, step from t
# to t - 0.05), images cropped to their first 8 x 8 pixels.
NEMO = load_file(Path(__file__).parents[1] / "fixtures" / "nemo_ddpm.safetensors")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def test_nemo_forward_process():
    x_t = ddpm.q_sample(NEMO["x"].clamp(-1, 1), NEMO["edm_noise"], ddpm.log_snr(NEMO["ddpm_t"]))
    torch.testing.assert_close(x_t, NEMO["ddpm_xt"], rtol=0, atol=2e-6)


def test_nemo_posterior():
    log_snr, log_snr_next = ddpm.log_snr(NEMO["ddpm_t"]), ddpm.log_snr(NEMO["ddpm_t"] - 0.05)
    mean, variance = ddpm.posterior(NEMO["ddpm_x0_dynamic"], NEMO["ddpm_xt"], log_snr, log_snr_next)
    torch.testing.assert_close(mean, NEMO["ddpm_posterior_mean_cfg2"], rtol=0, atol=2e-6)
    torch.testing.assert_close(variance, NEMO["ddpm_posterior_var"], rtol=0, atol=1e-6)


def test_posterior_in_the_form_of_the_paper():
    log_snr = torch.linspace(-12, 8, 50, dtype=torch.float64)
    log_snr_next = log_snr + 0.7
    (alpha, _), (alpha_next, sigma_next) = ddpm.alpha_sigma(log_snr), ddpm.alpha_sigma(log_snr_next)
    c = -torch.expm1(log_snr - log_snr_next)
    step = ddpm.reverse_step(log_snr, log_snr_next)
    torch.testing.assert_close(step.coef_x_t, alpha_next * (1 - c) / alpha)
    torch.testing.assert_close(step.coef_x_0, alpha_next * c)
    torch.testing.assert_close(step.variance, sigma_next**2 * c)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_reverse_step_keeps_the_marginal(eta):
    log_snr, log_snr_next = torch.tensor([-33.9, -3.0, 2.0]).double(), torch.tensor([-5.0, -2.0, 8.0]).double()
    step = ddpm.reverse_step(log_snr, log_snr_next, eta)
    (alpha, sigma), (alpha_next, sigma_next) = ddpm.alpha_sigma(log_snr), ddpm.alpha_sigma(log_snr_next)
    torch.testing.assert_close(step.coef_x_t * alpha + step.coef_x_0, alpha_next)
    torch.testing.assert_close((step.coef_x_t * sigma) ** 2 + step.variance, sigma_next**2)


def test_schedules():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = torch.cos((t + 0.008) / 1.008 * math.pi / 2)
    expected = (alpha**2 / (1 - alpha**2)).log()
    torch.testing.assert_close(ddpm.log_snr(t)[:-1], expected[:-1])
    # where NeMo's and imagen-pytorch's float32 arithmetic ends
    end = -torch.log(torch.cos(torch.tensor(1.0) * math.pi * 0.5) ** -2 - 1)
    torch.testing.assert_close(ddpm.log_snr(torch.ones(1)), end[None], rtol=0, atol=1e-4)
    torch.testing.assert_close(ddpm.log_snr(torch.ones(1).double()).float(), end[None], rtol=0, atol=1e-4)
    linear = ddpm.log_snr(t, "linear")
    torch.testing.assert_close(linear.sigmoid(), torch.exp(-(1e-4 + 10 * t**2)))
    assert (ddpm.log_snr(t).diff() < 0).all() and (linear.diff() < 0).all()


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
def test_float32_keeps_every_time_apart(schedule):
    t = torch.linspace(0, 1, 4001)
    torch.testing.assert_close(
        ddpm.log_snr(t, schedule), ddpm.log_snr(t.double(), schedule).float(), rtol=1e-4, atol=1e-4
    )
    assert (ddpm.log_snr(t, schedule).diff() < 0).all()


def test_alpha_and_sigma():
    log_snr = torch.linspace(-30, 12, 50, dtype=torch.float64)
    alpha, sigma = ddpm.alpha_sigma(log_snr)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    torch.testing.assert_close(ddpm.log_snr_to_sigma(log_snr), sigma / alpha)
    torch.testing.assert_close(ddpm.sigma_to_log_snr(sigma / alpha), log_snr)


def targets(x_0, noise, log_snr):
    return {"epsilon": noise, "sample": x_0, "v_prediction": ddpm.velocity(x_0, noise, log_snr)}


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_right_prediction_gives_the_image_back(prediction_type):
    x_0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64).unbind()
    log_snr = torch.tensor([-4.0, 5.0], dtype=torch.float64)
    x_t = ddpm.q_sample(x_0, noise, log_snr)
    prediction = targets(x_0, noise, log_snr)[prediction_type]
    torch.testing.assert_close(ddpm.predict_x_0(prediction, x_t, log_snr, prediction_type), x_0)

    sigma = edm.per_sample(ddpm.log_snr_to_sigma(log_snr), x_0)
    c_skip, c_out, c_in = ddpm.denoiser_scalings(sigma, prediction_type)
    x = x_0 + sigma * noise
    torch.testing.assert_close(c_in * x, x_t)
    torch.testing.assert_close(c_skip * x + c_out * prediction, x_0)


def test_images_keep_their_dtype():
    x_0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.bfloat16).unbind()
    log_snr = torch.tensor([-4.0, 5.0])
    for image in (
        ddpm.q_sample(x_0, noise, log_snr),
        ddpm.velocity(x_0, noise, log_snr),
        ddpm.predict_x_0(noise, x_0, log_snr, "v_prediction"),
        ddpm.posterior(x_0, noise, log_snr, log_snr + 1)[0],
    ):
        assert image.dtype == torch.bfloat16 and image.isfinite().all()


def test_half_precision_times_are_refused():
    # NeMo cast them to half, and sampled NaN
    for dtype in (torch.float16, torch.bfloat16):
        for schedule in ("squaredcos_cap_v2", "linear"):
            with pytest.raises(ValueError, match="is of torch.*float16, but should be of float32 or float64"):
                ddpm.log_snr(torch.ones(2, dtype=dtype), schedule)
        with pytest.raises(ValueError, match="log_snr"):
            ddpm.alpha_sigma(torch.ones(2, dtype=dtype))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="is 'cosine', but .*squaredcos_cap_v2"):
        ddpm.log_snr(torch.ones(1), "cosine")
    with pytest.raises(ValueError, match="is 'noise', but .*epsilon"):
        ddpm.x_0_coefficients(torch.ones(1), "noise")
