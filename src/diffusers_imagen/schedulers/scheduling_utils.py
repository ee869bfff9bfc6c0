"""Base classes of the schedulers: configuration, preconditioning of the network, schedule and step."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput

from ..diffusion import edm
from ..diffusion.preconditioning import PRECONDITIONINGS, Preconditioning, make_preconditioning
from ..diffusion.thresholding import dynamic_threshold, static_threshold
from ..utils.arguments import bad_argument, check_choice, is_integer, is_number
from .foreign_configs import NO_BETAS, read_config
from .schedule_checks import (
    MAX_BETA,
    MAX_SIGMA,
    MAX_TRAIN_TIMESTEPS,
    MIN_BETA,
    MIN_SIGMA,
    as_sigmas,
    as_tensor,
    as_values,
    check_betas,
    check_config_number,
    check_generator,
    check_images,
    check_request,
    check_step_count,
)


Generators = torch.Generator | list[torch.Generator] | None
DISCRETE_SCHEDULERS = tuple(
    scheduler.name for scheduler in KarrasDiffusionSchedulers
)  # with compatible configurations
# the range of every number in a configuration: outside it, float64 overflows or memory runs out
NUMBERS = {
    "num_train_timesteps": (1, MAX_TRAIN_TIMESTEPS),
    **dict.fromkeys(("sigma_min", "sigma_max", "sigma_data"), (MIN_SIGMA, MAX_SIGMA)),
    **dict.fromkeys(("s_churn", "s_min", "s_max", "s_noise", "clip_sample_range"), (0, MAX_SIGMA)),
    **dict.fromkeys(("beta_start", "beta_end"), (MIN_BETA, MAX_BETA)),
    "rho": (1e-3, 1e3),
    "eta": (0, 1),
    "dynamic_thresholding_ratio": (1e-10, 1),
    "sample_max_value": (1, MAX_SIGMA),
}
OPTIONAL_NUMBERS = ("s_max", "sample_max_value")


@dataclass
class ImagenSchedulerOutput(BaseOutput):
    """
    Output of a scheduler's `step`.

    Args:
        prev_sample (`torch.Tensor`, the sample's shape):
            The sample at the next noise level, the next model input.
        pred_original_sample (`torch.Tensor`, the sample's shape):
            The denoised image of this call, thresholded according to the configuration; for previews.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class ImagenScheduler(SchedulerMixin, ConfigMixin):
    """
    Base class of this package's schedulers. It has `timesteps`, the conditioning values of the network, and their EDM
    noise levels. A subclass has a constructor, `set_timesteps`, `scale_model_input`, `_advance`, which computes a
    step, and `_mix`, which implements `add_noise`.
    """

    order = 1
    config: FrozenDict
    init_noise_sigma: float
    num_inference_steps: int | None = None  # None before `set_timesteps`
    sigmas: torch.Tensor  # (calls + 1,), of each call's sample, and of the final result
    timesteps: torch.Tensor  # (calls,)
    _step_index: int | None
    _begin_index: int | None
    # per call, as Python numbers
    _timestep_values: list[float]
    _c_skip: list[float]
    _c_out: list[float]
    _c_in: list[float]

    # ---- configuration

    def _check_config(self) -> None:
        """
        Raise ValueError for values that no scheduler of this package supports; called by `__init__`.

        Every value is registered explicitly: diffusers' `from_config` drops values that a live scheduler left at their
        default, and the other class then uses its own default, which may be another noise schedule.
        """
        if "_use_default_values" in self.config:
            self.register_to_config(_use_default_values=[])
        for name, value in dict(self.config).items():
            if name in NUMBERS and not (value is None and name in OPTIONAL_NUMBERS):
                number = check_config_number(name, value, *NUMBERS[name])
                if number is not value:  # NumPy numbers cannot be saved
                    self.register_to_config(**{name: number})
            elif name in ("thresholding", "clip_sample") and not isinstance(value, bool):
                raise bad_argument(name, value, "True or False")
        config = self.config
        check_choice("preconditioning", config.preconditioning, PRECONDITIONINGS)
        prediction_types = PRECONDITIONINGS[config.preconditioning].prediction_types
        check_choice(
            "prediction_type",
            config.prediction_type,
            prediction_types,
            f" with `preconditioning` {config.preconditioning!r}",
        )
        self._check_beta_config()
        if config.clip_sample and not config.clip_sample_range > 0:
            raise bad_argument("clip_sample_range", config.clip_sample_range, "above 0")

    def _check_beta_config(self) -> None:
        """Raise ValueError for invalid betas, or for ones that do not match the preconditioning."""
        config = self.config
        kind, when = PRECONDITIONINGS[config.preconditioning], f" with `preconditioning` {config.preconditioning!r}"
        if config.trained_betas is not None:
            if not kind.takes_index:
                raise bad_argument("trained_betas", config.trained_betas, f"None{when}")
            betas = check_betas("trained_betas", config.trained_betas, config.num_train_timesteps)
            self.register_to_config(trained_betas=betas)
        if kind.takes_index and config.num_train_timesteps < 2:
            raise bad_argument("num_train_timesteps", config.num_train_timesteps, f"at least 2{when}")
        choices = (*kind.beta_schedules, *((NO_BETAS,) if config.preconditioning == "edm" else ()))
        check_choice("beta_schedule", config.beta_schedule, choices, when)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """
        Create a scheduler like diffusers' `from_config`, but keep all values of the other configuration, with
        defaults.

        The configuration of a scheduler with discrete betas (DDPM, DDIM, DPM-Solver and similar) is converted to
        `preconditioning="discrete"`. Its `variance_type` is dropped: a learned variance is not used here.

        Raises:
            ValueError: for a configuration that this class does not support: betas rescaled to a final SNR of zero,
                sigmas of flow matching, or sigmas other than the ones of Karras et al. that end in zero.
        """
        if not isinstance(config, dict):
            return super().from_config(config, return_unused_kwargs, **kwargs)
        live = "_use_default_values" in config
        config = read_config(config, cls.__name__)
        scheduler, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        if live:  # diffusers' tests compare the key as well
            scheduler.register_to_config(_use_default_values=[])
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ---- noise levels and the network

    @property
    def _preconditioning(self) -> Preconditioning:
        return make_preconditioning(self.config.preconditioning, self.config)

    def precondition_noise(self, sigma: float | torch.Tensor) -> torch.Tensor:
        """Return the conditioning value of EDM noise levels: `c_noise`, log-SNR or index, by the preconditioning."""
        return self._preconditioning.sigma_to_timestep(as_tensor("sigma", sigma))

    def timestep_to_sigma(self, timestep: float | torch.Tensor) -> torch.Tensor:
        """
        Return the EDM noise level of a conditioning value, as in `timesteps`.

        Raises:
            ValueError: for integers, unless the network is conditioned on an index, for indices out of range, and for
                half precision, which is too coarse.
        """
        timestep = as_tensor("timestep", timestep)
        if self._preconditioning.takes_index:
            timestep = self._check_index("timestep", timestep)
        if timestep.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"`timestep` is of {timestep.dtype}, but should be of float32 or float64, as published in `timesteps`."
            )
        return self._preconditioning.timestep_to_sigma(timestep)

    def _check_index(self, name: str, index: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Check training indices; return fractional ones unchanged, integers in `dtype`."""
        last = self.config.num_train_timesteps - 1
        # on an accelerator the check would cause a synchronization
        if index.device.type == "cpu" and not ((index >= 0) & (index <= last)).all():
            raise bad_argument(name, index.tolist(), f"in [0, {last}], the indices that the network was trained with")
        return index if index.is_floating_point() else index.to(dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """
        Add noise for training or image-to-image: `original_samples + sigma * noise` for the EDM schedulers,
        `alpha * original_samples + sigma * noise` for the variance-preserving one.

        Args:
            original_samples (`torch.Tensor` of shape `(B, ...)`):
                Clean images, values in [-1, 1].
            noise (`torch.Tensor` of the same shape):
                Unit noise.
            timesteps (`float` or `torch.Tensor`, one or `(B,)`):
                Conditioning values as in `timesteps`. With `ContinuousDDPMScheduler` or discrete betas, integer
                training timesteps are accepted as well.

        Returns:
            `torch.Tensor`: the noisy images in `original_samples`' dtype.

        Raises:
            ValueError: for half-precision timesteps, integers that are not supported or out of range, or images and
                noise of different shapes.
        """
        check_images(original_samples=original_samples, noise=noise)
        timesteps = as_tensor("timesteps", timesteps, original_samples)
        if self._preconditioning.takes_index:
            timesteps = self._check_index("timesteps", timesteps)
        return self._mix(original_samples, noise, timesteps)

    def _mix(self, x_0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the noisy images `(B, ...)` of `add_noise`, at one timestep or `(B,)`."""
        raise NotImplementedError

    def _threshold(self, x_0: torch.Tensor) -> torch.Tensor:
        """Apply dynamic thresholding if `thresholding`, else static if `clip_sample`, as in diffusers' DDPMScheduler."""
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
        Set the index at which the run starts, for image-to-image; call it after `set_timesteps`.

        Raises:
            ValueError: if the index is not a multiple of `order`, the first call of a step.
        """
        calls = len(self._timestep_values)
        if not is_integer(begin_index) or begin_index % self.order != 0 or not 0 <= begin_index < calls:
            expected = f"a multiple of the order {self.order} below the number of timesteps, {calls}"
            raise bad_argument("begin_index", begin_index, expected)
        self._begin_index = int(begin_index)

    def _given_sigmas(self, sigmas: Any, timesteps: Any) -> torch.Tensor:
        """Return custom noise levels or conditioning values as `(N,)` noise levels in float64."""
        if timesteps is not None:
            values = as_values("timesteps", timesteps)
            if self._preconditioning.takes_index:
                values = self._check_index("timesteps", values, torch.float64)
            return as_sigmas("timesteps", self._timesteps_to_sigmas(values), timesteps)
        given = as_sigmas("sigmas", as_values("sigmas", sigmas), sigmas)
        low, high = self._preconditioning.sigma_range
        # tolerance for values rounded to float32
        if given.min() < low * (1 - 1e-6) or given.max() > high * (1 + 1e-6):
            raise bad_argument(
                "sigmas", sigmas, f"a list of noise levels within the range of training, in [{low:g}, {high:g}]"
            )
        return given

    def _timesteps_to_sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        if timesteps.dtype != torch.float64:  # integers, or half precision, which is too coarse
            expected = f"in float32 or float64, as `precondition_noise` returns them, not of {timesteps.dtype}"
            raise bad_argument("timesteps", timesteps.tolist(), expected)
        return self.timestep_to_sigma(timesteps)

    def _publish(self, sigmas: torch.Tensor, device: str | torch.device | None = None) -> None:
        """Set the schedule, `(calls + 1,)` in float64 on the CPU, and reset the state of the previous run."""
        self.sigmas = sigmas.to(torch.float32)
        timesteps = self.precondition_noise(sigmas[:-1]).to(torch.float32)
        # Python numbers for the loop: reading a tensor on an accelerator would cause a synchronization
        self._timestep_values = timesteps.tolist()
        self.timesteps = timesteps.to(device)
        self._step_index = None
        self._begin_index = None

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int | None:
        """Return the index of a value of `timesteps`, the second of two equal ones; None for any other value."""
        timestep = as_tensor("timestep", timestep)
        if timestep.numel() != 1:
            raise ValueError(f"`timestep` is of shape {tuple(timestep.shape)}, but should be one value.")
        value = float(timestep.to("cpu", torch.float32))
        indices = [index for index, published in enumerate(self._timestep_values) if published == value]
        return indices[min(1, len(indices) - 1)] if indices else None

    # ---- a step

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> ImagenSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Compute the next sample from the network's output.

        Args:
            model_output (`torch.Tensor`):
                The network's output, in the sample's shape, any floating dtype.
            timestep (`float` or `torch.Tensor`):
                The value of `timesteps` for which the network was called.
            sample (`torch.Tensor` of shape `(B, ...)`):
                The sample, before `scale_model_input`. The step is computed in float32, or in float64 for float64.
            generator (`torch.Generator` or a list of B of them, *optional*):
                Generator of the noise, if the step draws any.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`ImagenSchedulerOutput`] or a tuple.

        Returns:
            [`ImagenSchedulerOutput`] or `tuple`: the next sample in the sample's dtype, and the denoised image,
            thresholded.

        Raises:
            ValueError: before `set_timesteps`, after the last step, or for a timestep that is not in the schedule or
                at which no run can start.
        """
        index = self._start_step(model_output, timestep, sample)
        check_generator(generator, len(sample))
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        denoised = self._threshold(self._c_skip[index] * x + self._c_out[index] * model_output.to(x.dtype))
        x_next = self._advance(x, denoised, index, generator)
        self._step_index = index + 1
        x_next, denoised = x_next.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return x_next, denoised
        return ImagenSchedulerOutput(prev_sample=x_next, pred_original_sample=denoised)

    def _advance(self, x: torch.Tensor, denoised: torch.Tensor, index: int, generator: Generators) -> torch.Tensor:
        """Compute the next sample from the sample `x` of call `index` and its denoised image, all `(B, ...)` in one dtype."""
        raise NotImplementedError

    def _start_step(self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor) -> int:
        """Check the arguments of `step` and return the index of this call."""
        if self.num_inference_steps is None:
            raise bad_argument("num_inference_steps", None, "set: call `set_timesteps` before `step`")
        check_images(sample=sample, model_output=model_output)
        is_float = timestep.is_floating_point() if isinstance(timestep, torch.Tensor) else is_number(timestep)
        if not is_float or is_integer(timestep):
            raise bad_argument("timestep", timestep, "one of `scheduler.timesteps`, not an index")
        index = self._start(timestep)
        if index is None:
            low, high = min(self._timestep_values), max(self._timestep_values)
            expected = f"one of the {len(self._timestep_values)} values of `scheduler.timesteps`, {low:g} to {high:g}"
            raise bad_argument("timestep", float(timestep), expected)
        return index

    def _start(self, timestep: Any) -> int | None:
        """Return the index of this call: the current one, else the one to start at, or None if the timestep is unknown."""
        if self._step_index is None and self.num_inference_steps is not None:
            begin = self._begin_index
            self._step_index = begin if begin is not None else self.index_for_timestep(timestep)
        if self._step_index is not None and self._step_index >= len(self._timestep_values):
            expected = "the index of a call, but the run has ended: call `set_timesteps` before the next one"
            raise bad_argument("step_index", self._step_index, expected)
        return self._step_index


class EDMScheduler(ImagenScheduler):
    """
    A scheduler whose sample is the EDM image, `x = x_0 + sigma * noise`, and whose run goes from `sigma_max` to 0. A
    subclass has a constructor, `_default_sigmas`, `_plan_calls` and `_advance`.
    """

    def _set_up(self) -> None:
        """Set up the scheduler after its configuration is registered; called by `__init__`."""
        self._check_config()
        low, high = self._preconditioning.sigma_range
        if low > self.config.sigma_min or high < self.config.sigma_max:
            self.register_to_config(
                sigma_min=max(low, self.config.sigma_min), sigma_max=min(high, self.config.sigma_max)
            )
        if not self._preconditioning.takes_x_t:
            # makes diffusers' discrete schedulers reject this configuration: without an entry for betas they would use
            # their defaults, and generate noise
            self.register_to_config(beta_schedule=NO_BETAS)
        self.init_noise_sigma = float(self.config.sigma_max)
        sigmas = self._default_sigmas(self.config.num_train_timesteps)
        self._publish(torch.cat([sigmas, sigmas.new_zeros(1)]))

    def _default_sigmas(self, num_steps: int) -> torch.Tensor:
        """Return the noise levels of a run of N steps, from `sigma_max` to `sigma_min`: `(N,)` in float64 on the CPU."""
        raise NotImplementedError

    def _plan_calls(self, sigmas: torch.Tensor) -> torch.Tensor:
        """
        Prepare the steps between these noise levels `(N,)`, set `init_noise_sigma`, and reset the previous run's
        state.

        Returns:
            The noise level of the sample of each call of `step`, and a final 0: `(calls + 1,)` in float64.
        """
        raise NotImplementedError

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | torch.Tensor | None = None,
        timesteps: list[float] | torch.Tensor | None = None,
    ) -> None:
        """
        Set the schedule of a run of N steps: `timesteps`, one per call of the network, and, on the CPU, `sigmas`.

        `sigmas[i]` is the noise level of the sample passed to call i of `step`; the last one is 0.

        Args:
            num_inference_steps (`int`, *optional*):
                N, with the scheduler's default noise levels.
            device (`str` or `torch.device`, *optional*):
                Where `timesteps` goes.
            sigmas (`list[float]` or `torch.Tensor`, *optional*):
                Custom schedule of N noise levels, strictly decreasing; a final 0 is optional.
            timesteps (`list[float]` or `torch.Tensor`, *optional*):
                Custom schedule of N conditioning values, `c_noise`, log-SNR or indices, one per step.

        Raises:
            ValueError: unless exactly one of the three is given, and for fewer than one step, noise levels that do not
                decrease or are outside the range of discrete betas, or integer timesteps without discrete betas.
        """
        check_request(num_inference_steps, sigmas, timesteps, device)
        if num_inference_steps is None:
            sigmas = self._given_sigmas(sigmas, timesteps)
        else:
            sigmas = self._default_sigmas(check_step_count(num_inference_steps))
        self.num_inference_steps = len(sigmas)
        calls = self._plan_calls(sigmas)
        scalings = self._preconditioning.scalings(calls[:-1])
        self._c_skip, self._c_out, self._c_in = (scaling.tolist() for scaling in scalings)
        self._publish(calls, device)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """
        Return the network's input, `c_in(sigma) * sample`, in the sample's shape and dtype.

        A timestep that is not in the schedule, or any before `set_timesteps`, is converted to its noise level.
        """
        check_images(sample=sample)
        index = self._start(timestep)
        if index is None:
            return self.precondition_inputs(sample, self.timestep_to_sigma(as_tensor("timestep", timestep, sample)))
        return sample * self._c_in[index]

    def precondition_inputs(self, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Return `c_in(sigma) * sample`, in the sample's dtype; `sigma` is one noise level or `(B,)`."""
        check_images(sample=sample)
        sigma = edm.per_sample(as_tensor("sigma", sigma, sample), sample)
        return (sample * self._preconditioning.scalings(sigma).c_in).to(sample.dtype)

    def precondition_outputs(
        self, sample: torch.Tensor, model_output: torch.Tensor, sigma: float | torch.Tensor
    ) -> torch.Tensor:
        """Compute the denoised image, without thresholding, from the network's output; `sigma` is one or `(B,)`."""
        check_images(sample=sample, model_output=model_output)
        scalings = self._preconditioning.scalings(edm.per_sample(as_tensor("sigma", sigma, sample), sample))
        return (scalings.c_skip * sample + scalings.c_out * model_output).to(sample.dtype)

    def _mix(self, x_0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return edm.add_noise(x_0, noise, self.timestep_to_sigma(timesteps))
