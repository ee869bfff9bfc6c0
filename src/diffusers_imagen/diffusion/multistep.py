"""Multistep predictor-corrector for the sampling ODE of Karras et al. 2022 (arXiv 2206.00364).

Along a trajectory `x / sigma` changes by the denoised image D alone, `d(x / sigma) = -D / sigma^2 d(sigma)` (eq. 3),
so that a step from sigma to sigma_next is exactly

    x_next = sigma_next / sigma * x + sigma_next * (integral of D(s) / s^2 ds from sigma_next to sigma)

A linear multistep method replaces D in the integral by a polynomial through a few known values: the Adams-Bashforth
predictor if all of them lie before sigma_next, the Adams-Moulton corrector if D at sigma_next is one of them. With a
polynomial in `log sigma` these are the steps of DPM-Solver++ (Lu et al. 2022, 2211.01095) and of UniPC (Zhao et al.
2023, 2302.04867); DEIS (Zhang and Chen 2022, 2204.13902) allows any variable. Here it is `log(sigma + sigma_data /
2)`: log sigma where D changes, and nearly constant below the scale of the images, where D hardly changes.

Weights and noise levels depend only on the schedule. They are computed in float64 on the CPU.
"""

import math

import numpy as np
import torch

from .edm import check_positive, check_schedule


# for the integral over one step, in log sigma; exact to float64 even for a single step from 80 to 0.002
_QUADRATURE_POINTS = 32

# the noise levels of `centred_sigmas` are evenly spaced in log sigma within this factor of sigma_data, exp(2), and more
# widely spaced outside; measured in docs/schedulers.md
_CENTRE_WIDTH = 2.0


def centred_sigmas(num_steps: int, sigma_min: float, sigma_max: float, sigma_data: float) -> torch.Tensor:
    """Return noise levels from `sigma_max` to `sigma_min`, densest around `sigma_data`: `(num_steps,)` in float64.

    They are evenly spaced in `asinh(log(sigma / sigma_data) / 2)`. Far above and far below `sigma_data` a trajectory
    is nearly straight, and long steps cause little error; the content of an image is determined in between.

    Raises:
        ValueError: unless `num_steps >= 1`, `0 < sigma_min < sigma_max` and `sigma_data > 0`.
    """
    check_schedule(num_steps, sigma_min, sigma_max)
    check_positive(sigma_data=sigma_data)
    start, end = (math.asinh(math.log(sigma / sigma_data) / _CENTRE_WIDTH) for sigma in (sigma_max, sigma_min))
    ramp = torch.linspace(start, end, num_steps, dtype=torch.float64)
    sigmas = sigma_data * (_CENTRE_WIDTH * ramp.sinh()).exp()
    sigmas[0] = sigma_max  # without rounding error
    return sigmas


def adams_weights(
    sigma: torch.Tensor, sigma_next: torch.Tensor, nodes: torch.Tensor, sigma_data: float
) -> torch.Tensor:
    """Compute the weights of the denoised images at noise levels `nodes` in steps from `sigma` to `sigma_next`.

    `x_next = sigma_next / sigma * x + (weights * D).sum(-1)` is exact if D is a polynomial of
    `log(sigma + sigma_data / 2)` of a degree below the number of nodes.

    Args:
        sigma, sigma_next: the steps' bounds `(N,)`, in float64, above 0.
        nodes: the noise levels at which D is known, `(N, k)`, in float64, distinct within a step.
        sigma_data: the scale of the images.

    Returns:
        `(N, k)` in float64.
    """
    points, quadrature = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(_QUADRATURE_POINTS))
    start, end = sigma_next.log()[:, None], sigma.log()[:, None]  # (N, 1)
    s = ((start + end) / 2 + (end - start) / 2 * points).exp()  # (N, points)
    measure = quadrature * (end - start) / 2 * sigma_next[:, None] / s  # sigma_next / s^2 ds, in log s
    u, u_nodes = (s + sigma_data / 2).log(), (nodes + sigma_data / 2).log()
    weights = []
    for i in range(nodes.shape[1]):
        lagrange = torch.ones_like(u)
        for j in range(nodes.shape[1]):
            if j != i:
                lagrange = lagrange * (u - u_nodes[:, j : j + 1]) / (u_nodes[:, i : i + 1] - u_nodes[:, j : j + 1])
        weights.append((lagrange * measure).sum(-1))
    return torch.stack(weights, dim=-1)
