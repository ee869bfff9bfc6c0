"""What the page can do with a model: to draw, to enlarge a picture, and to paint a part of one anew; a tab each."""

from typing import NamedTuple

from diffusers import DiffusionPipeline

from ...pipelines import ImagenSuperResolutionPipeline
from ...pipelines.planning import multiple_of
from ...pipelines.stages import Stage


MAX_STEPS, MAX_GUIDANCE = 50, 10  # or the default of a stage that has more
MAX_PROPORTION = 2  # of the sides of a picture: what is longer is cropped


class Task(NamedTuple):
    """What a tab does."""

    name: str  # as the settings in the files of pictures have it, and of the endpoint
    title: str  # of the tab, and of its button
    stages: list[Stage]  # that run
    low_resolution: int | None  # that a given picture is first brought to, in pixels
    takes_picture: bool
    takes_mask: bool
    needs_prompt: bool

    @property
    def reads_text(self) -> bool:
        """Whether there is something to say."""
        return any(stage.reads_text for stage in self.stages)

    @property
    def resolution(self) -> int:
        """Of the pictures that it makes, in pixels."""
        return self.stages[-1].resolution

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the result for a picture of this size: its short side has the resolution of the last stage.

        Proportions are kept to within a step of the networks, and to MAX_PROPORTION.
        """
        step, short = multiple_of(self.stages, self.low_resolution), self.resolution
        longer = min(max(width, height) / min(width, height), MAX_PROPORTION) * short
        long = max(round(longer / step) * step, short)
        return (long, short) if width > height else (short, long)


def tasks_of(pipe: DiffusionPipeline) -> list[Task]:
    """What a model can do.

    Raises:
        ValueError: If its networks read text that nothing encodes.
    """
    stages, found = pipe.stages, []
    if pipe.text_source is None and any(stage.reads_text for stage in stages):
        raise ValueError("`model` has no text encoder, which its networks need: give --text-encoder.")
    if stages[0].is_base:
        found.append(Task("generate", "Draw", stages, None, False, False, stages[0].reads_text))
    upscalers = [stage for stage in stages if not stage.is_base]
    if upscalers:
        alone = isinstance(pipe, ImagenSuperResolutionPipeline)
        low_resolution = pipe.low_resolution if alone else stages[0].resolution
        found.append(Task("upscale", "Upscale", upscalers, low_resolution, True, False, False))
    if stages[0].is_base:
        found.append(Task("inpaint", "Inpaint", stages, None, True, True, stages[0].reads_text))
    return found


def limits_of(stage: Stage) -> tuple[int, float]:
    """The most steps and the strongest guidance that a visitor can ask a stage for: at least its defaults."""
    return max(MAX_STEPS, stage.defaults.num_inference_steps), max(MAX_GUIDANCE, stage.defaults.guidance_scale)


def stage_title(stage: Stage) -> str:
    """A stage's name on the page."""
    return f"{stage.kind.title} {stage.resolution} px"
