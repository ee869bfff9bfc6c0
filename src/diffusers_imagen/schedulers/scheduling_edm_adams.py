"""EDMAdamsScheduler: a fast third-order multistep solver for EDM denoisers; formulas in `diffusion/multistep.py`."""

from functools import reduce

import torch
from diffusers.configuration_utils import register_to_config

from ..diffusion import multistep
from ..diffusion.continuous_ddpm import NoiseSchedule, PredictionType
from ..diffusion.discrete_ddpm import BetaSchedule
from ..diffusion.preconditioning import NetworkPreconditioning
from .scheduling_utils import DISCRETE_SCHEDULERS, EDMScheduler, Generators, ImagenSchedulerOutput


class EDMAdamsScheduler(EDMScheduler):
    """
    Adams predictor-corrector for the sampling ODE of Karras et al. 2022 [1]: third order, one call of the network per
    step.

    Each step is predicted from the last two denoised images (Adams-Bashforth). The next call of the network corrects
    the step, from the last three (Adams-Moulton), without a further call. The first step has only one denoised image
    and is of first order, and so is the last, which returns the denoised image of `sigma_min`. The correction is added
    to the sample passed to `step`, so that a callback may change it between steps.

    The scheduler is deterministic, and runs in an ordinary loop of `scale_model_input`, network and `step`, from
    `init_noise_sigma` times unit noise. Pass the network's raw output to `step`, after any guidance. The noise levels
    are densest around `sigma_data` ([`~diffusion.multistep.centred_sigmas`]); `rho` in another scheduler's
    configuration is kept for converting back, and not used.

    Networks trained with `ContinuousDDPMScheduler` are supported too: `EDMAdamsScheduler.from_config` of its
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
            The standard deviation of the images, as assumed by the preconditioning in training; noise levels are
            densest around it.
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
        "EDMHeunScheduler",
        "ContinuousDDPMScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        *DISCRETE_SCHEDULERS,
    ]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
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
        self._set_up()

    def _default_sigmas(self, num_steps: int) -> torch.Tensor:
        """Return the noise levels of `centred_sigmas`."""
        config = self.config
        return multistep.centred_sigmas(num_steps, config.sigma_min, config.sigma_max, config.sigma_data)

    def _plan_calls(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Plan one network call per step, at the noise level where the step starts."""
        self.init_noise_sigma = sigmas[0].item()
        self._set_weights(sigmas)
        self._denoised: list[torch.Tensor] = []  # from previous calls, newest first
        return torch.cat([sigmas, sigmas.new_zeros(1)])

    def _set_weights(self, sigmas: torch.Tensor) -> None:
        """
        Store the weights of every call as Python numbers: for the prediction of the next step, from one and from two
        denoised images, and for the correction of the previous one, from two and from three; newest image first.
        """
        sigma, sigma_next = sigmas[:-1], sigmas[1:]  # (N - 1,)
        # there is no noise level before the first; the value keeps the unused weights of its row finite
        before = torch.cat([2 * sigmas[:1], sigmas])[: len(sigma)]
        known = torch.stack([sigma_next, sigma, before], dim=-1)  # (N - 1, 3)

        def weights(nodes):
            return multistep.adams_weights(sigma, sigma_next, nodes, self.config.sigma_data)

        predictors = [weights(known[:, 1:2]), weights(known[:, 1:3])]
        correctors = [weights(known[:, :2]), weights(known)]
        for corrector, predictor in zip(correctors, predictors):
            corrector[:, 1:] -= predictor  # difference between the corrected and the predicted step
        self._shrink = (sigma_next / sigma).tolist()
        self._predictors = [predictor.tolist() for predictor in predictors]
        self._corrections = [correction.tolist() for correction in correctors]

    def step(  # type: ignore[override]  # without the generator
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> ImagenSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Correct the previous step with the network's output, and predict the next one.

        Arguments, results and errors are those of [`EDMHeunScheduler.step`], except for `generator`, which pipelines
        pass to every scheduler whose `step` accepts one: this scheduler draws no noise.
        """
        return super().step(model_output, timestep, sample, return_dict=return_dict)

    def _advance(self, x: torch.Tensor, denoised: torch.Tensor, index: int, generator: Generators) -> torch.Tensor:
        known = [denoised, *self._denoised]
        if index == len(self._timestep_values) - 1:
            self._denoised = []
            return denoised
        if len(known) > 1:
            x = x + _weighted_sum(self._corrections[len(known) - 2][index - 1], known)
        self._denoised = known[:2]
        predictor = self._predictors[min(len(known), 2) - 1][index]
        return self._shrink[index] * x + _weighted_sum(predictor, known)


def _weighted_sum(weights: list[float], images: list[torch.Tensor]) -> torch.Tensor:
    """Return the weighted sum of as many images as there are weights."""
    return reduce(torch.add, (weight * image for weight, image in zip(weights, images)))
