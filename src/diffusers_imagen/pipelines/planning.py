"""What every network call of a stage will be, laid out before the first: sizes, noise levels, guidance, jumps.

All of it is CPU constants, so that the loop never waits for an accelerator to learn what to do next.
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
    noise_level_after: NoiseLevel | None  # of the sample after it; None in the middle of a step
    back_to: int | None  # the index to go back to afterwards, with more noise: resampling


class StagePlan(NamedTuple):
    """A stage as it will run."""

    stage: Stage
    scheduler: SchedulerMixin
    settings: StageSettings
    size: Size
    low_res_size: Size | None  # of the image that a super-resolution stage starts from
    calls: list[Call]
    noise_levels: dict[int, NoiseLevel]  # at the start of each step, by its index

    @property
    def begins(self) -> int:
        """Index of the first call: above 0 where the stage starts from an image."""
        return self.calls[0].index


class Request(NamedTuple):
    """A call of a pipeline as it will run, its arguments checked."""

    plans: list[StagePlan]
    num_images: int
    generators: Generators
    noise: torch.Tensor | None  # the caller's own, of the first stage
    given: GivenImages | None  # what super-resolution starts from, or what is changed or painted anew
    starts_from_image: bool  # the base stage begins with the image under noise
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
    """Plans of all stages; `strength` and `num_resample_times` are for a base stage.

    Raises:
        ValueError: for noise levels that a scheduler refuses, a scheduler that cannot drive a stage, or a guidance
            interval for one that publishes no noise levels.
    """
    plans, taken = [], set()
    for stage, wanted in zip(stages, settings):
        # two stages may have been given one scheduler, which holds one schedule at a time
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
    """The step at which image to image begins: the last `strength` of the steps run."""
    running = min(int(num_steps * strength + 1e-6), num_steps)
    if running < 1:
        raise ValueError(
            f"`strength` is {strength}, which leaves none of the {num_steps} steps of the stage `{name}`; it should be "
            f"at least {1 / num_steps:.3g}."
        )
    return num_steps - running


def plan_calls(
    scheduler: SchedulerMixin, starts: list[tuple[int, NoiseLevel]], settings: StageSettings, num_resample_times: int
) -> list[Call]:
    """The calls of the steps that begin at `starts`, each step but the last `num_resample_times` times."""
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
    """Whether the noise level of each call lies in the interval; everywhere without one."""
    num_calls = len(scheduler.timesteps)
    if interval is None:
        return [True] * num_calls
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        raise ValueError(
            f"`guidance_interval` needs noise levels, and {type(scheduler).__name__} publishes no `sigmas`."
        )
    return [interval[0] <= sigma <= interval[1] for sigma in sigmas[:num_calls].tolist()]


# ---- sizes


def plan_sizes(
    stages: list[Stage], low_resolution: int | None, height: int | None, width: int | None
) -> dict[int, Size]:
    """Height and width of the images of every stage, by the stage's resolution, for a last image of `height x width`.

    `low_resolution` is that of the image which the first stage starts from, if it is one for super-resolution.

    Raises:
        ValueError: for a size that some network cannot take; it names the multiple that all can.
    """
    last = stages[-1].resolution
    height, width = (last if pixels is None else pixels for pixels in (height, width))
    strides = strides_of(stages, low_resolution)
    multiple = multiple_of(stages, low_resolution)
    for name, pixels in (("height", height), ("width", width)):
        if not is_integer(pixels) or pixels < 1 or pixels % multiple:
            raise ValueError(
                f"`{name}` is {shown(pixels)}, but the networks of this pipeline take multiples of {multiple} only, in pixels "
                "of the last image."
            )
    height, width = int(height), int(width)
    return {resolution: (height * resolution // last, width * resolution // last) for resolution in strides}


def strides_of(stages: list[Stage], low_resolution: int | None) -> dict[int, int]:
    """What height and width of a stage's images are multiples of, by its resolution; 1 for images that are given."""
    given = {} if low_resolution is None else {low_resolution: 1}
    return {stage.resolution: stage.unet.total_stride for stage in stages} | given


def multiple_of(stages: list[Stage], low_resolution: int | None) -> int:
    """What height and width of the last image are multiples of, so that every stage's network takes its own."""
    strides, last = strides_of(stages, low_resolution), stages[-1].resolution
    return next(n for n in itertools.count(1) if _fits(n, strides, last))


def _fits(pixels: int, strides: dict[int, int], last: int) -> bool:
    """Whether square images of so many pixels, made smaller for every stage, are whole numbers of its network's strides."""
    return all(Fraction(pixels * resolution, last) % stride == 0 for resolution, stride in strides.items())
