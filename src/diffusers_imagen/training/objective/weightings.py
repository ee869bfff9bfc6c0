"""Weightings of the loss as functions of the log-SNR.

To add a weighting, define it here, add it to `WEIGHTINGS` and to the choices of `TrainingConfig.loss_weighting`; see
docs/extending.md for the rest.
"""

from typing import Any

import torch

from ...diffusion import continuous_ddpm, edm
from ...diffusion.training_examples import min_snr_weight, uncertainty_weighted


class LossWeighting(torch.nn.Module):
    """Uniform weighting, and base class of other weightings.

    Losses are those of the network's output, with the weight of its preconditioning: `lambda(sigma) c_out^2` for EDM,
    which is 1, and 1 for variance-preserving networks, including discrete ones. Noise levels therefore have equal
    weight.

    Attributes:
        preconditionings (`tuple[str, ...]`): The supported values of `TrainingConfig.preconditioning`.
        settings (`tuple[str, ...]`): The fields of `TrainingConfig` that only this weighting uses; other weightings
            reject them.
    """

    preconditionings: tuple[str, ...] = ("edm", "variance_preserving", "discrete")
    settings: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Any) -> "LossWeighting":
        """Create the weighting for a `TrainingConfig`."""
        return cls()

    def weight(self, log_snr: torch.Tensor) -> torch.Tensor:
        """Return the fixed factor of losses at noise levels `(B,)`, which is part of the reported loss."""
        return torch.ones_like(log_snr)

    def forward(self, losses: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """Return the values that a step minimizes, from losses `(B,)` with the factor: by default the same."""
        return losses


class MinSNRWeighting(LossWeighting):
    """`min(SNR, gamma)` of the image's loss (Hang et al. 2023), for a variance-preserving network."""

    preconditionings = ("variance_preserving", "discrete")
    settings = ("snr_gamma",)

    def __init__(self, prediction_type: continuous_ddpm.PredictionType, snr_gamma: float):
        super().__init__()
        self.prediction_type, self.snr_gamma = prediction_type, snr_gamma

    @classmethod
    def from_config(cls, config: Any) -> "MinSNRWeighting":
        return cls(config.prediction_type, config.snr_gamma or 5.0)

    def weight(self, log_snr: torch.Tensor) -> torch.Tensor:
        return min_snr_weight(log_snr, self.prediction_type, self.snr_gamma)


class UncertaintyWeighting(LossWeighting):
    """Learned uncertainty of each noise level, by which losses are divided (Karras et al. 2024, EDM2, 2312.02696).

    A linear layer on Fourier features of `c_noise(sigma)`, initialized to the uniform weighting. It is part of the
    run, not of the stage.

    Args:
        seed (`int`): Seed of the features' frequencies.
        features (`int`): Number of features.
    """

    def __init__(self, seed: int = 0, features: int = 128):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.frequencies = torch.nn.Buffer(torch.randn(features, generator=generator))
        self.phases = torch.nn.Buffer(torch.rand(features, generator=generator))
        self.linear = torch.nn.utils.skip_init(torch.nn.Linear, features, 1, bias=False)  # without drawing numbers
        torch.nn.init.zeros_(self.linear.weight)

    @classmethod
    def from_config(cls, config: Any) -> "UncertaintyWeighting":
        return cls(config.seed)

    def forward(self, losses: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        c_noise = edm.c_noise(continuous_ddpm.log_snr_to_sigma(log_snr))
        features = (2 * torch.pi * (c_noise[:, None] * self.frequencies + self.phases)).cos() * 2**0.5  # (B, features)
        return uncertainty_weighted(losses, self.linear(features).flatten().float())


WEIGHTINGS: dict[str, type[LossWeighting]] = {
    "uniform": LossWeighting,
    "min_snr": MinSNRWeighting,
    "uncertainty": UncertaintyWeighting,
}


def make_weighting(config: Any) -> LossWeighting:
    """Create the weighting that a `TrainingConfig` names."""
    return WEIGHTINGS[config.loss_weighting].from_config(config)
