"""Training examples: the network's input, conditioning value and target, and the weight of the loss.

A training step draws noise levels, computes inputs and targets, and takes the weighted mean squared error:

    sigma = edm.draw_sigma(len(x_0), generator=generator)
    example = edm_example(x_0, noise, sigma, sigma_data)
    loss = (example.weight * (network(example.model_input, example.timestep) - example.target).square()).mean()

Images are `(B, ...)` in any floating dtype, which inputs and targets keep; noise levels, conditioning values
and weights are in float32, or float64 for noise levels in float64.
"""

from typing import NamedTuple

import torch

from . import continuous_ddpm, edm
from .edm import per_sample


class Example(NamedTuple):
    """Batch of a training step."""

    model_input: torch.Tensor  # (B, ...)
    timestep: torch.Tensor  # (B,), the conditioning value
    target: torch.Tensor  # (B, ...)
    weight: torch.Tensor  # (B, 1, ...), of the square of output - target


def edm_example(x_0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, sigma_data: float) -> Example:
    """Return input, target and weight for a network with the scalings of Karras et al. 2022 (eq. 8 and table 1).

    The target is the raw output F for which `c_skip * x + c_out * F = x_0`. In terms of F the weight
    `lambda * c_out^2` is 1 everywhere.
    """
    scalings = edm.scalings(per_sample(sigma, x_0), sigma_data)
    x = x_0 + per_sample(sigma, x_0) * noise
    target = (x_0 - scalings.c_skip * x) / scalings.c_out
    weight = edm.loss_weight(per_sample(sigma, x_0), sigma_data) * scalings.c_out**2
    return Example((scalings.c_in * x).to(x_0.dtype), edm.c_noise(sigma), target.to(x_0.dtype), weight)


def continuous_ddpm_example(
    x_0: torch.Tensor,
    noise: torch.Tensor,
    log_snr: torch.Tensor,
    prediction_type: continuous_ddpm.PredictionType = "epsilon",
    snr_gamma: float | None = None,
) -> Example:
    """Return input, target and weight for a variance-preserving network that predicts noise, image or velocity.

    The weight is 1, or with `snr_gamma` that of `min_snr_weight`.

    Raises:
        ValueError: for an unknown prediction type, or a `snr_gamma` that is not above 0.
    """
    targets = {
        "epsilon": lambda: noise,
        "sample": lambda: x_0,
        "v_prediction": lambda: continuous_ddpm.velocity(x_0, noise, log_snr),
    }
    continuous_ddpm.check_prediction_type(prediction_type)
    weight = torch.ones_like(log_snr) if snr_gamma is None else min_snr_weight(log_snr, prediction_type, snr_gamma)
    x_t = continuous_ddpm.q_sample(x_0, noise, log_snr)
    return Example(x_t, log_snr, targets[prediction_type](), per_sample(weight, x_0))


def min_snr_weight(
    log_snr: torch.Tensor, prediction_type: continuous_ddpm.PredictionType = "epsilon", snr_gamma: float = 5.0
) -> torch.Tensor:
    """Return the weights of Min-SNR (Hang et al. 2023, 2303.09556), `min(SNR, gamma)` in terms of the image.

    In terms of the prediction: `min(SNR, gamma) / SNR` for noise, `min(SNR, gamma) / (SNR + 1)` for velocity.

    Raises:
        ValueError: for an unknown prediction type, or unless `snr_gamma` is above 0.
    """
    edm.check_positive(snr_gamma=snr_gamma)
    continuous_ddpm.check_prediction_type(prediction_type)
    snr = log_snr.exp()
    if prediction_type == "epsilon":
        return (snr_gamma * (-log_snr).exp()).clamp(max=1)
    if prediction_type == "sample":
        return snr.clamp(max=snr_gamma)
    # sigmoid is SNR / (SNR + 1), without overflow
    return torch.minimum(log_snr.sigmoid(), snr_gamma * (-log_snr).sigmoid())


def uncertainty_weighted(loss: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return `loss / exp(u) + u` (Karras et al. 2024, EDM2, 2312.02696), minimal where `u` is the logarithm of the loss."""
    return loss * (-log_variance).exp() + log_variance
