"""What a network is trained for: which noise levels it sees, what it has to say about them, and what an error costs.

The formulas are those of `diffusers_imagen.diffusion`; an objective holds their settings, and knows the scheduler that
samples from a network trained so. Outside of it, a noise level is a log-SNR: sigma is `exp(-log_snr / 2)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from ...diffusion import continuous_ddpm, discrete_ddpm, edm
from ...diffusion.training_examples import Example, continuous_ddpm_example, edm_example
from ...schedulers import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler
from ...schedulers.scheduling_utils import ImagenScheduler
from ..config import TrainingConfig
from .weightings import LossWeighting, make_weighting


class Objective(ABC):
    """Noise levels, examples and the weighting of their losses.

    Args:
        sigma_data (`float`): Standard deviation of the images.
        weighting (`LossWeighting`, *optional*): Uniform by default.

    Attributes:
        trained_modules (`list[torch.nn.Module]`): The weighting if it has parameters to be learned along with the
            network, else empty. Who wraps these modules puts the wrapped ones in their place.
        sampling (`dict[str, Any]`): Arguments of a pipeline that draws with a network trained so.
    """

    sampling: dict[str, Any] = {}

    def __init__(self, sigma_data: float, weighting: LossWeighting | None = None):
        self.sigma_data = sigma_data
        self.weighting = LossWeighting() if weighting is None else weighting
        learns = any(parameter.requires_grad for parameter in self.weighting.parameters())
        self.trained_modules: list[torch.nn.Module] = [self.weighting] if learns else []

    @abstractmethod
    def draw_log_snr(self, count: int, generator: torch.Generator, stratified: bool = False) -> torch.Tensor:
        """Noise levels `(count,)`, on the CPU."""

    @abstractmethod
    def example(self, x_0: torch.Tensor, noise: torch.Tensor, log_snr: torch.Tensor) -> Example:
        """Input, target and weight for images and noise `(B, C, H, W)` at noise levels `(B,)`."""

    @abstractmethod
    def scheduler(self) -> ImagenScheduler:
        """What samples from the network."""

    def minimized(self, losses: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """The numbers `(B,)` whose mean a step minimizes, of the losses `(B,)` that are reported."""
        (weighting,) = self.trained_modules or [self.weighting]
        return weighting(losses, log_snr)


class EDMObjective(Objective):
    """Karras et al. 2022 (arXiv 2206.00364): sigma is drawn from a log-normal distribution."""

    def __init__(self, p_mean: float, p_std: float, sigma_data: float, weighting: LossWeighting | None = None):
        super().__init__(sigma_data, weighting)
        self.p_mean, self.p_std = p_mean, p_std

    def draw_log_snr(self, count: int, generator: torch.Generator, stratified: bool = False) -> torch.Tensor:
        return edm.draw_log_snr(count, self.p_mean, self.p_std, generator, stratified=stratified)

    def example(self, x_0: torch.Tensor, noise: torch.Tensor, log_snr: torch.Tensor) -> Example:
        return edm_example(x_0, noise, continuous_ddpm.log_snr_to_sigma(log_snr), self.sigma_data)

    def scheduler(self) -> EDMHeunScheduler:
        return EDMHeunScheduler(sigma_data=self.sigma_data)


class DiscreteObjective(Objective):
    """Ho et al. 2020 (arXiv 2006.11239): one of N noise levels, uniformly drawn, whose index the network is told.

    The target is the noise. A network that predicts a variance beside it, as DeepFloyd IF's do, is trained on its noise
    alone: what it says of the variance is no part of the loss.

    Args:
        beta_schedule (`str`): Of the 1000 betas, by diffusers' name.
        sigma_data (`float`), weighting (`LossWeighting`, *optional*): As `Objective`.
        scheduler_config (`dict`, *optional*): Of the scheduler that the stage had before, which is kept but for its
            class; a new one has no thresholding.
    """

    def __init__(
        self,
        beta_schedule: discrete_ddpm.BetaSchedule,
        sigma_data: float,
        weighting: LossWeighting | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
    ):
        super().__init__(sigma_data, weighting)
        self.beta_schedule, self.scheduler_config = beta_schedule, scheduler_config
        self.log_snrs = discrete_ddpm.declared_log_snrs(beta_schedule)

    def draw_log_snr(self, count: int, generator: torch.Generator, stratified: bool = False) -> torch.Tensor:
        index = edm.draw_uniform(count, generator, stratified=stratified) * len(self.log_snrs)
        return self.log_snrs[index.long()].float()

    def example(self, x_0: torch.Tensor, noise: torch.Tensor, log_snr: torch.Tensor) -> Example:
        index = discrete_ddpm.log_snr_to_index(log_snr, self.log_snrs)
        return continuous_ddpm_example(x_0, noise, log_snr)._replace(timestep=index)

    def scheduler(self) -> EDMAdamsScheduler:
        new = {"preconditioning": "discrete", "beta_schedule": self.beta_schedule}
        return EDMAdamsScheduler.from_config(self.scheduler_config or new, sigma_data=self.sigma_data)


class ContinuousDDPMObjective(Objective):
    """Kingma et al. 2021 (arXiv 2107.00630): the log-SNR is that of a uniformly drawn time."""

    sampling = {"num_inference_steps": 100}  # ancestral sampling needs more than the EDM samplers

    def __init__(
        self,
        prediction_type: continuous_ddpm.PredictionType,
        beta_schedule: continuous_ddpm.NoiseSchedule,
        sigma_data: float,
        weighting: LossWeighting | None = None,
    ):
        super().__init__(sigma_data, weighting)
        self.prediction_type, self.beta_schedule = prediction_type, beta_schedule

    def draw_log_snr(self, count: int, generator: torch.Generator, stratified: bool = False) -> torch.Tensor:
        return continuous_ddpm.log_snr(edm.draw_uniform(count, generator, stratified=stratified), self.beta_schedule)

    def example(self, x_0: torch.Tensor, noise: torch.Tensor, log_snr: torch.Tensor) -> Example:
        return continuous_ddpm_example(x_0, noise, log_snr, self.prediction_type)

    def scheduler(self) -> ContinuousDDPMScheduler:
        return ContinuousDDPMScheduler(
            beta_schedule=self.beta_schedule, prediction_type=self.prediction_type, sigma_data=self.sigma_data
        )


OBJECTIVES: dict[str, Callable[[TrainingConfig, Mapping[str, Any] | None], Objective]] = {
    "edm": lambda config, _: EDMObjective(config.p_mean, config.p_std, config.sigma_data, make_weighting(config)),
    "variance_preserving": lambda config, _: ContinuousDDPMObjective(
        config.prediction_type,
        cast(continuous_ddpm.NoiseSchedule, config.beta_schedule),  # as the configuration has checked
        config.sigma_data,
        make_weighting(config),
    ),
    "discrete": lambda config, scheduler_config: DiscreteObjective(
        config.beta_schedule, config.sigma_data, make_weighting(config), scheduler_config
    ),
}


def make_objective(config: TrainingConfig, scheduler_config: Mapping[str, Any] | None = None) -> Objective:
    """The objective of the preconditioning that a configuration names.

    Args:
        config (`TrainingConfig`): The settings.
        scheduler_config (`dict`, *optional*): Of the scheduler of the stage that is trained further, if it was trained
            for the same.
    """
    return OBJECTIVES[config.preconditioning](config, scheduler_config)
