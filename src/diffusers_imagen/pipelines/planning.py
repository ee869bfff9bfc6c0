"""Planning of all network calls of a stage before the first: sizes, noise levels, guidance, resampling.

All values are on the CPU, so that the loop does not synchronize with an accelerator.
"""

import copy
import itertools
from fractions import Fraction
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin

from ..utils.arguments import is_integer, shown
from .callbacks import Callback
from .image_inputs import GivenImages
from .schedules import NoiseLevel, StageSettings, check_drives, noise_levels_of_steps, set_schedule
from .stages import Stage


Size = tuple[int, int]  # height, width
Generators = list[torch.Generator] | None


CLEAN = NoiseLevel(1.0, 0.0)


class Call(NamedTuple):
    """One call of the network."""

    index: int  # type: ignore[assignment]  # into the scheduler's timesteps; hides tuple.index
    guided: bool  # whether its noise level lies in the guidance interval
    noise_level_after: NoiseLevel | None  # of the sample after the call; None in the middle of a step
    back_to: int | None  # the index to return to afterwards, with more noise, for resampling


class StagePlan(NamedTuple):
    """Plan of a stage."""

    stage: Stage
    scheduler: SchedulerMixin
    settings: StageSettings
    size: Size
    low_res_size: Size | None  # of the low-resolution image of a super-resolution stage
    calls: list[Call]
    noise_levels: dict[int, NoiseLevel]  # at the start of each step, by its index

    @property
    def begins(self) -> int:
        """Index of the first call: above 0 if the stage starts from an image."""
        return self.calls[0].index


class Request(NamedTuple):
    """Plan of a pipeline call, with its arguments checked."""

    plans: list[StagePlan]
    num_images: int
    generators: Generators
    noise: torch.Tensor | None  # the caller's initial noise for the first stage
    given: GivenImages | None  # the caller's images, to upscale, change or repaint
    starts_from_image: bool  # whether the base stage starts from the image with noise
    callback: Callback


def plan_stages(
    stages: list[Stage],
    settings: list[StageSettings],
    sizes: dict[int, Size],
    low_resolution: int | None,
    strength: float,
    num_resample_times: int,
    device: torch.device,
) -> list[StagePlan]:
    """Plan all stages; `strength` and `num_resample_times` apply to the base stage.

    Raises:
        ValueError: for noise levels that a scheduler rejects, a scheduler that is not compatible with a stage, or a
            guidance interval for a scheduler without `sigmas`.
    """
    plans, taken = [], set()
    for stage, wanted in zip(stages, settings):
        # two stages may share a scheduler, which can store only one schedule at a time
        scheduler = copy.deepcopy(stage.scheduler) if id(stage.scheduler) in taken else stage.scheduler
        taken.add(id(scheduler))
        check_drives(scheduler, stage, wanted)
        set_schedule(scheduler, stage.name, wanted, device)
        noise_levels = noise_levels_of_steps(scheduler)
        first = first_step(stage.name, len(noise_levels), strength) if stage.is_base else 0
        times = num_resample_times if stage.is_base else 1
        calls = plan_calls(scheduler, list(noise_levels.items())[first:], wanted, times)
        low_res_size = None if stage.is_base or low_resolution is None else sizes[low_resolution]
        plans.append(StagePlan(stage, scheduler, wanted, sizes[stage.resolution], low_res_size, calls, noise_levels))
        low_resolution = stage.resolution
    return plans


def first_step(name: str, num_steps: int, strength: float) -> int:
    """Return the first step of image-to-image generation: the last `strength` of the steps run."""
    running = min(int(num_steps * strength + 1e-6), num_steps)
    if running < 1:
        raise ValueError(
            f"`strength` is {strength}, which leaves none of the {num_steps} steps of the stage `{name}`; it should "
            f"be at least {1 / num_steps:.3g}."
        )
    return num_steps - running


def plan_calls(
    scheduler: SchedulerMixin, starts: list[tuple[int, NoiseLevel]], settings: StageSettings, num_resample_times: int
) -> list[Call]:
    """
    Plan the calls of the steps that begin at `starts`; each step except the last runs `num_resample_times` times.
    """
    num_calls = len(scheduler.timesteps)
    guided = guided_calls(scheduler, settings.guidance_interval)
    following = [noise_level for _, noise_level in starts[1:]] + [CLEAN]
    calls = []
    for (start, _), noise_level_after in zip(starts, following):
        end = min(start + scheduler.order, num_calls)
        times = 1 if end == num_calls else num_resample_times
        for time in range(times):
            calls += [Call(index, guided[index], None, None) for index in range(start, end)]
            calls[-1] = calls[-1]._replace(
                noise_level_after=noise_level_after, back_to=start if time < times - 1 else None
            )
    return calls


def guided_calls(scheduler: SchedulerMixin, interval: tuple[float, float] | None) -> list[bool]:
    """Return for each call whether its noise level is in the interval; True for all calls without an interval."""
    num_calls = len(scheduler.timesteps)
    if interval is None:
        return [True] * num_calls
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        raise ValueError(f"`guidance_interval` needs noise levels, but {type(scheduler).__name__} has no `sigmas`.")
    return [interval[0] <= sigma <= interval[1] for sigma in sigmas[:num_calls].tolist()]


# ---- sizes


def plan_sizes(
    stages: list[Stage], low_resolution: int | None, height: int | None, width: int | None
) -> dict[int, Size]:
    """
    Return height and width of the images of every stage, by the stage's resolution, for a last image `height x width`.

    `low_resolution` is the resolution of the image that the first stage upscales, if it is a super-resolution stage.

    Raises:
        ValueError: for a size that a network does not support; the message names the multiple that all support.
    """
    last = stages[-1].resolution
    height, width = (last if pixels is None else pixels for pixels in (height, width))
    strides = strides_of(stages, low_resolution)
    multiple = multiple_of(stages, low_resolution)
    for name, pixels in (("height", height), ("width", width)):
        if not is_integer(pixels) or pixels < 1 or pixels % multiple:
            raise ValueError(
                f"`{name}` is {shown(pixels)}, but should be a multiple of {multiple}, in pixels of the last image, "
                "for the networks of this pipeline."
            )
    height, width = int(height), int(width)
    return {resolution: (height * resolution // last, width * resolution // last) for resolution in strides}


def strides_of(stages: list[Stage], low_resolution: int | None) -> dict[int, int]:
    """Return the divisor of height and width of each stage's images, by resolution; 1 for the caller's images."""
    given = {} if low_resolution is None else {low_resolution: 1}
    return {stage.resolution: stage.unet.total_stride for stage in stages} | given


def multiple_of(stages: list[Stage], low_resolution: int | None) -> int:
    """Return the divisor of height and width of the last image for which every stage's size fits its network."""
    strides, last = strides_of(stages, low_resolution), stages[-1].resolution
    return next(n for n in itertools.count(1) if _fits(n, strides, last))


def _fits(pixels: int, strides: dict[int, int], last: int) -> bool:
    """Return whether square images of this size, scaled to every stage, are multiples of its network's stride."""
    return all(Fraction(pixels * resolution, last) % stride == 0 for resolution, stride in strides.items())
