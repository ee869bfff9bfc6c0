"""ContinuousDDPMScheduler: continuous-time DDPM with log-SNR conditioning, Kingma et al. 2021, "Variational Diffusion Models" (2107.00630)."""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion import continuous_ddpm as ddpm
from ..diffusion.discrete_ddpm import MAX_START_SIGMA, BetaSchedule
from ..diffusion.edm import per_sample
from ..diffusion.preconditioning import NetworkPreconditioning
from ..utils.arguments import bad_argument
from .schedule_checks import as_tensor, check_images, check_request, check_step_count
from .scheduling_utils import DISCRETE_SCHEDULERS, Generators, ImagenScheduler


class ContinuousDDPMScheduler(ImagenScheduler):
    """
    Variance-preserving diffusion over a time in [0, 1], with a network conditioned on the log-SNR (NVIDIA NeMo's and
    imagen-pytorch's `GaussianDiffusionContinuousTimes`).

    N steps go from t = 1 to t = 0 at the times `linspace(1, 0, N + 1)`, with the ancestral step of eq. 33 for `eta` 1
    and DDIM's for 0. The last step draws no noise.

    Timesteps have two forms, distinguished by their dtype. Floating-point ones, as in `timesteps`, are the network's
    conditioning value: the log-SNR. Integers k are those of diffusers' training scripts,
    `randint(0, num_train_timesteps)`, and denote the time `k / num_train_timesteps`; `conditioning(k)` returns the
    network's conditioning value for them.

    Networks with the scalings of Karras et al. 2022 are supported too (`preconditioning="edm"`): timesteps are then
    `c_noise`.

    Networks trained with discrete betas are supported too (`preconditioning="discrete"`), from the configuration of
    diffusers' DDPM, DDIM or DPM-Solver. Timesteps of both forms are then indices, fractional ones between the noise
    levels of training. Index k of N is the time `(k + 1) / N`; a run starts at that of sigma 80, or of the last beta
    if that is lower, and ends without noise. The variance of a step is the posterior's
    (`variance_type="fixed_small"`), never a learned one.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            The number of integer timesteps in [0, 1].
        beta_schedule (`"squaredcos_cap_v2"` or `"linear"`, defaults to `"squaredcos_cap_v2"`):
            The log-SNR as a function of time: the cosine schedule, or the continuous form of DDPM's linear betas. With
            `"discrete"`, the beta schedule as in diffusers: `"scaled_linear"` and `"sigmoid"` as well.
        prediction_type (`"epsilon"`, `"sample"` or `"v_prediction"`, defaults to `"epsilon"`):
            What the network predicts: the noise, the clean image, or v. With `preconditioning="edm"` as in diffusers'
            EDM schedulers: `"epsilon"` is the raw output F, `"v_prediction"` is -F.
        eta (`float`, defaults to 1.0):
            The share of the posterior's standard deviation that a step draws, from 0 (deterministic) to 1 (ancestral).
        clip_sample (`bool`, defaults to `True`):
            Static thresholding: clamps every predicted clean image.
        clip_sample_range (`float`, defaults to 1.0):
            The limit of static thresholding.
        thresholding (`bool`, defaults to `False`):
            Dynamic thresholding instead (Imagen, section 2.3); takes precedence over `clip_sample`.
        dynamic_thresholding_ratio (`float`, defaults to 0.995):
            The quantile of |x_0| that dynamic thresholding scales to 1.
        sample_max_value (`float`, *optional*):
            Upper bound of this quantile; no bound if None.
        preconditioning (`"variance_preserving"`, `"edm"` or `"discrete"`, defaults to `"variance_preserving"`):
            How the network was trained; see above.
        sigma_data (`float`, defaults to 0.5):
            The standard deviation of the images that a network with `preconditioning="edm"` assumes.
        beta_start (`float`, defaults to 0.0001):
            With `"discrete"`, the first beta, except for the cosine schedule.
        beta_end (`float`, defaults to 0.02):
            With `"discrete"`, the last beta, except for the cosine schedule.
        trained_betas (`list[float]`, *optional*):
            With `"discrete"`, a list of all betas, instead of a schedule.
    """

    _compatibles = ["EDMHeunScheduler", "EDMAdamsScheduler", *DISCRETE_SCHEDULERS]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: ddpm.NoiseSchedule | BetaSchedule = "squaredcos_cap_v2",
        prediction_type: ddpm.PredictionType = "epsilon",
        eta: float = 1.0,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float | None = None,
        preconditioning: NetworkPreconditioning = "variance_preserving",
        sigma_data: float = 0.5,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: list[float] | None = None,
    ) -> None:
        self._check_config()
        self.init_noise_sigma = 1.0
        integers = torch.arange(self.config.num_train_timesteps + 1, dtype=torch.float64)
        log_snr = self._log_snr_at(integers / self.config.num_train_timesteps)
        # entry k belongs to integer timestep k, for diffusers' `compute_snr`
        self.alphas_cumprod = self._log_snr(integers[:-1].long(), torch.float64).sigmoid().to(torch.float32)
        self._publish(ddpm.log_snr_to_sigma(log_snr.flip(0)))

    def _log_snr_at(self, t: torch.Tensor) -> torch.Tensor:
        """Return the log-SNR at times in [0, 1]; for N discrete betas, index k is the time (k + 1) / N, and 0 has no noise."""
        if not self._preconditioning.takes_index:
            return ddpm.log_snr(t, self.config.beta_schedule)
        count = self.config.num_train_timesteps
        return self._log_snr((t * count - 1).clamp(0, count - 1)).masked_fill(t == 0, torch.inf)

    def _times(self, num_steps: int) -> torch.Tensor:
        """Return the N + 1 times between the steps of a run, evenly spaced down to 0."""
        start = 1.0
        if self._preconditioning.takes_index:
            count = self.config.num_train_timesteps
            sigma = min(self._preconditioning.sigma_range[1], MAX_START_SIGMA)
            indices = self.precondition_noise(torch.tensor(sigma, dtype=torch.float64)).item() + 1
            if num_steps > indices + 1e-6:  # rounding
                expected = f"at most {int(indices + 1e-6)}, the number of indices up to sigma {sigma:g}"
                raise bad_argument("num_inference_steps", num_steps, expected)
            start = indices / count
        return torch.linspace(start, 0, num_steps + 1, dtype=torch.float64)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | list[int] | torch.Tensor | None = None,
        sigmas: list[float] | torch.Tensor | None = None,
    ) -> None:
        """
        Set the schedule of a run of N steps: `timesteps` of length N and, on the CPU, `sigmas` of length N + 1.

        `sigmas` are EDM noise levels, `exp(-log_snr / 2)`, the last one that of t = 0.

        Args:
            num_inference_steps (`int`, *optional*):
                N, with evenly spaced times.
            device (`str` or `torch.device`, *optional*):
                Where `timesteps` goes.
            timesteps (`list` or `torch.Tensor`, *optional*):
                Custom schedule of N conditioning values (log-SNR, increasing), or N integers, decreasing.
            sigmas (`list[float]` or `torch.Tensor`, *optional*):
                Custom schedule of N EDM noise levels, decreasing.

        Raises:
            ValueError: unless exactly one of the three is given, and for fewer than one step, or noise levels that do
                not decrease or are not above that of t = 0.
        """
        check_request(num_inference_steps, sigmas, timesteps, device)
        end = self._log_snr_at(torch.zeros(1, dtype=torch.float64))
        if num_inference_steps is not None:
            log_snr = self._log_snr_at(self._times(check_step_count(num_inference_steps))[:-1])
        else:
            given = self._given_sigmas(sigmas, timesteps)
            log_snr = ddpm.sigma_to_log_snr(given)
            if not log_snr[-1] < end:
                raise ValueError(
                    f"`{'sigmas' if timesteps is None else 'timesteps'}` ends at {given[-1].item():g}, but should end at a "
                    f"noise level above that of t = 0, {ddpm.log_snr_to_sigma(end).item():g}."
                )
        self.num_inference_steps = len(log_snr)
        log_snr = torch.cat([log_snr, end])  # (N + 1,)
        self._set_coefficients(log_snr)
        self._publish(ddpm.log_snr_to_sigma(log_snr), device)

    def _timesteps_to_sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        return ddpm.log_snr_to_sigma(self._log_snr(timesteps, torch.float64))

    def _set_coefficients(self, log_snr: torch.Tensor) -> None:
        """Store the coefficients of each step as Python numbers, computed in float64."""
        alpha = ddpm.alpha_sigma(log_snr[:-1]).alpha
        scalings = self._preconditioning.scalings(ddpm.log_snr_to_sigma(log_snr[:-1]))
        # these scalings are for the EDM image, which is x_t / alpha
        self._c_in, self._c_skip = (scalings.c_in / alpha).tolist(), (scalings.c_skip / alpha).tolist()
        self._c_out = scalings.c_out.tolist()
        steps = ddpm.reverse_step(log_snr[:-1], log_snr[1:], self.config.eta)
        self._coef_x_t, self._coef_x_0 = steps.coef_x_t.tolist(), steps.coef_x_0.tolist()
        self._noise_std = steps.variance.sqrt()[:-1].tolist() + [0.0]  # the last step draws no noise

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return the network's input: `sample` itself, or with `preconditioning="edm"` the scaled EDM image of the timestep."""
        if self._preconditioning.takes_x_t:
            return sample
        index = self._start(timestep)
        if index is not None:
            return sample * self._c_in[index]
        sigma = per_sample(self.timestep_to_sigma(as_tensor("timestep", timestep)), sample)
        alpha = ddpm.alpha_sigma(ddpm.sigma_to_log_snr(sigma)).alpha
        return (sample * (self._preconditioning.scalings(sigma).c_in / alpha)).to(sample.dtype)

    def _advance(self, x: torch.Tensor, denoised: torch.Tensor, index: int, generator: Generators) -> torch.Tensor:
        """Compute the step to the next time of the schedule; noise is drawn unless `eta` is 0 or the step is the last."""
        x_next = self._coef_x_t[index] * x + self._coef_x_0[index] * denoised
        if self._noise_std[index] > 0:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x_next = x_next + self._noise_std[index] * noise
        return x_next

    def _log_snr(self, timesteps: float | torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the log-SNR of timesteps of either form, in their dtype if floating-point, else in `dtype`."""
        timesteps = as_tensor("timesteps", timesteps)
        if self._preconditioning.takes_index and not timesteps.is_floating_point():
            timesteps = timesteps.to(dtype)
        if timesteps.is_floating_point():
            return ddpm.sigma_to_log_snr(self.timestep_to_sigma(timesteps))
        last = self.config.num_train_timesteps
        # on an accelerator the check would cause a synchronization
        if timesteps.device.type == "cpu" and ((timesteps < 0) | (timesteps > last)).any():
            raise bad_argument("timesteps", timesteps.tolist(), f"integers between 0 and {last}")
        return self._log_snr_at(timesteps.to(dtype) / last)

    def conditioning(self, timesteps: float | torch.Tensor) -> torch.Tensor:
        """Return the network's conditioning value for timesteps of either form: log-SNR, `c_noise` or index."""
        return self.precondition_noise(ddpm.log_snr_to_sigma(self._log_snr(timesteps)))

    def _mix(self, x_0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return ddpm.q_sample(x_0, noise, self._log_snr(timesteps))

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor) -> torch.Tensor:
        """Return the target of v-prediction for clean images, `alpha * noise - sigma * sample`; see `add_noise`."""
        check_images(sample=sample, noise=noise)
        timesteps = as_tensor("timesteps", timesteps, sample)
        return ddpm.velocity(sample, noise, self._log_snr(timesteps))
