"""Variance-preserving diffusion at N discrete noise levels, given by index: Ho et al. 2020, "DDPM" (2006.11239).

The image of index k, in 0..N-1, is `x_t = alpha_k * x_0 + sigma_k * noise` with `alpha_k^2 = prod(1 - beta_i, i <= k)`
and `alpha_k^2 + sigma_k^2 = 1`. The network is conditioned on k by a sinusoidal embedding, so k may be fractional:
between two indices the log-SNR is interpolated linearly. Everything else is as in `continuous_ddpm.py`.

Betas and the log-SNR of all indices, `log_snrs` below, are `(N,)` in float64 on the CPU. diffusers computes them in
float32, whose rounding changes the lowest noise levels by a few ten-thousandths.
"""

import functools
import math
from typing import get_args

import torch

from .kinds import BetaSchedule


BETA_SCHEDULES: tuple[str, ...] = get_args(BetaSchedule)

DECLARED_LEVELS = 1000  # number of betas for a network that declares only the schedule's name
MAX_BETA = 0.999  # for "squaredcos_cap_v2", whose last beta would be 1 otherwise

# Highest noise level at which this package's samplers start, the `sigma_max` of Karras et al. 2022. The cosine betas
# reach a sigma of 20,291, which multiplies the errors of a predicted noise.
MAX_START_SIGMA = 80.0


def cosine_betas(count: int) -> torch.Tensor:
    """Compute the betas of the cosine schedule, `1 - a(t_{k+1}) / a(t_k)`, at most `MAX_BETA`.

    Here `a(t) = cos(pi/2 * (t + s) / (1 + s))^2` with `s` 0.008 and `t_k = k / N`: Nichol and Dhariwal 2021 (arXiv
    2102.09672), eq. 17 and section 3.2.
    """
    t = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    alpha = torch.cos(math.pi / 2 * (t + 0.008) / 1.008)
    return (1 - (alpha[1:] / alpha[:-1]) ** 2).clamp(max=MAX_BETA)


def scheduled_betas(
    num_train_timesteps: int, beta_schedule: BetaSchedule, beta_start: float, beta_end: float
) -> torch.Tensor:
    """Return the betas that diffusers' discrete schedulers compute; the cosine schedule ignores start and end.

    Raises:
        ValueError: for an unknown schedule.
    """

    def ramp(start: float, end: float) -> torch.Tensor:
        return torch.linspace(start, end, num_train_timesteps, dtype=torch.float64)

    schedules = {
        "linear": lambda: ramp(beta_start, beta_end),
        "scaled_linear": lambda: ramp(beta_start**0.5, beta_end**0.5) ** 2,
        "squaredcos_cap_v2": lambda: cosine_betas(num_train_timesteps),
        "sigmoid": lambda: ramp(-6, 6).sigmoid() * (beta_end - beta_start) + beta_start,
    }
    if beta_schedule not in schedules:
        raise ValueError(f"`beta_schedule` is {beta_schedule!r}, but should be one of {list(schedules)}.")
    return schedules[beta_schedule]()


def betas_to_log_snrs(betas: torch.Tensor) -> torch.Tensor:
    """Return the log-SNR of every index, `ln(alpha_k^2 / sigma_k^2)`, strictly decreasing."""
    log_alpha_squared = torch.log1p(-betas.double()).cumsum(0)
    return log_alpha_squared - torch.log(-torch.expm1(log_alpha_squared))


@functools.lru_cache(maxsize=16)
def trained_log_snrs(
    num_train_timesteps: int,
    beta_schedule: BetaSchedule,
    beta_start: float,
    beta_end: float,
    trained_betas: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """Return the log-SNR of every index, cached: do not modify it. `trained_betas` take precedence over the schedule."""
    if trained_betas is not None:
        return betas_to_log_snrs(torch.tensor(trained_betas, dtype=torch.float64))
    return betas_to_log_snrs(scheduled_betas(num_train_timesteps, beta_schedule, beta_start, beta_end))


def declared_log_snrs(beta_schedule: BetaSchedule) -> torch.Tensor:
    """Return the log-SNR of every index for 1000 betas of the named schedule, with DDPM's start and end."""
    return trained_log_snrs(DECLARED_LEVELS, beta_schedule, 0.0001, 0.02)


def index_to_log_snr(index: torch.Tensor, log_snrs: torch.Tensor) -> torch.Tensor:
    """Return the log-SNR at indices of any shape, in their dtype (float32 or float64); indices are clamped to 0..N-1."""
    last = len(log_snrs) - 1
    known = _beside(index, log_snrs)
    index = index.clamp(0, last)
    below = index.floor().clamp(max=last - 1).long()
    return torch.lerp(known[below], known[below + 1], index - below)


def log_snr_to_index(log_snr: torch.Tensor, log_snrs: torch.Tensor) -> torch.Tensor:
    """Return the indices of log-SNRs of any shape, in their dtype (float32 or float64), clamped to 0..N-1."""
    known = _beside(log_snr, log_snrs)
    above = torch.searchsorted(-known, -log_snr.contiguous()).clamp(1, len(known) - 1)
    share = (known[above - 1] - log_snr) / (known[above - 1] - known[above])
    return above - 1 + share.clamp(0, 1)


def _beside(values: torch.Tensor, log_snrs: torch.Tensor) -> torch.Tensor:
    """Return the log-SNR of every index in the dtype and on the device of the values, cached to avoid synchronization."""
    return log_snrs.to(values.dtype).to(values.device, non_blocking=True)
