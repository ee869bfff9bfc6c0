"""Conversion of a stage of DeepFloyd IF, possibly fine-tuned, back to diffusers' pipelines."""

from typing import Any

from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin

from ..schedulers.foreign_configs import is_discrete
from ..utils.arguments import bad_argument, check_choice
from ..utils.modules import quiet_transformers, unwrapped
from .deepfloyd import BETA_SCHEDULE, unet_to_deepfloyd


with quiet_transformers():  # the import reports that torchvision is not installed
    from diffusers import IFPipeline, IFSuperResolutionPipeline

PARTS = (
    "tokenizer",
    "text_encoder",
    "safety_checker",
    "feature_extractor",
    "watermarker",
)  # in addition to the stage's components


def pipeline_to_deepfloyd(pipe: DiffusionPipeline, stage: str | None = None) -> IFPipeline | IFSuperResolutionPipeline:
    """Convert a stage to diffusers' `IFPipeline` or `IFSuperResolutionPipeline`, which shares the memory of its weights.

    Tokenizer, text encoder, safety checker and watermarker are the pipeline's. A scheduler of this package, which
    those pipelines do not support, is converted to the `DDPMScheduler` of its configuration.

    Args:
        pipe ([`ImagenPipeline`], [`ImagenSuperResolutionPipeline`] or [`ImagenCascadePipeline`]): Pipeline with the
            stage.
        stage (`str`, *optional*): The stage's name, if there are several.

    Raises:
        ValueError: If there is no such stage, or its network or scheduler is not one of DeepFloyd IF's.
    """
    found = find_stage(pipe, stage)
    parts = {name: getattr(pipe, name) for name in PARTS}
    try:
        parts["unet"] = unet_to_deepfloyd(unwrapped(found.unet))
    except ValueError as error:
        raise ValueError(f"The network of the stage `{found.name}` is not one of DeepFloyd IF's: {error}") from error
    parts["scheduler"] = scheduler_to_deepfloyd(found.scheduler)
    parts["requires_safety_checker"] = pipe.safety_checker is not None
    if found.is_base:
        return IFPipeline(**parts)
    noising = DDPMScheduler(beta_schedule=BETA_SCHEDULE)
    return IFSuperResolutionPipeline(**parts, image_noising_scheduler=noising)


def find_stage(pipe: DiffusionPipeline, name: str | None) -> Any:
    """Return the stage of this name; without a name, the only stage; raise ValueError if there are several."""
    stages = {stage.name: stage for stage in pipe.stages}
    if name is None and len(stages) > 1:
        raise bad_argument("stage", name, f"one of {', '.join(stages)}: diffusers has one pipeline per stage")
    if name is None:
        name = next(iter(stages))
    check_choice("stage", name, tuple(stages))
    return stages[name]


def scheduler_to_deepfloyd(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return a scheduler for diffusers' IF pipelines: diffusers' own unchanged, for one of this package fixed-variance DDPM.

    A fine-tuned stage has a scheduler of this package, and the variance that its network predicts was not trained.
    """
    if not hasattr(scheduler.config, "preconditioning"):
        return scheduler
    if not is_discrete(scheduler.config):
        raise bad_argument(
            "preconditioning", scheduler.config.preconditioning, "'discrete' in a stage of DeepFloyd IF"
        )
    config = {name: value for name, value in scheduler.config.items() if name != "preconditioning"}
    return DDPMScheduler.from_config(config, variance_type="fixed_small")
