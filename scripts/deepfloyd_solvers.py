"""Sampling error against network calls for small networks of DeepFloyd IF's architecture; see `compare_solvers.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from small_deepfloyd import LOG_SNRS, STAGE_1, STAGE_2, conditioning_of, train

from diffusers_imagen import EDMAdamsScheduler, EDMHeunScheduler, ImagenUNetModel
from diffusers_imagen.diffusion.continuous_ddpm import log_snr_to_sigma
from diffusers_imagen.diffusion.guidance import classifier_free_guidance


START = 990  # first index of the 100 steps of IF's repositories
START_SIGMA = log_snr_to_sigma(LOG_SNRS[START]).item()
# Evenly spaced indices from 990 to 0 are integers for these, with the step 1000 // (calls - 1) of DDIM.
DEEPFLOYD_CALLS = (12, 19, 31, 46, 100)
REFERENCE_STEPS = 600
LOW_RES_INDEX = 250  # noise level of stage II's low-resolution image, the default of IF's pipeline
BATCH_SIZE = 32


class Setting(NamedTuple):
    """Sampling setting: a stage, 1 or 2, a guidance scale, and the limit of thresholding, or None."""

    stage: int
    guidance: float
    max_value: float | None

    @property
    def title(self) -> str:
        kind = {None: "no thresholding", 1.0: "clamped"}.get(self.max_value, "thresholding")
        return f"stage {'I' * self.stage}, guidance {self.guidance:g}, {kind}"

    @property
    def config(self) -> dict[str, Any]:
        """Return the configuration of the repositories' scheduler, with a fixed variance."""
        thresholds = {"thresholding": self.max_value is not None, "sample_max_value": self.max_value or 1.0}
        return DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            clip_sample=False,
            variance_type="fixed_small",
            dynamic_thresholding_ratio=0.95,
            **thresholds,
        ).config


SETTINGS = (Setting(1, 1.0, None), Setting(1, 1.0, 1.5), Setting(1, 7.0, 1.5), Setting(2, 4.0, 1.0))


class Run(NamedTuple):
    """Scheduler with its timesteps, initial standard deviation of the sample, and options of its step."""

    scheduler: Any
    start: float
    options: dict[str, Any]


def of_edm(scheduler_class: type, config: dict[str, Any], calls: int) -> Run:
    scheduler = scheduler_class.from_config(config, sigma_max=START_SIGMA)
    scheduler.set_timesteps(calls if scheduler.order == 1 else (calls + 1) // 2)
    return Run(scheduler, (1 + START_SIGMA**2) ** 0.5, {})  # unit noise at index 990, as an EDM image


def even_indices(calls: int) -> list[int]:
    return list(range(START, -1, -(START // (calls - 1))))


def of_ddim(config: dict[str, Any], calls: int, **options) -> Run:
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(calls - 1)  # determines the step size
    scheduler.timesteps = torch.tensor(even_indices(calls))
    return Run(scheduler, 1.0, options)


def of_ddpm(config: dict[str, Any], calls: int) -> Run:
    scheduler = DDPMScheduler.from_config(config)
    scheduler.set_timesteps(timesteps=even_indices(calls))
    return Run(scheduler, 1.0, {"generator": torch.Generator().manual_seed(3)})


def of_dpm(order: int, config: dict[str, Any], calls: int) -> Run:
    scheduler = DPMSolverMultistepScheduler.from_config(config, solver_order=order)
    scheduler.set_timesteps(timesteps=even_indices(calls))
    return Run(scheduler, 1.0, {})


SOLVERS: dict[str, Callable[[dict[str, Any], int], Run]] = {
    "EDMAdams": lambda config, calls: of_edm(EDMAdamsScheduler, config, calls),
    "EDMHeun": lambda config, calls: of_edm(EDMHeunScheduler, config, calls),
    "diffusers DDPM": of_ddpm,
    "diffusers DDIM": of_ddim,
    "diffusers DDIM, clipped": lambda config, calls: of_ddim(config, calls, use_clipped_model_output=True),
    "diffusers DPM++ 2M": lambda config, calls: of_dpm(2, config, calls),
    "diffusers DPM++ 3M": lambda config, calls: of_dpm(3, config, calls),
}


def guided(unet: ImagenUNetModel, guidance: float, num_images: int) -> Callable:
    """Return a function that predicts guided noise from `(B, 3, H, W)` and an index, with the network's captions."""
    branches = conditioning_of(unet, num_images, LOW_RES_INDEX, seed=5)
    branches = branches[:1] if guidance == 1 else branches
    inputs = {
        name: torch.cat(values) for name, *values in zip(branches[0]._fields, *branches) if values[0] is not None
    }
    inputs["encoder_hidden_states"] = unet.encode_text(inputs["encoder_hidden_states"])

    def predict(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        output = unet(torch.cat([x] * len(branches)), index, **inputs).sample[:, :3].chunk(len(branches))
        return output[0] if len(output) == 1 else classifier_free_guidance(*output, guidance)

    return predict


def sample(run: Run, predict: Callable, noise: torch.Tensor) -> torch.Tensor:
    """Run the sampling loop of diffusers' pipelines."""
    x = noise * run.start
    for t in run.scheduler.timesteps:
        x = run.scheduler.step(predict(run.scheduler.scale_model_input(x, t), t), t, x, **run.options).prev_sample
    return x


@torch.no_grad()
def errors(unet: ImagenUNetModel, setting: Setting, num_images: int) -> dict[str, list[float]]:
    """Compute the relative L2 distance to the reference by solver, one for each of DEEPFLOYD_CALLS."""
    predict = guided(unet, setting.guidance, num_images)
    noise = torch.randn(num_images, 3, unet.resolution, unet.resolution, generator=torch.Generator().manual_seed(0))
    exact = sample(of_edm(EDMHeunScheduler, setting.config, 2 * REFERENCE_STEPS), predict, noise)

    def error(make: Callable, calls: int) -> float:
        return ((sample(make(setting.config, calls), predict, noise) - exact).norm() / exact.norm()).item()

    return {name: [error(make, calls) for calls in DEEPFLOYD_CALLS] for name, make in SOLVERS.items()}


def compare_deepfloyd(train_steps: int, num_images: int) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """Train both stages; return a description of them, and errors by setting and solver."""
    unets = {stage: train(config, train_steps, BATCH_SIZE) for stage, config in ((1, STAGE_1), (2, STAGE_2))}
    results = {}
    for setting in SETTINGS:
        results[setting.title] = errors(unets[setting.stage], setting, num_images)
        print(setting.title, flush=True)
    sizes = {
        stage: f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters" for stage, unet in unets.items()
    }
    networks = (
        f"Stage I draws {unets[1].resolution} px ({sizes[1]}), stage II enlarges them to {unets[2].resolution} px "
        f"({sizes[2]}); each was trained for {train_steps} steps of {BATCH_SIZE} drawn shapes, with captions as embeddings."
    )
    return networks, results
