import math

import pytest
import torch

from diffusers_imagen.diffusion.multistep import adams_weights, centred_sigmas


SIGMA_DATA = 0.5


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_weights_of_one_denoised_image_are_those_of_euler():
    sigma, sigma_next = column(80.0, 3.0, 80.0), column(20.0, 0.002, 0.002)
    weights = adams_weights(sigma, sigma_next, sigma[:, None], SIGMA_DATA)
    torch.testing.assert_close(weights[:, 0], 1 - sigma_next / sigma, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nodes", [[2.0], [2.0, 5.0], [1.0, 2.0, 5.0], [1.0, 2.0, 5.0, 9.0]])
def test_weights_sum_to_the_exact_step_of_a_constant(nodes):
    weights = adams_weights(column(2.0), column(1.0), column(*nodes)[None], SIGMA_DATA)
    assert weights.sum().item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("nodes", [[2.0, 5.0], [1.0, 2.0, 5.0]])
def test_a_step_is_exact_where_the_course_is_linear_in_the_variable(nodes):
    """The integral of log(s + a) / s^2 is -log(s + a) / s + (log(s) - log(s + a)) / a."""
    a = SIGMA_DATA / 2

    def antiderivative(s):
        return -math.log(s + a) / s + (math.log(s) - math.log(s + a)) / a

    exact = 1.0 * (antiderivative(2.0) - antiderivative(1.0))
    nodes = column(*nodes)
    weights = adams_weights(column(2.0), column(1.0), nodes[None], SIGMA_DATA)[0]
    assert (weights * (nodes + a).log()).sum().item() == pytest.approx(exact, abs=1e-12)


def test_short_even_steps_have_the_classic_coefficients():
    """Adams-Bashforth 3/2, -1/2 and Adams-Moulton 5/12, 8/12, -1/12, times the step in log sigma."""
    h = 1e-4
    sigma = (
        torch.exp(-h * torch.arange(3, dtype=torch.float64)).flip(0)[None] * 1e4
    )  # newest first; log(s + a) ~ log s
    newest, sigma, before = sigma.unbind(-1)
    predictor = adams_weights(sigma, newest, torch.stack([sigma, before], -1), SIGMA_DATA)[0] / h
    corrector = adams_weights(sigma, newest, torch.stack([newest, sigma, before], -1), SIGMA_DATA)[0] / h
    assert predictor.tolist() == pytest.approx([3 / 2, -1 / 2], abs=1e-3)
    assert corrector.tolist() == pytest.approx([5 / 12, 8 / 12, -1 / 12], abs=1e-3)


def test_centred_sigmas():
    sigmas = centred_sigmas(21, 0.01, 25.0, 0.5)  # 0.5 is their geometric mean
    assert sigmas.dtype == torch.float64 and sigmas[0] == 25.0 and sigmas[-1].item() == pytest.approx(0.01)
    assert sigmas[10].item() == pytest.approx(0.5)
    torch.testing.assert_close(sigmas * sigmas.flip(0), torch.full_like(sigmas, 0.25))
    steps = -sigmas.log().diff()
    assert (steps[10:].diff() > 0).all() and (steps[:10].diff() < 0).all()
    torch.testing.assert_close(torch.asinh((sigmas / 0.5).log() / 2).diff().diff(), torch.zeros(19).double())
    assert centred_sigmas(1, 0.002, 80.0, 0.5).tolist() == [80.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 0.1, 1.0, 0.5), "`num_steps` is 0, but .* at least 1"),
        ((2.5, 0.1, 1.0, 0.5), "`num_steps` is 2.5, but"),
        ((4, 1.0, 1.0, 0.5), "`sigma_min` is 1.0, but"),
        ((4, 0.1, 1.0, 0.0), "`sigma_data` is 0.0, but"),
    ],
)
def test_centred_sigmas_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        centred_sigmas(*arguments)
