import math

import pytest
import torch
from diffusers import EDMEulerScheduler

from diffusers_imagen.diffusion import edm


SIGMAS = torch.tensor([0.002, 0.1, 0.5, 2.0, 80.0], dtype=torch.float64)


def test_preconditioning_is_that_of_diffusers():
    euler = EDMEulerScheduler(sigma_data=0.7)
    x, output = torch.randn(2, 3, 4, 4, dtype=torch.float64).unbind()
    for sigma in SIGMAS:
        scalings = edm.scalings(sigma, 0.7)
        torch.testing.assert_close(scalings.c_in * x, euler.precondition_inputs(x, sigma))
        denoised = scalings.c_skip * x + scalings.c_out * output
        torch.testing.assert_close(denoised, euler.precondition_outputs(x, output, sigma))
    torch.testing.assert_close(edm.c_noise(SIGMAS), euler.precondition_noise(SIGMAS))


def test_input_and_target_of_the_network_have_unit_variance():
    generator = torch.Generator().manual_seed(0)
    x_0 = 0.5 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    for sigma in SIGMAS:
        x = x_0 + sigma * noise
        c_skip, c_out, c_in = edm.scalings(sigma, 0.5)
        assert (c_in * x).std().item() == pytest.approx(1, abs=0.01)
        assert ((x_0 - c_skip * x) / c_out).std().item() == pytest.approx(1, abs=0.01)
        assert edm.loss_weight(sigma, 0.5).item() == pytest.approx(1 / c_out.item() ** 2)


def test_c_noise_and_its_inverse():
    torch.testing.assert_close(edm.c_noise_to_sigma(edm.c_noise(SIGMAS)), SIGMAS)


def test_karras_sigmas():
    sigmas = edm.karras_sigmas(18, 0.002, 80.0)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (18,)
    assert sigmas[0] == 80.0 and sigmas[-1].item() == pytest.approx(0.002)
    roots = sigmas ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(17))
    assert edm.karras_sigmas(1, 0.002, 80.0).tolist() == [80.0]


@pytest.mark.parametrize(
    "arguments", [(0, 0.1, 1.0), (2.5, 0.1, 1.0), (4, 1.0, 1.0), (4, 0.0, 1.0), (4, 0.1, math.inf)]
)
def test_karras_sigmas_refuses(arguments):
    with pytest.raises(ValueError, match=str(arguments[0] if arguments[0] != 4 else arguments[1])):
        edm.karras_sigmas(*arguments)
    with pytest.raises(ValueError, match="rho"):
        edm.karras_sigmas(4, 0.1, 1.0, rho=0)


def test_churned_sigmas():
    sigmas = torch.tensor([80.0, 10.0, 1.0, 0.01], dtype=torch.float64)
    assert edm.churned_sigmas(sigmas, 0.0).tolist() == sigmas.tolist()
    torch.testing.assert_close(edm.churned_sigmas(sigmas, 0.4), sigmas * 1.1)
    factor = edm.churned_sigmas(sigmas, 40.0, s_min=0.05, s_max=50.0) / sigmas
    assert factor.tolist() == pytest.approx([1, math.sqrt(2), math.sqrt(2), 1])


def test_draw_sigma():
    sigma = edm.draw_sigma(100_000, generator=torch.Generator().manual_seed(0))
    assert sigma.dtype == torch.float32
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.02)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.02)
    assert torch.equal(sigma, edm.draw_sigma(100_000, generator=torch.Generator().manual_seed(0)))


def test_add_noise_takes_one_noise_level_or_one_a_sample():
    x_0, noise = torch.randn(2, 2, 3, 4, 4).unbind()
    noisy = edm.add_noise(x_0, noise, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(noisy[1], edm.add_noise(x_0, noise, torch.tensor(2.0))[1])
    assert edm.add_noise(x_0.bfloat16(), noise, torch.tensor(2.0)).dtype == torch.bfloat16
    for sigma in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match="shape"):
            edm.add_noise(x_0, noise, sigma)


def test_draw_uniform():
    times = edm.draw_uniform(100_000, torch.Generator().manual_seed(0))
    assert times.dtype == torch.float32 and 0 <= times.min() and times.max() < 1
    assert times.mean().item() == pytest.approx(0.5, abs=0.005)
    assert times.var().item() == pytest.approx(1 / 12, abs=0.002)


def test_stratified_draws():
    """One draw in each part of equal probability, in random order."""
    generator = torch.Generator().manual_seed(0)
    times = edm.draw_uniform(64, generator, stratified=True)
    assert sorted((times * 64).floor().int().tolist()) == list(range(64)) and times.max() < 1
    assert times.tolist() != times.sort().values.tolist()
    sigma = edm.draw_sigma(64, -1.0, 1.5, generator, stratified=True)
    quantiles = torch.special.ndtr((sigma.log() + 1.0) / 1.5)
    assert sorted((quantiles * 64).floor().int().tolist()) == list(range(64))
    many = edm.draw_sigma(100_000, generator=generator, stratified=True).log()
    assert many.isfinite().all()
    assert many.mean().item() == pytest.approx(-1.2, abs=1e-3) and many.std().item() == pytest.approx(1.2, abs=1e-3)
    with pytest.raises(ValueError, match="`p_std` is 0.0, but"):
        edm.draw_sigma(2, p_std=0.0)
