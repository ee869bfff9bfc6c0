"""EDMHeunScheduler: the second-order sampler of Karras et al. 2022 (EDM, arXiv 2206.00364), with optional churn."""

import math

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion import edm
from ..diffusion.continuous_ddpm import NoiseSchedule, PredictionType
from ..diffusion.discrete_ddpm import BetaSchedule
from ..diffusion.preconditioning import NetworkPreconditioning
from .scheduling_utils import DISCRETE_SCHEDULERS, EDMScheduler, Generators


class EDMHeunScheduler(EDMScheduler):
    """
    Algorithm 2 of Karras et al. 2022 [1]: Heun's second-order steps over the noise levels of eq. 5, with churn.

    `N` steps call the network `2 N - 1` times, once for each of `timesteps`: at even indices `step` computes the Euler
    prediction, at odd ones its Heun correction; the last step is an Euler step. A run starts at an even index. It is
    an ordinary loop of `scale_model_input`, network and `step`, from `init_noise_sigma` times unit noise. Pass the
    network's raw output to `step`, after any guidance.

    Churn increases a noise level `sigma` to `sigma_hat` just before the network is called. `timesteps` has the
    increased one, and the noise is added at the end of the previous step, from the generator passed there; that of the
    first step is part of `init_noise_sigma`. Without churn no noise is drawn.

    Networks trained with `ContinuousDDPMScheduler` are supported too: `EDMHeunScheduler.from_config` of its
    configuration sets `preconditioning="variance_preserving"`. `sigma_min` should then not be below the lowest noise
    level of training, `exp(-log_snr(0) / 2)`, which is 0.0125 for the cosine schedule.

    Networks trained with discrete betas are supported too, from the configuration of diffusers' DDPM, DDIM or
    DPM-Solver, which sets `preconditioning="discrete"`. They are conditioned on indices, fractional between the noise
    levels of training. `sigma_min` and `sigma_max` are clamped to those levels. The steps solve the ODE: they use only
    the prediction of noise, image or v, and no learned variance.

    [1] https://huggingface.co/papers/2206.00364

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            The number of noise levels in `timesteps` and `sigmas` before `set_timesteps` is called; with `"discrete"`
            the number of betas.
        sigma_min (`float`, defaults to 0.002):
            The lowest noise level above 0, in units of the image, whose values lie in [-1, 1].
        sigma_max (`float`, defaults to 80.0):
            The noise level at which sampling starts.
        sigma_data (`float`, defaults to 0.5):
            The standard deviation of the images, as assumed by the preconditioning in training.
        rho (`float`, defaults to 7.0):
            Exponent of the noise levels (eq. 5): higher values shift steps to low noise levels.
        s_churn (`float`, defaults to 0.0):
            The amount of noise added over the whole run (Algorithm 2). 0 is deterministic. With discrete betas no
            noise level is increased above the highest.
        s_min (`float`, defaults to 0.0):
            The lowest noise level at which churn is applied.
        s_max (`float`, *optional*):
            The highest noise level at which churn is applied; no bound if None.
        s_noise (`float`, defaults to 1.0):
            The standard deviation of the noise that churn adds.
        preconditioning (`"edm"`, `"variance_preserving"` or `"discrete"`, defaults to `"edm"`):
            How the network was trained: with the scalings of [1] and c_noise as its conditioning value, in continuous
            DDPM with the log-SNR, or in DDPM with discrete betas and their index.
        prediction_type (`str`, defaults to `"epsilon"`):
            With `"edm"`, as in diffusers' EDM schedulers: `"epsilon"` is the output F of [1], `"v_prediction"` is -F.
            With the others: `"epsilon"`, `"sample"` or `"v_prediction"`.
        thresholding (`bool`, defaults to `False`):
            Dynamic thresholding of every denoised image (Imagen, section 2.3); takes precedence over `clip_sample`.
        dynamic_thresholding_ratio (`float`, defaults to 0.995):
            The quantile of |x_0| that dynamic thresholding scales to 1.
        sample_max_value (`float`, *optional*):
            Upper bound of this quantile; no bound if None.
        clip_sample (`bool`, defaults to `False`):
            Static thresholding: clamps every denoised image.
        clip_sample_range (`float`, defaults to 1.0):
            The limit of static thresholding.
        beta_schedule (`str`, defaults to `"squaredcos_cap_v2"`):
            With `"discrete"`, as in diffusers: `"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"` or `"sigmoid"`.
            With `"variance_preserving"` that of `ContinuousDDPMScheduler`; not used with `"edm"`, kept for other
            schedulers.
        beta_start (`float`, defaults to 0.0001):
            With `"discrete"`, the first beta, except for the cosine schedule.
        beta_end (`float`, defaults to 0.02):
            With `"discrete"`, the last beta, except for the cosine schedule.
        trained_betas (`list[float]`, *optional*):
            With `"discrete"`, a list of all betas, instead of a schedule.
    """

    _compatibles = [
        "EDMAdamsScheduler",
        "ContinuousDDPMScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        *DISCRETE_SCHEDULERS,
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
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        beta_schedule: NoiseSchedule | BetaSchedule = "squaredcos_cap_v2",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: list[float] | None = None,
    ) -> None:
        if isinstance(s_max, float) and s_max == math.inf:
            self.register_to_config(s_max=None)  # JSON has no infinity
        self._set_up()

    def _default_sigmas(self, num_steps: int) -> torch.Tensor:
        """Return the noise levels of eq. 5."""
        return edm.karras_sigmas(num_steps, self.config.sigma_min, self.config.sigma_max, self.config.rho)

    def _plan_calls(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Plan two network calls per step, at the increased noise level and at the one where the step ends."""
        config = self.config
        raised = edm.churned_sigmas(sigmas, config.s_churn, config.s_min, config.s_max)  # (N,)
        raised = torch.maximum(sigmas, raised.clamp(max=self._preconditioning.sigma_range[1]))
        churn = config.s_noise * (raised**2 - sigmas**2).clamp(min=0).sqrt()
        following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
        calls = torch.stack([raised, following], dim=1).flatten()  # (2 N,)
        self.init_noise_sigma = math.hypot(sigmas[0], churn[0])
        self._call_sigmas, self._churn = calls.tolist(), churn.tolist()
        self._x_hat: torch.Tensor | None = None
        self._derivative: torch.Tensor | None = None
        return calls

    def _advance(self, x: torch.Tensor, denoised: torch.Tensor, index: int, generator: Generators) -> torch.Tensor:
        if index == len(self._timestep_values) - 1:
            return denoised  # Euler's step to 0
        if index % 2 == 0:
            return self._predict(x, denoised, index)
        return self._correct(x, denoised, index, generator)

    def _predict(self, x_hat: torch.Tensor, denoised: torch.Tensor, index: int) -> torch.Tensor:
        """Compute the Euler step, lines 7 and 8 of Algorithm 2."""
        sigma_hat, sigma_next = self._call_sigmas[index], self._call_sigmas[index + 1]
        self._x_hat, self._derivative = x_hat, (x_hat - denoised) / sigma_hat
        return x_hat + (sigma_next - sigma_hat) * self._derivative

    def _correct(self, x: torch.Tensor, denoised: torch.Tensor, index: int, generator: Generators) -> torch.Tensor:
        """Compute the Heun correction, lines 10 and 11, and the churn of the next step, lines 5 and 6."""
        if self._derivative is None:
            raise ValueError(
                f"`timestep` is {self._timestep_values[index]:g}, the second half of a step, but should be one at an even "
                f"index of `timesteps` in the first call of a run, and not at {index}."
            )
        sigma_hat, sigma_next = self._call_sigmas[index - 1], self._call_sigmas[index]
        derivative = (self._derivative + (x - denoised) / sigma_next) / 2
        x_next = self._x_hat + (sigma_next - sigma_hat) * derivative
        self._derivative = self._x_hat = None
        churn = self._churn[(index + 1) // 2]
        if churn > 0:
            noise = randn_tensor(x_next.shape, generator=generator, device=x_next.device, dtype=x_next.dtype)
            x_next = x_next + churn * noise
        return x_next
