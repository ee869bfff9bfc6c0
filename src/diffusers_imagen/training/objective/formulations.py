"""What a network is trained for: which noise levels it sees, and what it has to say about them.

The formulas are those of `diffusers_imagen.diffusion.training_examples`; an objective holds their settings, and knows the
scheduler that samples from a network trained so.
"""

import torch

from ...diffusion import continuous_ddpm, edm
from ...diffusion.training_examples import Example, continuous_ddpm_example, edm_example
from ...schedulers import ContinuousDDPMScheduler, EDMHeunScheduler
from ..config import TrainingConfig


class EDMObjective:
    """Karras et al. 2022 (arXiv 2206.00364): a level is the standard deviation sigma of the noise."""

    def __init__(self, sigma_data: float, p_mean: float, p_std: float):
        self.sigma_data, self.p_mean, self.p_std = sigma_data, p_mean, p_std

    def draw_levels(self, count: int, generator: torch.Generator, stratified: bool = False) -> torch.Tensor:
        """`(count,)` on the CPU."""
        return edm.draw_sigma(count, self.p_mean, self.p_std, generator, stratified=stratified)

    def example(self, x_0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> Example:
        """Input, target and weight for images and noise `(B, C, H, W)` and levels `(B,)`."""
        return edm_example(x_0, noise, level, self.sigma_data)

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        """The noise level relative to the image."""
        return level

    def scheduler(self) -> EDMHeunScheduler:
        return EDMHeunScheduler(sigma_data=self.sigma_data)


class ContinuousDDPMObjective:
    """Kingma et al. 2021 (arXiv 2107.00630): a level is the log-SNR of a uniformly drawn time."""

    def __init__(
        self,
        prediction_type: continuous_ddpm.PredictionType,
        beta_schedule: continuous_ddpm.NoiseSchedule,
        snr_gamma: float | None,
        sigma_data: float,
    ):
        self.prediction_type, self.beta_schedule = prediction_type, beta_schedule
        self.snr_gamma, self.sigma_data = snr_gamma, sigma_data

    def draw_levels(self, count: int, generator: torch.Generator, stratified: bool = False) -> torch.Tensor:
        """`(count,)` on the CPU."""
        return continuous_ddpm.log_snr(edm.draw_uniform(count, generator, stratified=stratified), self.beta_schedule)

    def example(self, x_0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> Example:
        """Input, target and weight for images and noise `(B, C, H, W)` and levels `(B,)`."""
        return continuous_ddpm_example(x_0, noise, level, self.prediction_type, self.snr_gamma)

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        """The noise level relative to the image."""
        return continuous_ddpm.log_snr_to_sigma(level)

    def scheduler(self) -> ContinuousDDPMScheduler:
        return ContinuousDDPMScheduler(
            beta_schedule=self.beta_schedule, prediction_type=self.prediction_type, sigma_data=self.sigma_data
        )


Objective = EDMObjective | ContinuousDDPMObjective


def make_objective(config: TrainingConfig) -> Objective:
    """The objective that a configuration describes."""
    if config.preconditioning == "edm":
        return EDMObjective(config.sigma_data, config.p_mean, config.p_std)
    return ContinuousDDPMObjective(config.prediction_type, config.beta_schedule, config.snr_gamma, config.sigma_data)
