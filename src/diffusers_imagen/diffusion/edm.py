"""The EDM formulation of Karras et al. 2022 (arXiv 2206.00364): preconditioning, noise levels, loss weight.

A noisy image is `x = x_0 + sigma * noise`. The network `F` is preconditioned so that its input and its target have
unit variance at every noise level (section 5, table 1):

    denoised = c_skip(sigma) * x + c_out(sigma) * F(c_in(sigma) * x, c_noise(sigma))

Every function takes `sigma` of any shape in float32 or float64 and returns tensors of that shape and dtype, unless
stated otherwise.
"""

import math
from typing import NamedTuple

import torch


class Scalings(NamedTuple):
    """The three scalings of table 1, each of sigma's shape."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor


def scalings(sigma: torch.Tensor, sigma_data: float) -> Scalings:
    """Return the scalings for images of standard deviation `sigma_data` (appendix B.6, eq. 117, 131 and 138)."""
    variance = sigma**2 + sigma_data**2
    return Scalings(
        c_skip=sigma_data**2 / variance, c_out=sigma * sigma_data * variance.rsqrt(), c_in=variance.rsqrt()
    )


def c_noise(sigma: torch.Tensor) -> torch.Tensor:
    """Return the conditioning value of a noise level, `ln(sigma) / 4` (table 1)."""
    return sigma.log() / 4


def c_noise_to_sigma(value: torch.Tensor) -> torch.Tensor:
    """Return the noise level of a conditioning value, `exp(4 * value)`; inverse of `c_noise`."""
    return (4 * value).exp()


def loss_weight(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """Return `lambda(sigma) = 1 / c_out^2`, with which every noise level starts with the same loss (eq. 144)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def per_sample(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape `value`, one number or one per sample, to multiply `like`, on its device: `(B,)` to `(B, 1, ...)`.

    Raises:
        ValueError: if `value` has more than one dimension, or neither one element nor one for each of `like`'s
            samples.
    """
    if value.dim() > 1 or value.numel() not in (1, like.shape[0]):
        raise ValueError(
            f"`value` is of shape {tuple(value.shape)}, but should be one value, or one for each of the {like.shape[0]} samples."
        )
    return value.to(like.device).reshape(-1, *(1,) * (like.dim() - 1))


def add_noise(x_0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return `x = x_0 + sigma * noise` in the dtype of `x_0` `(B, ...)`; `sigma` is one noise level or `(B,)`."""
    return (x_0 + per_sample(sigma, x_0) * noise).to(x_0.dtype)


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> torch.Tensor:
    """Return the noise levels of a sampler, `sigma_max` down to `sigma_min`, in float64 and without the final zero (eq. 5).

    A single step starts at `sigma_max`, as every run does.

    Raises:
        ValueError: unless `num_steps >= 1`, `0 < sigma_min < sigma_max` and `rho > 0`.
    """
    check_schedule(num_steps, sigma_min, sigma_max)
    check_positive(rho=rho)
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    sigmas[0] = sigma_max  # without the rounding error of the root
    return sigmas


def check_schedule(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless `num_steps >= 1` and `0 < sigma_min < sigma_max`, all finite."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"`num_steps` is {num_steps!r}, but should be an integer of at least 1.")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"`sigma_min` is {sigma_min}, but should be above 0 and below a finite `sigma_max`, {sigma_max}."
        )


def check_positive(**values: float) -> None:
    """Raise a ValueError that names the argument unless all values are above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"`{name}` is {value}, but should be above 0.")


def churned_sigmas(
    sigmas: torch.Tensor, s_churn: float, s_min: float = 0.0, s_max: float | None = None
) -> torch.Tensor:
    """Return the increased noise levels `sigma_hat` at which Algorithm 2 calls the network.

    `sigma_hat = (1 + gamma) * sigma` with `gamma = min(s_churn / N, sqrt(2) - 1)` for those of the `N` `sigmas` that
    lie in `[s_min, s_max]` (no upper bound if None), and `gamma = 0` elsewhere.
    """
    gamma = min(s_churn / len(sigmas), math.sqrt(2) - 1)
    churned = (sigmas >= s_min) & (sigmas <= (math.inf if s_max is None else s_max))
    return torch.where(churned, sigmas * (1 + gamma), sigmas)


def draw_uniform(
    batch_size: int,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    stratified: bool = False,
) -> torch.Tensor:
    """Draw times for training, uniform in [0, 1): `(batch_size,)` in float32.

    `stratified` draws one from each of `batch_size` equal parts of [0, 1), in a random order, so that every batch has
    low and high noise levels (low-discrepancy sampling, Kingma et al. 2021, 2107.00630, appendix I.1).

    Numbers are drawn on the generator's device, so that a CPU generator gives the same times on every machine.
    """
    source = generator.device if generator is not None else device
    uniform = torch.rand(batch_size, generator=generator, device=source)
    if stratified:
        strata = torch.randperm(batch_size, generator=generator, device=source)
        uniform = ((strata + uniform) / batch_size).clamp(max=1 - 2**-24)  # the sum may round up to 1
    return uniform.to(device)


def draw_sigma(
    batch_size: int,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    stratified: bool = False,
) -> torch.Tensor:
    """Draw noise levels for training, `ln(sigma) ~ Normal(p_mean, p_std^2)` (Karras et al. 2022, table 1): `(batch_size,)`.

    They are in float32; `stratified` and devices as in `draw_uniform`, with parts of equal probability.

    Raises:
        ValueError: unless `p_std` is above 0.
    """
    return (-draw_log_snr(batch_size, p_mean, p_std, generator, device, stratified) / 2).exp()


def draw_log_snr(
    batch_size: int,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    stratified: bool = False,
) -> torch.Tensor:
    """Draw noise levels as `draw_sigma` does, and return them as log-SNR, `-2 ln(sigma)`."""
    check_positive(p_std=p_std)
    if not stratified:
        source = generator.device if generator is not None else device
        normal = torch.randn(batch_size, generator=generator, device=source)
    else:
        # half an ulp away from 0 and 1, where the inverse of the normal distribution is infinite
        normal = torch.special.ndtri(draw_uniform(batch_size, generator, device, True).clamp(min=2**-25))
    return (normal * p_std + p_mean).mul(-2).to(device)
