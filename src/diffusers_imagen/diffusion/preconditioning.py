"""How a network was trained, as an EDM denoiser sees it: one class each for its scalings and its conditioning value.

With EDM noise levels `sigma` and images `x = x_0 + sigma * noise` (`edm.py`), every network of the package is a denoiser

    denoised = c_skip(sigma) * x + c_out(sigma) * network(c_in(sigma) * x, timestep(sigma))

A further kind of network is a further class here with its entry in `PRECONDITIONINGS`; schedulers ask for nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from . import continuous_ddpm, discrete_ddpm, edm
from .kinds import NetworkPreconditioning


@dataclass(frozen=True)
class Preconditioning:
    """What a scheduler asks of a preconditioning. Fields have the names that a scheduler's configuration gives them."""

    prediction_type: continuous_ddpm.PredictionType

    prediction_types: ClassVar[tuple[str, ...]]  # what such a network may predict
    beta_schedules: ClassVar[tuple[str, ...]] = continuous_ddpm.NOISE_SCHEDULES  # that go with such a network
    takes_x_t: ClassVar[bool]  # whether `c_in * x` is the x_t of a variance-preserving process
    takes_index: ClassVar[bool] = (
        False  # whether the conditioning value is an index of training, so that integers are too
    )

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the network can be told."""
        return 0.0, math.inf

    def scalings(self, sigma: torch.Tensor) -> edm.Scalings:
        """`c_skip`, `c_out` and `c_in`, each of sigma's shape."""
        raise NotImplementedError

    def sigma_to_timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """The value that tells the network its noise level, in float32 or float64."""
        raise NotImplementedError

    def timestep_to_sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """The noise level that a conditioning value stands for."""
        raise NotImplementedError


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """Karras et al. 2022: `c_in * x` goes into the network, which is told `c_noise`."""

    sigma_data: float

    # as in diffusers' EDM schedulers: the network's output F, and the same with its sign turned
    prediction_types = ("epsilon", "v_prediction")
    takes_x_t = False

    def scalings(self, sigma: torch.Tensor) -> edm.Scalings:
        scalings = edm.scalings(sigma, self.sigma_data)
        return scalings._replace(c_out=-scalings.c_out) if self.prediction_type == "v_prediction" else scalings

    def sigma_to_timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return edm.c_noise(sigma)

    def timestep_to_sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        return edm.c_noise_to_sigma(timestep)


@dataclass(frozen=True)
class VariancePreservingPreconditioning(Preconditioning):
    """Continuous DDPM: the x_t of that noise level goes into the network, which is told the log-SNR."""

    prediction_types = continuous_ddpm.PREDICTION_TYPES
    takes_x_t = True

    def scalings(self, sigma: torch.Tensor) -> edm.Scalings:
        return continuous_ddpm.denoiser_scalings(sigma, self.prediction_type)

    def sigma_to_timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return continuous_ddpm.sigma_to_log_snr(sigma)

    def timestep_to_sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        return continuous_ddpm.log_snr_to_sigma(timestep)


@dataclass(frozen=True)
class DiscretePreconditioning(VariancePreservingPreconditioning):
    """DDPM: the x_t of that noise level goes into the network, which is told its index among those of N betas.

    Indices are fractional between the noise levels of training. The fields are diffusers' names of the betas.
    """

    num_train_timesteps: int
    beta_schedule: discrete_ddpm.BetaSchedule
    beta_start: float
    beta_end: float
    trained_betas: Sequence[float] | None

    beta_schedules = discrete_ddpm.BETA_SCHEDULES
    takes_index = True

    @property
    def log_snrs(self) -> torch.Tensor:
        """The log-SNR of every index, `(N,)` in float64, decreasing."""
        given = None if self.trained_betas is None else tuple(self.trained_betas)
        return discrete_ddpm.trained_log_snrs(
            self.num_train_timesteps, self.beta_schedule, self.beta_start, self.beta_end, given
        )

    @property
    def sigma_range(self) -> tuple[float, float]:
        first, last = continuous_ddpm.log_snr_to_sigma(self.log_snrs[[0, -1]]).tolist()
        return first, last

    def sigma_to_timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return discrete_ddpm.log_snr_to_index(continuous_ddpm.sigma_to_log_snr(sigma), self.log_snrs)

    def timestep_to_sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        return continuous_ddpm.log_snr_to_sigma(discrete_ddpm.index_to_log_snr(timestep, self.log_snrs))


# every kind of network by its name in configurations
PRECONDITIONINGS: dict[str, type[Preconditioning]] = {
    "edm": EDMPreconditioning,
    "variance_preserving": VariancePreservingPreconditioning,
    "discrete": DiscretePreconditioning,
}


def make_preconditioning(name: NetworkPreconditioning, settings: Mapping[str, Any]) -> Preconditioning:
    """The preconditioning of that name; its fields are taken from `settings`, a scheduler's configuration."""
    kind = PRECONDITIONINGS[name]
    return kind(**{field.name: settings[field.name] for field in fields(kind)})
