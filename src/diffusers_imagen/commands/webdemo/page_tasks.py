"""Tasks of the page for a model: generate, upscale and inpaint, with one tab each."""

from typing import NamedTuple

from diffusers import DiffusionPipeline

from ...pipelines import ImagenSuperResolutionPipeline
from ...pipelines.planning import multiple_of
from ...pipelines.stages import Stage


MAX_STEPS, MAX_GUIDANCE = 50, 10  # or the default of a stage if larger
MAX_PROPORTION = 2  # aspect ratio of an image: longer images are cropped


class Task(NamedTuple):
    """Task of a tab."""

    name: str  # in the settings of image files, and of the API endpoint
    title: str  # of the tab and its button
    stages: list[Stage]  # the stages that run
    low_resolution: int | None  # that an input image is first resized to, in pixels
    takes_picture: bool
    takes_mask: bool
    needs_prompt: bool

    @property
    def reads_text(self) -> bool:
        """Whether a stage is conditioned on text."""
        return any(stage.reads_text for stage in self.stages)

    @property
    def resolution(self) -> int:
        """Resolution of the generated images, in pixels."""
        return self.stages[-1].resolution

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """
        Return width and height of the result for an image of this size: its short side is the last stage's resolution.

        The aspect ratio is rounded to the networks' stride, and limited to MAX_PROPORTION.
        """
        step, short = multiple_of(self.stages, self.low_resolution), self.resolution
        longer = min(max(width, height) / min(width, height), MAX_PROPORTION) * short
        long = max(round(longer / step) * step, short)
        return (long, short) if width > height else (short, long)


def tasks_of(pipe: DiffusionPipeline) -> list[Task]:
    """Return the tasks of a model.

    Raises:
        ValueError: If its networks are conditioned on text, but it has no text encoder.
    """
    stages, found = pipe.stages, []
    if pipe.text_source is None and any(stage.reads_text for stage in stages):
        raise ValueError("`model` has no text encoder, which its networks need: pass --text-encoder.")
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
    """Return the maximum number of steps and guidance scale of a stage: at least its defaults."""
    return max(MAX_STEPS, stage.defaults.num_inference_steps), max(MAX_GUIDANCE, stage.defaults.guidance_scale)


def stage_title(stage: Stage) -> str:
    """Return the name of a stage on the page."""
    return f"{stage.kind.title} {stage.resolution} px"
