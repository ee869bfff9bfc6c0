"""The sampler of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (2206.00364)."""

import math
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion import edm
from .schedule_checks import (
    check_device,
    check_generator,
    check_step_count,
    decreasing_sigmas,
    level_tensor,
    one_schedule,
)
from .scheduling_utils import EDMSchedulerMixin, ImagenSchedulerOutput, NetworkPreconditioning


class EDMHeunScheduler(EDMSchedulerMixin, SchedulerMixin, ConfigMixin):
    """
    Algorithm 2 of Karras et al. 2022 [1]: Heun's second-order steps over the noise levels of eq. 5, with churn.

    `N` steps call the network `2 N - 1` times, once for each of `timesteps`; the last step is Euler's. It runs in an
    ordinary loop of `scale_model_input`, network and `step`, from `init_noise_sigma` times unit noise. The network's
    raw output goes into `step`, after any guidance.

    Churn raises a noise level `sigma` to `sigma_hat` just before the network sees it. `timesteps` names the raised
    level, and the noise is added at the end of the step before, from the generator given there; that of the first step
    is part of `init_noise_sigma`. Without churn no noise is drawn.

    A network trained with `ContinuousDDPMScheduler` is sampled exactly as well: its configuration, given to
    `EDMHeunScheduler.from_config`, says `preconditioning="variance_preserving"`. `sigma_min` should then not lie below
    the lowest level that it was trained at, `exp(-log_snr(0) / 2)`, which is 0.0125 for the cosine schedule.

    [1] https://huggingface.co/papers/2206.00364

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            The number of noise levels in `timesteps` and `sigmas` before `set_timesteps` is called.
        sigma_min (`float`, defaults to 0.002):
            The lowest noise level above 0, in units of the image, whose values lie in [-1, 1].
        sigma_max (`float`, defaults to 80.0):
            The noise level at which sampling starts.
        sigma_data (`float`, defaults to 0.5):
            The standard deviation of the images, as the preconditioning assumed in training.
        rho (`float`, defaults to 7.0):
            How the noise levels crowd at the low end (eq. 5).
        s_churn (`float`, defaults to 0.0):
            The amount of noise that the whole run adds (Algorithm 2). 0 is deterministic.
        s_min (`float`, defaults to 0.0):
            The lowest noise level that is churned.
        s_max (`float`, *optional*):
            The highest noise level that is churned; no bound if None.
        s_noise (`float`, defaults to 1.0):
            The standard deviation of the noise that churn adds.
        preconditioning (`"edm"` or `"variance_preserving"`, defaults to `"edm"`):
            How the network was trained: with the scalings of [1] and c_noise as its conditioning value, or in continuous
            DDPM with the log-SNR.
        prediction_type (`str`, defaults to `"epsilon"`):
            With `"edm"`, as in diffusers' EDM schedulers: `"epsilon"` is the output F of [1], `"v_prediction"` is -F.
            With `"variance_preserving"`: `"epsilon"`, `"sample"` or `"v_prediction"`.
        thresholding (`bool`, defaults to `False`):
            Dynamic thresholding of every denoised image (Imagen, section 2.3); goes before `clip_sample`.
        dynamic_thresholding_ratio (`float`, defaults to 0.995):
            The quantile of |x_0| that dynamic thresholding scales to 1.
        sample_max_value (`float`, *optional*):
            The highest value that this quantile is taken for; no bound if None.
        clip_sample (`bool`, defaults to `False`):
            Static thresholding: clamps every denoised image.
        clip_sample_range (`float`, defaults to 1.0):
            The limit of static thresholding.
    """

    _compatibles = [
        "EDMAdamsScheduler",
        "ContinuousDDPMScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
    ]
    order = 2

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float | None = None,
        s_noise: float = 1.0,
        preconditioning: NetworkPreconditioning = "edm",
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
    ) -> None:
        if isinstance(s_max, float) and s_max == math.inf:
            self.register_to_config(s_max=None)  # JSON has no infinity
        self._keep_default_values()
        self._check_config()
        self._mark_noise_levels()
        self.num_inference_steps = None
        config = self.config
        sigmas = edm.karras_sigmas(config.num_train_timesteps, config.sigma_min, config.sigma_max, config.rho)
        self.init_noise_sigma = float(config.sigma_max)
        self._derivative = self._x_hat = None
        self._publish(torch.cat([sigmas, sigmas.new_zeros(1)]), self.precondition_noise(sigmas))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | torch.Tensor | None = None,
        timesteps: list[float] | torch.Tensor | None = None,
    ) -> None:
        """
        Lays out a run of N steps: `timesteps` of length 2 N - 1 and, on the CPU, `sigmas` of length 2 N.

        `sigmas[i]` is the noise level of the sample that call i of `step` takes, the last one is 0.

        Args:
            num_inference_steps (`int`, *optional*):
                N, with noise levels from eq. 5.
            device (`str` or `torch.device`, *optional*):
                Where `timesteps` goes.
            sigmas (`list[float]` or `torch.Tensor`, *optional*):
                The caller's N noise levels instead, strictly decreasing; taken as they are. A final 0 may be there.
            timesteps (`list[float]` or `torch.Tensor`, *optional*):
                The same as N conditioning values, `c_noise` or log-SNR, one for each step.

        Raises:
            ValueError: unless exactly one of the three is given, and for fewer than one step, levels that do not
                decrease, or integer timesteps.
        """
        one_schedule(num_inference_steps, sigmas, timesteps)
        check_device(device)
        config = self.config
        if num_inference_steps is not None:
            steps = check_step_count(num_inference_steps)
            levels = edm.karras_sigmas(steps, config.sigma_min, config.sigma_max, config.rho)
        elif sigmas is not None:
            levels = decreasing_sigmas("sigmas", level_tensor("sigmas", sigmas), sigmas)
        else:
            levels = self.timestep_to_sigma(level_tensor("timesteps", timesteps))
            levels = decreasing_sigmas("timesteps", levels, timesteps)
        self.num_inference_steps = len(levels)

        raised = edm.churned_sigmas(levels, config.s_churn, config.s_min, config.s_max)  # (N,)
        churn = config.s_noise * (raised**2 - levels**2).clamp(min=0).sqrt()
        following = torch.cat([levels[1:], levels.new_zeros(1)])
        calls = torch.stack([raised, following], dim=1).flatten()  # (2 N,)
        self._levels = calls.tolist()
        self._churn = churn.tolist()
        self._set_scalings(calls[:-1])
        self.init_noise_sigma = math.hypot(levels[0], churn[0])
        self._derivative = self._x_hat = None
        self._publish(calls, self.precondition_noise(calls[:-1]), device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> ImagenSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One call of the network taken into account: Euler's prediction at even indices, Heun's correction at odd ones.

        Args:
            model_output (`torch.Tensor`):
                The network's output, in the sample's shape, any floating dtype.
            timestep (`float` or `torch.Tensor`):
                The one of `timesteps` that the network was called with.
            sample (`torch.Tensor` of shape `(B, ...)`):
                The sample, before `scale_model_input`. The arithmetic is in float32, for float64 in float64.
            generator (`torch.Generator` or a list of B of them, *optional*):
                The source of churn's noise; only a churned step draws.
            return_dict (`bool`, defaults to `True`):
                A tuple comes back if False.

        Returns:
            [`ImagenSchedulerOutput`] or `tuple`: the next sample in the sample's dtype, and the denoised image.

        Raises:
            ValueError: before `set_timesteps`, after the last step, or for a timestep that is not of the schedule or
                is the second half of a step whose first half has not been done.
        """
        index = self._start_step(model_output, timestep, sample)
        check_generator(generator, len(sample))
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(dtype)
        denoised = self._denoise(x, model_output, index)
        if index == len(self._timestep_values) - 1:
            x_next = denoised  # Euler's step to 0
        elif index % 2 == 0:
            x_next = self._predict(x, denoised, index)
        else:
            x_next = self._correct(x, denoised, index, generator)
        self._step_index = index + 1
        x_next, denoised = x_next.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return x_next, denoised
        return ImagenSchedulerOutput(prev_sample=x_next, pred_original_sample=denoised)

    def _predict(self, x_hat: torch.Tensor, denoised: torch.Tensor, index: int) -> torch.Tensor:
        """Euler's step, lines 7 and 8 of Algorithm 2."""
        sigma_hat, sigma_next = self._levels[index], self._levels[index + 1]
        self._x_hat, self._derivative = x_hat, (x_hat - denoised) / sigma_hat
        return x_hat + (sigma_next - sigma_hat) * self._derivative

    def _correct(self, x: torch.Tensor, denoised: torch.Tensor, index: int, generator) -> torch.Tensor:
        """Heun's step, lines 10 and 11, and the churn of the step after it, lines 5 and 6."""
        if self._derivative is None:
            raise ValueError(
                f"`timestep` {self._timestep_values[index]:g} is the second half of a step: start at an even index of "
                f"`timesteps`, not at {index}"
            )
        sigma_hat, sigma_next = self._levels[index - 1], self._levels[index]
        derivative = (self._derivative + (x - denoised) / sigma_next) / 2
        x_next = self._x_hat + (sigma_next - sigma_hat) * derivative
        self._derivative = self._x_hat = None
        churn = self._churn[(index + 1) // 2]
        if churn > 0:
            noise = randn_tensor(x_next.shape, generator=generator, device=x_next.device, dtype=x_next.dtype)
            x_next = x_next + churn * noise
        return x_next
