"""Variance-preserving diffusion in continuous time: Kingma et al. 2021, "Variational Diffusion Models" (2107.00630).

A noisy image is `x_t = alpha * x_0 + sigma * noise` with `alpha^2 + sigma^2 = 1`, at a time t in [0, 1]. Both
coefficients follow from the log-SNR `log_snr = ln(alpha^2 / sigma^2)`, on which the network is conditioned.

Times and log-SNRs are tensors of any shape in float32 or float64; half precision raises an error, because it rounds
most times to another one and maps the end of the cosine schedule to infinity. Image tensors `(B, ...)` may have any
floating dtype, which the results keep; their log-SNR is one number or `(B,)`.

The EDM formulation (`edm.py`) is the same process in other variables: its noise level is `exp(-log_snr / 2)`, its
image is `x_t / alpha`. `denoiser_scalings` therefore expresses a network trained here as an EDM denoiser.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch

from .edm import Scalings, per_sample
from .kinds import PredictionType


NoiseSchedule = Literal["squaredcos_cap_v2", "linear"]
NOISE_SCHEDULES: tuple[str, ...] = get_args(NoiseSchedule)
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)

# The end of the cosine schedule: its log-SNR at t = 1 is minus infinity, and this is the value of ln(cos(pi / 2)^2) in
# float32 arithmetic, with which networks have been trained.
COSINE_LOG_SNR_MIN = 2 * math.log(4.371139e-08)


class AlphaSigma(NamedTuple):
    """Coefficients of the image and the noise in `x_t`, each of the log-SNR's shape."""

    alpha: torch.Tensor
    sigma: torch.Tensor


class ReverseStep(NamedTuple):
    """Coefficients of `x_s ~ Normal(coef_x_t * x_t + coef_x_0 * x_0, variance)`, each of the log-SNR's shape."""

    coef_x_t: torch.Tensor
    coef_x_0: torch.Tensor
    variance: torch.Tensor


def _check_precision(name: str, value: torch.Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`{name}` is of {value.dtype}, but should be of float32 or float64.")


def log_snr_cosine(t: torch.Tensor, s: float = 0.008) -> torch.Tensor:
    """Return the cosine schedule, `alpha = cos(pi/2 * (t + s) / (1 + s))` (Nichol and Dhariwal 2021, eq. 17).

    The log-SNR decreases from 8.8 to -33.9.
    """
    _check_precision("t", t)
    # the cosine is computed as the sine of the complementary angle, which is accurate near t = 1
    alpha = torch.sin(math.pi / 2 * (1 - t) / (1 + s))
    sigma = torch.sin(math.pi / 2 * (t + s) / (1 + s))
    return (2 * (alpha / sigma).log()).clamp(min=COSINE_LOG_SNR_MIN)


def log_snr_linear(t: torch.Tensor) -> torch.Tensor:
    """Return `-ln(expm1(1e-4 + 10 t^2))`, DDPM's linear betas in continuous time (Kingma et al. 2021): 9.2 to -10."""
    _check_precision("t", t)
    return -torch.log(torch.expm1(1e-4 + 10 * t**2))


def log_snr(t: torch.Tensor, schedule: NoiseSchedule = "squaredcos_cap_v2") -> torch.Tensor:
    """Return the log-SNR at times `t` in [0, 1] under a named schedule, decreasing in t.

    Raises:
        ValueError: for an unknown schedule, or a `t` in half precision.
    """
    schedules = {"squaredcos_cap_v2": log_snr_cosine, "linear": log_snr_linear}
    if not isinstance(schedule, str) or schedule not in schedules:
        raise ValueError(f"`beta_schedule` is {schedule!r}, but should be one of {list(schedules)}.")
    return schedules[schedule](t)


def alpha_sigma(log_snr: torch.Tensor) -> AlphaSigma:
    """Return `alpha = sqrt(sigmoid(log_snr))` and `sigma = sqrt(sigmoid(-log_snr))`."""
    _check_precision("log_snr", log_snr)
    return AlphaSigma(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())


def log_snr_to_sigma(log_snr: torch.Tensor) -> torch.Tensor:
    """Return the EDM noise level of a log-SNR, `sigma / alpha = exp(-log_snr / 2)`."""
    _check_precision("log_snr", log_snr)
    return (-log_snr / 2).exp()


def sigma_to_log_snr(sigma: torch.Tensor) -> torch.Tensor:
    """Return the log-SNR of an EDM noise level, `-2 ln(sigma)`."""
    _check_precision("sigma", sigma)
    return -2 * sigma.log()


def q_sample(x_0: torch.Tensor, noise: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    """Apply the forward process, `x_t = alpha * x_0 + sigma * noise` (eq. 1)."""
    alpha, sigma = alpha_sigma(per_sample(log_snr, x_0))
    return (alpha * x_0 + sigma * noise).to(x_0.dtype)


def velocity(x_0: torch.Tensor, noise: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    """Return the target of v-prediction, `v = alpha * noise - sigma * x_0` (Salimans and Ho 2022, appendix D)."""
    alpha, sigma = alpha_sigma(per_sample(log_snr, x_0))
    return (alpha * noise - sigma * x_0).to(x_0.dtype)


def x_0_coefficients(log_snr: torch.Tensor, prediction_type: PredictionType) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(a, b)` of `x_0 = a * x_t + b * prediction`, for a network that predicts noise, image, or velocity.

    Raises:
        ValueError: for an unknown prediction type.
    """
    check_prediction_type(prediction_type)
    alpha, sigma = alpha_sigma(log_snr)
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    return alpha, -sigma


def check_prediction_type(prediction_type: str) -> None:
    """Raise ValueError unless the prediction type is one of `PREDICTION_TYPES`."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` is {prediction_type!r}, but should be one of {list(PREDICTION_TYPES)}.")


def predict_x_0(
    prediction: torch.Tensor, x_t: torch.Tensor, log_snr: torch.Tensor, prediction_type: PredictionType
) -> torch.Tensor:
    """Compute the clean image from the network's prediction at `x_t`, without thresholding."""
    coef_x_t, coef_prediction = x_0_coefficients(per_sample(log_snr, x_t), prediction_type)
    return (coef_x_t * x_t + coef_prediction * prediction).to(x_t.dtype)


def denoiser_scalings(sigma: torch.Tensor, prediction_type: PredictionType) -> Scalings:
    """Return the EDM scalings of a network trained in this formulation, at EDM noise levels `sigma`.

    `denoised = c_skip * x + c_out * network(c_in * x, log_snr)` is exact: `c_in * x` is the `x_t` of that log-SNR.
    """
    log_snr = sigma_to_log_snr(sigma)
    alpha = alpha_sigma(log_snr).alpha
    coef_x_t, coef_prediction = x_0_coefficients(log_snr, prediction_type)
    return Scalings(c_skip=coef_x_t * alpha, c_out=coef_prediction, c_in=alpha)


def reverse_step(log_snr: torch.Tensor, log_snr_next: torch.Tensor, eta: float = 1.0) -> ReverseStep:
    """Return the coefficients of the step from time t to an earlier s, ancestral for `eta` 1 (eq. 33) to deterministic for 0.

    The ancestral variance is `sigma_s^2 * c` with `c = -expm1(log_snr_t - log_snr_s)`; a step draws `eta^2` of it as
    new noise, and the rest of `sigma_s` is the noise already in `x_t` (Song et al. 2021, DDIM, eq. 12 and 16).
    """
    alpha, sigma = alpha_sigma(log_snr)
    alpha_next, sigma_next = alpha_sigma(log_snr_next)
    difference = log_snr - log_snr_next
    c = -torch.expm1(difference)
    variance = eta**2 * c * sigma_next**2
    # 1 - eta^2 c, without the cancellation in 1 - c for long steps
    coef_x_t = sigma_next * (difference.exp() + (1 - eta**2) * c).sqrt() / sigma
    return ReverseStep(coef_x_t, alpha_next - coef_x_t * alpha, variance)


def posterior(
    x_0: torch.Tensor, x_t: torch.Tensor, log_snr: torch.Tensor, log_snr_next: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean `(B, ...)` and variance `(B, 1, ...)` of `q(x_s | x_t, x_0)` (eq. 33)."""
    step = reverse_step(per_sample(log_snr, x_t), per_sample(log_snr_next, x_t))
    return (step.coef_x_t * x_t + step.coef_x_0 * x_0).to(x_t.dtype), step.variance
