"""Preconditionings: the scalings and the conditioning value that express a trained network as an EDM denoiser.

With EDM noise levels `sigma` and images `x = x_0 + sigma * noise` (`edm.py`), every network of the package gives a
denoiser

    denoised = c_skip(sigma) * x + c_out(sigma) * network(c_in(sigma) * x, timestep(sigma))

To support another kind of network, add a class here and its entry in `PRECONDITIONINGS`; schedulers need nothing else.
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
    """Base class of preconditionings. Fields are named like the entries of a scheduler's configuration."""

    prediction_type: continuous_ddpm.PredictionType

    prediction_types: ClassVar[tuple[str, ...]]  # supported prediction types
    beta_schedules: ClassVar[tuple[str, ...]] = continuous_ddpm.NOISE_SCHEDULES  # supported schedules
    takes_x_t: ClassVar[bool]  # whether `c_in * x` is the x_t of a variance-preserving process
    takes_index: ClassVar[bool] = (
        False  # whether the conditioning value is a training index, so that integers are valid too
    )

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the network can be conditioned on."""
        return 0.0, math.inf

    def scalings(self, sigma: torch.Tensor) -> edm.Scalings:
        """Return `c_skip`, `c_out` and `c_in`, each of sigma's shape."""
        raise NotImplementedError

    def sigma_to_timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the conditioning value of a noise level, in float32 or float64."""
        raise NotImplementedError

    def timestep_to_sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return the noise level of a conditioning value."""
        raise NotImplementedError


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """Preconditioning of Karras et al. 2022: the network takes `c_in * x` and is conditioned on `c_noise`."""

    sigma_data: float

    # as in diffusers' EDM schedulers: the network's output F, and its negative
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
    """Preconditioning of continuous DDPM: the network takes x_t and is conditioned on the log-SNR."""

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
    """Preconditioning of DDPM: the network takes x_t and is conditioned on the index of one of N betas.

    Indices are fractional between the noise levels of training. The fields are named as in diffusers' schedulers.
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


# each preconditioning by its name in configurations
PRECONDITIONINGS: dict[str, type[Preconditioning]] = {
    "edm": EDMPreconditioning,
    "variance_preserving": VariancePreservingPreconditioning,
    "discrete": DiscretePreconditioning,
}


def make_preconditioning(name: NetworkPreconditioning, settings: Mapping[str, Any]) -> Preconditioning:
    """Return the preconditioning of the given name, with fields from `settings`, a scheduler's configuration."""
    kind = PRECONDITIONINGS[name]
    return kind(**{field.name: settings[field.name] for field in fields(kind)})
