"""Objectives: the distribution of noise levels, the network's target, and the weight of errors.

The formulas are in `diffusers_imagen.diffusion`; an objective has their settings, and the scheduler for sampling from
a network trained with them. Outside of objectives, noise levels are log-SNRs: sigma is `exp(-log_snr / 2)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from ...diffusion import continuous_ddpm, discrete_ddpm, edm
from ...diffusion.training_examples import Example, continuous_ddpm_example, edm_example
from ...models.interface import StageNetwork
from ...schedulers import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler
from ...schedulers.scheduling_utils import ImagenScheduler
from ..config import TrainingConfig
from .weightings import LossWeighting, make_weighting


class Objective(ABC):
    """Noise levels, training examples and the weighting of their losses.

    Args:
        sigma_data (`float`): Standard deviation of the images.
        weighting (`LossWeighting`, *optional*): Uniform by default.

    Attributes:
        trained_modules (`list[torch.nn.Module]`):
            The weighting if it has parameters that are trained with the network, else empty. Code that wraps these
            modules must store the wrapped ones here.
        sampling (`dict[str, Any]`): Default arguments of a pipeline with a network trained by this objective.
    """

    sampling: dict[str, Any] = {}

    def __init__(self, sigma_data: float, weighting: LossWeighting | None = None):
        self.sigma_data = sigma_data
        self.weighting = LossWeighting() if weighting is None else weighting
        learns = any(parameter.requires_grad for parameter in self.weighting.parameters())
        self.trained_modules: list[torch.nn.Module] = [self.weighting] if learns else []

    @abstractmethod
    def draw_log_snr(self, count: int, generator: torch.Generator, stratified: bool = False) -> torch.Tensor:
        """Draw noise levels `(count,)`, on the CPU."""

    @abstractmethod
    def example(self, x_0: torch.Tensor, noise: torch.Tensor, log_snr: torch.Tensor) -> Example:
        """Return input, target and weight for images and noise `(B, C, H, W)` at noise levels `(B,)`."""

    @abstractmethod
    def scheduler(self) -> ImagenScheduler:
        """Return the scheduler for sampling from the network."""

    def scheduler_for(self, unet: StageNetwork) -> ImagenScheduler:
        """Return the scheduler for a network; for one that denoises residuals, which exceed [-1, 1], without clipping."""
        scheduler = self.scheduler()
        if unet.residual_scale is None:
            return scheduler
        return type(scheduler).from_config(scheduler.config, clip_sample=False, thresholding=False)

    def minimized(self, losses: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """Return the values `(B,)` whose mean a step minimizes, from the reported losses `(B,)`."""
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
    """
    Ho et al. 2020 (arXiv 2006.11239): one of N noise levels, drawn uniformly; the network is conditioned on its index.

    The target is the noise. For networks that also predict a variance, such as DeepFloyd IF's, the variance is not
    part of the loss.

    Args:
        beta_schedule (`str`): Name of the 1000 betas in diffusers.
        sigma_data (`float`), weighting (`LossWeighting`, *optional*): As in `Objective`.
        scheduler_config (`dict`, *optional*):
            Configuration of the stage's previous scheduler, which is kept except for its class; a new one has no
            thresholding.
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
    """Kingma et al. 2021 (arXiv 2107.00630): the log-SNR of a uniformly drawn time."""

    sampling = {"num_inference_steps": 100}  # ancestral sampling needs more steps than the EDM samplers

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
        cast(continuous_ddpm.NoiseSchedule, config.beta_schedule),  # checked by the configuration
        config.sigma_data,
        make_weighting(config),
    ),
    "discrete": lambda config, scheduler_config: DiscreteObjective(
        config.beta_schedule, config.sigma_data, make_weighting(config), scheduler_config
    ),
}


def make_objective(config: TrainingConfig, scheduler_config: Mapping[str, Any] | None = None) -> Objective:
    """Create the objective for the preconditioning of a configuration.

    Args:
        config (`TrainingConfig`): The configuration.
        scheduler_config (`dict`, *optional*): Configuration of the pretrained stage's scheduler, if its objective was
            the same.
    """
    return OBJECTIVES[config.preconditioning](config, scheduler_config)
