"""Schedules of a stage: settings of its scheduler, and checks that the scheduler supports them."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import EDMEulerScheduler, SchedulerMixin

from ..diffusion.discrete_ddpm import BETA_SCHEDULES, BetaSchedule, declared_log_snrs, trained_log_snrs
from ..schedulers.foreign_configs import DISCRETE_MEANINGS
from ..schedulers.scheduling_utils import ImagenScheduler
from ..utils.arguments import class_of, shown
from ..utils.errors import one_line
from .stages import Stage


Schedule = list[float] | torch.Tensor | None


class StageSettings(NamedTuple):
    """Settings of one stage; see the pipelines' arguments of the same names."""

    num_inference_steps: int
    sigmas: Schedule
    timesteps: Schedule
    guidance_scale: float
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float
    low_res_noise_level: float


class NoiseLevel(NamedTuple):
    """Noise level at which a sample is `signal * x_0 + noise * unit noise`."""

    signal: float
    noise: float


def set_schedule(scheduler: SchedulerMixin, name: str, settings: StageSettings, device: torch.device) -> None:
    """Set the timesteps of the scheduler of the stage `name`: custom ones, or a number of steps.

    Raises:
        ValueError: for custom noise levels that the scheduler does not support.
    """
    own = {key: getattr(settings, key) for key in ("sigmas", "timesteps")}
    own = {key: value for key, value in own.items() if value is not None}
    if not own:
        scheduler.set_timesteps(settings.num_inference_steps, device=device)
        return
    (key, asked), kind = *own.items(), type(scheduler).__name__
    # diffusers' EDMEulerScheduler interprets `sigmas` as positions between its own bounds
    if key not in inspect.signature(scheduler.set_timesteps).parameters or isinstance(scheduler, EDMEulerScheduler):
        raise ValueError(
            f"`{key}` is given for the stage `{name}`, but its {kind} does not support custom `{key}`: pass "
            "`num_inference_steps`, or use another scheduler, such as EDMAdamsScheduler."
        )
    scheduler.set_timesteps(device=device, **own)
    published = torch.as_tensor(getattr(scheduler, key)).cpu().double()
    for value in torch.as_tensor(asked).tolist():
        if not isinstance(scheduler, ImagenScheduler) and not (published - value).abs().min() <= 1e-3 * abs(value):
            raise ValueError(
                f"`{key}` is {shown(asked)} for the stage `{name}`, but its {kind} changes them to "
                f"{shown(published.tolist())}."
            )


def begin_at(scheduler: SchedulerMixin, index: int) -> None:
    """Start at a step of the schedule; schedulers without an index use only the timestep."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)


def noise_levels_of_steps(scheduler: SchedulerMixin) -> dict[int, NoiseLevel]:
    """Return the noise level at the start of each step, by the index of the step's first call."""
    unit = torch.eye(2)
    noise_levels = {}
    for index in range(0, len(scheduler.timesteps), scheduler.order):
        timesteps = scheduler.timesteps[index].cpu().expand(2)
        # only signal and only noise, as mixed by the scheduler
        mixed = scheduler.add_noise(unit[0][:, None], unit[1][:, None], timesteps).flatten().tolist()
        noise_levels[index] = NoiseLevel(*mixed)
    return noise_levels


def check_drives(scheduler: SchedulerMixin, stage: Stage, settings: StageSettings) -> None:
    """Run the schedule on a copy of a scheduler that is not of this package, without the network.

    Raises:
        ValueError: for one that does not have the interface of diffusers' schedulers, or fails during the run, and for
            any scheduler with other noise levels than the network was trained with.
    """
    check_trained_levels(scheduler, stage)
    check_unclipped(scheduler, stage)
    if isinstance(scheduler, ImagenScheduler):
        return
    try:
        if "prev_timestep" in inspect.signature(scheduler.step).parameters:
            raise ValueError(
                "its `step` requires `prev_timestep`, as in UnCLIPPipeline; use DDIMScheduler or EDMAdamsScheduler, "
                "by `from_config` of its configuration"
            )
        walk = copy.deepcopy(scheduler)
        with torch.random.fork_rng(devices=[]):  # some draw noise
            set_schedule(walk, stage.name, settings, torch.device("cpu"))
            if not noise_levels_of_steps(walk):
                raise ValueError("its schedule is empty")
            _walk_through(walk, stage)
    except Exception as error:
        if isinstance(error, ValueError) and stage.name in str(error):
            raise
        raise ValueError(
            f"The scheduler of the stage `{stage.name}`, {class_of(scheduler)}, is not supported: {one_line(error)}"
        ) from error


def check_trained_levels(scheduler: SchedulerMixin, stage: Stage) -> None:
    """
    Raise ValueError for a scheduler with other noise levels than the stage's network declares, if it declares any.
    """
    declared = stage.unet.trained_beta_schedule
    if declared is None or has_levels(scheduler.config, declared):
        return
    config, kind = scheduler.config, type(scheduler).__name__
    key = "preconditioning" if config.get("preconditioning", "discrete") != "discrete" else "beta_schedule"
    value = f"`{key}` {config[key]!r}" if key in config else "no `beta_schedule`"
    way = kind if "beta_schedule" in config else "EDMAdamsScheduler"
    raise ValueError(
        f"The scheduler of the stage `{stage.name}` is {kind} with {value}, which has other noise levels than the "
        f"1000 of {declared!r} that its network was trained with: create one by "
        f"{way}.from_config(pipe.{stage.kind.scheduler}.config), or pipe.scheduler.config for a single stage, from "
        "the scheduler that was loaded with it."
    )


def check_unclipped(scheduler: SchedulerMixin, stage: Stage) -> None:
    """Raise ValueError for a scheduler that clips or thresholds the sample, for a network that denoises residuals."""
    clips = next((name for name in ("thresholding", "clip_sample") if scheduler.config.get(name)), None)
    if stage.unet.residual_scale is not None and clips is not None:
        raise ValueError(
            f"The scheduler of the stage `{stage.name}`, {class_of(scheduler)}, has `{clips}` True, but its "
            f"network denoises residuals, which are not in [-1, 1]: create one by from_config(..., {clips}=False)."
        )


def has_levels(config: Mapping[str, Any], beta_schedule: BetaSchedule) -> bool:
    """Return whether a scheduler's configuration has the 1000 noise levels that a network declares by this name."""
    if "beta_schedule" not in config or config.get("preconditioning", "discrete") != "discrete":
        return False
    if any(config.get(key, meaning) != meaning for key, meaning in DISCRETE_MEANINGS.items()):
        return False
    betas = config.get("trained_betas")
    if betas is None and config["beta_schedule"] not in BETA_SCHEDULES:
        return False
    ends = (config.get(key) or 0.0 for key in ("beta_start", "beta_end"))
    trained_betas = None if betas is None else tuple(torch.as_tensor(betas).tolist())
    found = trained_log_snrs(config["num_train_timesteps"], config["beta_schedule"], *ends, trained_betas)
    declared = declared_log_snrs(beta_schedule)
    # betas in float32 change the lowest noise level by a few ten-thousandths
    return found.shape == declared.shape and torch.allclose(found, declared, rtol=0, atol=0.01)


def reads_variance(scheduler: SchedulerMixin) -> bool:
    """Return whether a scheduler's steps use the variance that the network predicts, after the prediction."""
    # a scheduler created from another's configuration keeps entries that it does not use
    has_variance = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return has_variance and scheduler.config.get("variance_type") in ("learned", "learned_range")


def _walk_through(scheduler: SchedulerMixin, stage: Stage) -> None:
    """Run a stage's loop on a small image, with a network that predicts zeros."""
    channels = stage.unet.in_channels
    if reads_variance(scheduler) and stage.unet.out_channels != 2 * channels:
        raise ValueError(
            f"its `variance_type` is {scheduler.config['variance_type']!r}, but the network predicts no variance"
        )
    begin_at(scheduler, 0)
    sample = torch.zeros(1, channels, 8, 8) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x = scheduler.scale_model_input(sample, timestep)
        output = torch.zeros(1, (2 if reads_variance(scheduler) else 1) * channels, *x.shape[2:])
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    if not isinstance(sample, torch.Tensor) or sample.shape != (1, channels, 8, 8):
        raise ValueError(f"its steps return {shown(sample)}")
