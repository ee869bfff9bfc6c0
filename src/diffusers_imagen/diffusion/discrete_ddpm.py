"""Variance-preserving diffusion at N discrete noise levels, named by an index: Ho et al. 2020, "DDPM" (2006.11239).

The image of index k, in 0..N-1, is `x_t = alpha_k * x_0 + sigma_k * noise` with `alpha_k^2 = prod(1 - beta_i, i <= k)` and
`alpha_k^2 + sigma_k^2 = 1`. The network is told k, which it embeds by sinusoids, so that k may be fractional: between
two indices the log-SNR is linear here. All else is that of continuous time (`continuous_ddpm.py`).

Betas and the log-SNR of all indices, `log_snrs` below, are `(N,)` in float64 on the CPU. diffusers has them in float32,
whose rounding moves the lowest noise levels by a few ten-thousandths.
"""

import functools
import math
from typing import get_args

import torch

from .kinds import BetaSchedule


BETA_SCHEDULES: tuple[str, ...] = get_args(BetaSchedule)

DECLARED_LEVELS = 1000  # of the betas that a network declares by their name alone
MAX_BETA = 0.999  # of "squaredcos_cap_v2", whose last beta is 1 without it

# Where samplers of ours start at the latest, the `sigma_max` of Karras et al. 2022. The cosine betas go on to a sigma of
# 20,291, which multiplies the errors of a predicted noise.
MAX_START_SIGMA = 80.0


def cosine_betas(count: int) -> torch.Tensor:
    """`1 - a(t_{k+1}) / a(t_k)`, at most `MAX_BETA`, of `a(t) = cos(pi/2 * (t + s) / (1 + s))^2`, `s` 0.008, `t_k = k / N`.

    Nichol and Dhariwal 2021 (arXiv 2102.09672), eq. 17 and section 3.2.
    """
    t = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    alpha = torch.cos(math.pi / 2 * (t + 0.008) / 1.008)
    return (1 - (alpha[1:] / alpha[:-1]) ** 2).clamp(max=MAX_BETA)


def scheduled_betas(
    num_train_timesteps: int, beta_schedule: BetaSchedule, beta_start: float, beta_end: float
) -> torch.Tensor:
    """The betas that diffusers' discrete schedulers have by these names; the cosine ones know no start and end.

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
    """The log-SNR of every index, `ln(alpha_k^2 / sigma_k^2)`, strictly decreasing."""
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
    """The log-SNR of every index by diffusers' names; `trained_betas` go before the schedule. Not to be written to."""
    if trained_betas is not None:
        return betas_to_log_snrs(torch.tensor(trained_betas, dtype=torch.float64))
    return betas_to_log_snrs(scheduled_betas(num_train_timesteps, beta_schedule, beta_start, beta_end))


def declared_log_snrs(beta_schedule: BetaSchedule) -> torch.Tensor:
    """The log-SNR of every index of the 1000 that a network declares by this name: those of DDPM's own betas."""
    return trained_log_snrs(DECLARED_LEVELS, beta_schedule, 0.0001, 0.02)


def index_to_log_snr(index: torch.Tensor, log_snrs: torch.Tensor) -> torch.Tensor:
    """The log-SNR at indices of any shape, in their dtype, of float32 or float64; below 0 and above N-1 that of the end."""
    last = len(log_snrs) - 1
    known = _beside(index, log_snrs)
    index = index.clamp(0, last)
    below = index.floor().clamp(max=last - 1).long()
    return torch.lerp(known[below], known[below + 1], index - below)


def log_snr_to_index(log_snr: torch.Tensor, log_snrs: torch.Tensor) -> torch.Tensor:
    """The index of log-SNRs of any shape, in their dtype, of float32 or float64; beyond the ends 0 or N-1."""
    known = _beside(log_snr, log_snrs)
    above = torch.searchsorted(-known, -log_snr.contiguous()).clamp(1, len(known) - 1)
    share = (known[above - 1] - log_snr) / (known[above - 1] - known[above])
    return above - 1 + share.clamp(0, 1)


def _beside(values: torch.Tensor, log_snrs: torch.Tensor) -> torch.Tensor:
    """The log-SNR of every index in the dtype of values and on their device; training asks at every step, and does not
    wait for the device."""
    return log_snrs.to(values.dtype).to(values.device, non_blocking=True)
