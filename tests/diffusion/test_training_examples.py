import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffusers_imagen.diffusion import continuous_ddpm, edm
from diffusers_imagen.diffusion.training_examples import continuous_ddpm_example, edm_example, min_snr_weight


PREDICTIONS = ("epsilon", "sample", "v_prediction")


def images(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, generator=generator, dtype=dtype).unbind()


def test_an_edm_network_that_meets_its_target_denoises_perfectly():
    x_0, noise = images(4, 3, 4, 4)
    sigma = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64)
    example = edm_example(x_0, noise, sigma, 0.5)
    c_skip, c_out, c_in = (c[:, None, None, None] for c in edm.scalings(sigma, 0.5))
    x = x_0 + sigma[:, None, None, None] * noise
    torch.testing.assert_close(example.model_input, c_in * x)
    torch.testing.assert_close(c_skip * x + c_out * example.target, x_0)
    torch.testing.assert_close(example.timestep, sigma.log() / 4)
    torch.testing.assert_close(example.weight, torch.ones(4, 1, 1, 1, dtype=torch.float64))
    # eq. 8: the loss of the raw output is the weighted loss of the denoised image
    output = torch.zeros_like(x)
    loss = example.weight * (output - example.target).square()
    denoised = c_skip * x + c_out * output
    torch.testing.assert_close(loss, edm.loss_weight(sigma, 0.5)[:, None, None, None] * (denoised - x_0).square())


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_variance_preserving_network_that_meets_its_target_predicts_the_image(prediction_type):
    x_0, noise = images(3, 2, 4)
    log_snr = torch.tensor([-4.0, 0.5, 6.0], dtype=torch.float64)
    example = continuous_ddpm_example(x_0, noise, log_snr, prediction_type)
    alpha, sigma = (c[:, None, None] for c in continuous_ddpm.alpha_sigma(log_snr))
    torch.testing.assert_close(example.model_input, alpha * x_0 + sigma * noise)
    assert torch.equal(example.timestep, log_snr) and (example.weight == 1).all()
    x_0_of_target = continuous_ddpm.predict_x_0(example.target, example.model_input, log_snr, prediction_type)
    torch.testing.assert_close(x_0_of_target, x_0)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_min_snr_weighs_all_predictions_alike(prediction_type):
    """One error of the image costs the same, whatever was predicted: min(SNR, gamma) times its square."""
    x_0, noise = images(5, 2)
    log_snr = torch.tensor([-8.0, -1.0, 1.6, 2.0, 8.0], dtype=torch.float64)
    example = continuous_ddpm_example(x_0, noise, log_snr, prediction_type, snr_gamma=5.0)
    output = example.target + 0.1 * noise
    error = continuous_ddpm.predict_x_0(output, example.model_input, log_snr, prediction_type) - x_0
    expected = log_snr.exp().clamp(max=5.0)[:, None] * error.square()
    torch.testing.assert_close(example.weight * (output - example.target).square(), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weight_is_that_of_diffusers_scripts(prediction_type):
    scheduler, timesteps = DDPMScheduler(), torch.tensor([1, 100, 500, 900])
    snr = compute_snr(scheduler, timesteps)
    expected = snr.clamp(max=5.0) / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(min_snr_weight(snr.log(), prediction_type), expected)


def test_min_snr_weight_is_finite_at_the_ends():
    log_snr = torch.tensor([-100.0, 100.0])
    for prediction_type in ("epsilon", "v_prediction"):
        assert min_snr_weight(log_snr, prediction_type).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    x_0, noise = images(2, 3, 4, 4, dtype=torch.float32)
    for example in (
        edm_example(x_0.to(dtype), noise.to(dtype), torch.tensor([1.0, 2.0]), 0.5),
        continuous_ddpm_example(x_0.to(dtype), noise.to(dtype), torch.tensor([1.0, 2.0]), "v_prediction", 5.0),
    ):
        assert example.model_input.dtype == example.target.dtype == dtype
        assert example.timestep.dtype == example.weight.dtype == torch.float32
        assert example.timestep.shape == (2,) and example.weight.shape == (2, 1, 1, 1)


def test_bad_input():
    x, log_snr = torch.ones(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="`prediction_type` is 'flow', but"):
        continuous_ddpm_example(x, x, log_snr, "flow")
    with pytest.raises(ValueError, match="`prediction_type` is 'flow', but"):
        min_snr_weight(log_snr, "flow")
    with pytest.raises(ValueError, match="`snr_gamma` is 0.0, but"):
        continuous_ddpm_example(x, x, log_snr, snr_gamma=0.0)
