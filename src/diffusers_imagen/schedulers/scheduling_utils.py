"""What the schedulers of this package share: how the network was trained, the schedule's bookkeeping, thresholding."""

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.utils import BaseOutput

from ..diffusion import continuous_ddpm, edm
from ..diffusion.edm import Preconditioning
from ..diffusion.thresholding import dynamic_threshold, static_threshold
from ..utils.arguments import is_integer, is_number, shown
from .schedule_checks import (
    MAX_SIGMA,
    MAX_TRAIN_TIMESTEPS,
    MIN_SIGMA,
    as_tensor,
    check_config_number,
    check_images,
)


# "edm": c_in * x goes into the network, which is told c_noise. "variance_preserving": the x_t of that noise level goes
# in, and the network is told the log-SNR.
NetworkPreconditioning = Literal["edm", "variance_preserving"]

NO_BETAS = "none: EDM noise levels"
# the lowest and the highest value of every number of a configuration: beyond, float64 overflows, or memory ends
NUMBERS = {
    "num_train_timesteps": (1, MAX_TRAIN_TIMESTEPS),
    "sigma_min": (MIN_SIGMA, MAX_SIGMA),
    "sigma_max": (MIN_SIGMA, MAX_SIGMA),
    "sigma_data": (MIN_SIGMA, MAX_SIGMA),
    "rho": (1e-3, 1e3),
    "s_churn": (0, 1e10),
    "s_min": (0, 1e10),
    "s_max": (0, 1e10),
    "s_noise": (0, 1e10),
    "eta": (0, 1),
    "clip_sample_range": (0, 1e10),
    "dynamic_thresholding_ratio": (1e-10, 1),
    "sample_max_value": (1, 1e10),
}
OPTIONAL_NUMBERS = ("s_max", "sample_max_value")

PREDICTION_TYPES = {
    "edm": ("epsilon", "v_prediction"),
    "variance_preserving": ("epsilon", "sample", "v_prediction"),
}


@dataclass
class ImagenSchedulerOutput(BaseOutput):
    """
    Output of a scheduler's `step`.

    Args:
        prev_sample (`torch.Tensor`, the sample's shape):
            The sample at the next noise level, the next input of the loop.
        pred_original_sample (`torch.Tensor`, the sample's shape):
            The denoised image of this call, thresholded as the configuration says; for previews.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def denoiser_preconditioning(
    sigma: torch.Tensor, preconditioning: NetworkPreconditioning, prediction_type: str, sigma_data: float
) -> Preconditioning:
    """Scalings that make an EDM denoiser of a network, however it was trained, at EDM noise levels `sigma`."""
    if preconditioning == "variance_preserving":
        return continuous_ddpm.variance_preserving_preconditioning(sigma, prediction_type)
    scalings = edm.preconditioning(sigma, sigma_data)
    # diffusers' EDM schedulers call the network's output "epsilon", and "v_prediction" the same with its sign turned
    return scalings._replace(c_out=-scalings.c_out) if prediction_type == "v_prediction" else scalings


class ImagenSchedulerMixin:
    """
    Put before `SchedulerMixin` and `ConfigMixin` in a scheduler's bases. The scheduler publishes `timesteps`, the values
    that its network is conditioned on, and holds their EDM noise levels.
    """

    order = 1

    # ---- configuration

    def _check_config(self) -> None:
        """Raises ValueError for values that no scheduler of this package can have; to be called by `__init__`."""
        for name, value in dict(self.config).items():
            if name in NUMBERS and not (value is None and name in OPTIONAL_NUMBERS):
                number = check_config_number(name, value, *NUMBERS[name])
                if number is not value:  # one of NumPy's, which cannot be saved
                    self.register_to_config(**{name: number})
            elif name in ("thresholding", "clip_sample") and not isinstance(value, bool):
                raise ValueError(f"`{name}` must be True or False, got {shown(value)}")
        config = self.config
        if not isinstance(config.preconditioning, str) or config.preconditioning not in PREDICTION_TYPES:
            raise ValueError(
                f"`preconditioning` must be one of {list(PREDICTION_TYPES)}, got {shown(config.preconditioning)}"
            )
        choices = PREDICTION_TYPES[config.preconditioning]
        if not isinstance(config.prediction_type, str) or config.prediction_type not in choices:
            raise ValueError(
                f"`prediction_type` must be one of {list(choices)} with `preconditioning={config.preconditioning!r}`, "
                f"got {shown(config.prediction_type)}"
            )
        if config.clip_sample and not config.clip_sample_range > 0:
            raise ValueError(f"`clip_sample_range` must be above 0, got {config.clip_sample_range}")

    def _keep_default_values(self) -> None:
        """
        Makes every value of the configuration an explicit one.

        diffusers' `from_config` drops what a live scheduler left at its default, and the other class then takes its
        own default instead, which can be another noise schedule.
        """
        if "_use_default_values" in self.config:
            self.register_to_config(_use_default_values=[])

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """
        As diffusers' `from_config`, with every value of the other scheduler's configuration kept, its defaults too.

        Raises:
            ValueError: for a configuration whose meaning this class cannot keep: discrete betas (those networks are
                conditioned on an index), or sigmas other than the ones of Karras et al. that end in zero.
        """
        if not isinstance(config, dict):
            return super().from_config(config, return_unused_kwargs, **kwargs)
        cls._refuse_other_meanings(config)
        live = "_use_default_values" in config
        config = {key: value for key, value in config.items() if key != "_use_default_values"}
        if config.get("beta_schedule") == NO_BETAS:
            del config["beta_schedule"]
        if "sigma_schedule" in config:  # diffusers' EDM schedulers, which have no word for these
            config = {"preconditioning": "edm", "clip_sample": False, **config}
        scheduler, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        if live:  # diffusers' tests compare the key as well
            scheduler.register_to_config(_use_default_values=[])
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @classmethod
    def _refuse_other_meanings(cls, config: dict) -> None:
        source = config.get("_class_name", "a scheduler")
        if "beta_start" in config and "preconditioning" not in config:
            raise ValueError(
                f"{cls.__name__} cannot take the configuration of {source} with `beta_start={config['beta_start']}`: "
                "networks trained with discrete betas are conditioned on an index, not on a log-SNR or c_noise"
            )
        for key, expected in (("sigma_schedule", "karras"), ("final_sigmas_type", "zero")):
            if config.get(key, expected) != expected:
                raise ValueError(f"{cls.__name__} takes `{key}={expected!r}` only, {source} has {config[key]!r}")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ---- noise levels and the network

    def precondition_noise(self, sigma: float | torch.Tensor) -> torch.Tensor:
        """The conditioning value of EDM noise levels: `c_noise`, or the log-SNR of a variance-preserving network."""
        sigma = as_tensor("sigma", sigma)
        if self.config.preconditioning == "variance_preserving":
            return continuous_ddpm.sigma_to_log_snr(sigma)
        return edm.c_noise(sigma)

    def timestep_to_sigma(self, timestep: float | torch.Tensor) -> torch.Tensor:
        """
        The EDM noise level that a conditioning value, as published in `timesteps`, stands for.

        Raises:
            ValueError: for integers, which are indices and no noise levels, and for half precision, which has lost
                the level.
        """
        timestep = as_tensor("timestep", timestep)
        if timestep.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{type(self).__name__} takes timesteps in float32 or float64, as published in `timesteps`, got "
                f"{timestep.dtype}"
            )
        if self.config.preconditioning == "variance_preserving":
            return continuous_ddpm.log_snr_to_sigma(timestep)
        return edm.c_noise_to_sigma(timestep)

    def _network_preconditioning(self, sigma: torch.Tensor) -> Preconditioning:
        config = self.config
        return denoiser_preconditioning(sigma, config.preconditioning, config.prediction_type, config.sigma_data)

    def _threshold(self, x_0: torch.Tensor) -> torch.Tensor:
        """Dynamic thresholding if `thresholding`, else static if `clip_sample`, as in diffusers' DDPMScheduler."""
        config = self.config
        if config.thresholding:
            return dynamic_threshold(x_0, config.dynamic_thresholding_ratio, config.sample_max_value)
        return static_threshold(x_0, config.clip_sample_range) if config.clip_sample else x_0

    # ---- the schedule

    @property
    def step_index(self) -> int | None:
        """The index into `timesteps` of the next call of `step`; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index into `timesteps` at which the run starts, if a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Starts the run inside the schedule, for image-to-image; to be called after `set_timesteps`.

        Raises:
            ValueError: if the index is not that of a first call of a step: a multiple of `order`.
        """
        if not is_integer(begin_index) or begin_index % self.order != 0 or begin_index < 0:
            raise ValueError(f"`begin_index` must be a multiple of the order {self.order}, got {shown(begin_index)}")
        if begin_index >= len(self._timestep_values):
            raise ValueError(
                f"`begin_index` must be below the number of timesteps, {len(self._timestep_values)}, got {begin_index}"
            )
        self._begin_index = int(begin_index)

    def _publish(self, sigmas: torch.Tensor, timesteps: torch.Tensor, device=None) -> None:
        """Takes over a schedule, float64 on the CPU, and forgets the run before it."""
        self.sigmas = sigmas.to(torch.float32)
        timesteps = timesteps.to(torch.float32)
        # the loop reads Python numbers: a tensor on an accelerator would have to be waited for
        self._timestep_values = timesteps.tolist()
        self.timesteps = timesteps.to(device)
        self._step_index = None
        self._begin_index = None

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int | None:
        """The index of a published timestep, the later one of two equal ones; None for any other value."""
        timestep = as_tensor("timestep", timestep)
        if timestep.numel() != 1:
            raise ValueError(f"`timestep` must be one value, got shape {tuple(timestep.shape)}")
        value = float(timestep.to("cpu", torch.float32))
        indices = [index for index, published in enumerate(self._timestep_values) if published == value]
        return indices[min(1, len(indices) - 1)] if indices else None

    def _start(self, timestep: float | torch.Tensor) -> int | None:
        """The index of this call: the running one, else the one to start at, or None if the timestep names none."""
        if self._step_index is None and self.num_inference_steps is not None:
            begin = self._begin_index
            self._step_index = begin if begin is not None else self.index_for_timestep(timestep)
        if self._step_index is not None and self._step_index >= len(self._timestep_values):
            raise ValueError(
                f"the schedule has {len(self._timestep_values)} timesteps, and all of them have been stepped through: "
                "call `set_timesteps` before the next run"
            )
        return self._step_index

    def _start_step(self, model_output: torch.Tensor, timestep, sample: torch.Tensor) -> int:
        """The index of this call of `step`, after checks of its arguments."""
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is None: call `set_timesteps` before `step`")
        check_images(sample=sample, model_output=model_output)
        is_level = timestep.is_floating_point() if isinstance(timestep, torch.Tensor) else is_number(timestep)
        if not is_level or is_integer(timestep):
            raise ValueError(f"`timestep` must be one of `scheduler.timesteps`, not an index; got {shown(timestep)}")
        index = self._start(timestep)
        if index is None:
            raise ValueError(
                f"`timestep` must be one of the {len(self._timestep_values)} values of `scheduler.timesteps`, between "
                f"{min(self._timestep_values):g} and {max(self._timestep_values):g}; got {float(timestep):g}"
            )
        return index


class EDMSchedulerMixin(ImagenSchedulerMixin):
    """What the schedulers share whose sample is the EDM image, `x = x_0 + sigma * noise`; put in its place."""

    def _mark_noise_levels(self) -> None:
        """
        Makes diffusers' discrete schedulers refuse this configuration: without a word on betas they would take their
        own defaults, and sample noise. To be called by `__init__`.
        """
        if self.config.preconditioning == "edm":
            self.register_to_config(beta_schedule=NO_BETAS)

    def _set_scalings(self, sigmas: torch.Tensor) -> None:
        """Keeps the network's scalings at the noise level of each call, `(calls,)`, as Python numbers."""
        scalings = self._network_preconditioning(sigmas)
        self._c_skip, self._c_out, self._c_in = (scaling.tolist() for scaling in scalings)

    def _denoise(self, x: torch.Tensor, model_output: torch.Tensor, index: int) -> torch.Tensor:
        """The denoised image of a call, thresholded, in `x`'s dtype."""
        return self._threshold(self._c_skip[index] * x + self._c_out[index] * model_output.to(x.dtype))

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """
        The network's input, `c_in(sigma) * sample`, in the sample's shape and dtype.

        A timestep that is not of the schedule, or any before `set_timesteps`, is taken for the noise level it names.
        """
        check_images(sample=sample)
        index = self._start(timestep)
        if index is None:
            return self.precondition_inputs(sample, self.timestep_to_sigma(as_tensor("timestep", timestep, sample)))
        return sample * self._c_in[index]

    def precondition_inputs(self, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """`c_in(sigma) * sample`, in the sample's dtype; `sigma` is one noise level or `(B,)`."""
        check_images(sample=sample)
        sigma = edm.per_sample(as_tensor("sigma", sigma, sample), sample)
        return (sample * self._network_preconditioning(sigma).c_in).to(sample.dtype)

    def precondition_outputs(
        self, sample: torch.Tensor, model_output: torch.Tensor, sigma: float | torch.Tensor
    ) -> torch.Tensor:
        """The denoised image, not thresholded, of the network's output at `sample`; `sigma` is one level or `(B,)`."""
        check_images(sample=sample, model_output=model_output)
        scalings = self._network_preconditioning(edm.per_sample(as_tensor("sigma", sigma, sample), sample))
        return (scalings.c_skip * sample + scalings.c_out * model_output).to(sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """
        `original_samples + sigma * noise`, for training and for a start from an image.

        Args:
            original_samples (`torch.Tensor` of shape `(B, ...)`):
                Clean images, values in [-1, 1].
            noise (`torch.Tensor` of that shape):
                Unit noise.
            timesteps (`float` or `torch.Tensor`, one or `(B,)`):
                Conditioning values as in `timesteps`; each is taken for the noise level it names.

        Returns:
            `torch.Tensor`: the noisy images in `original_samples`' dtype.

        Raises:
            ValueError: for integer or half-precision timesteps, or images and noise of different shapes.
        """
        check_images(original_samples=original_samples, noise=noise)
        timesteps = as_tensor("timesteps", timesteps, original_samples)
        return edm.add_noise(original_samples, noise, self.timestep_to_sigma(timesteps))
