"""Stages of a pipeline, each a network and its scheduler, and checks that they fit, are complete and are trained."""

import os
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import EfficientUNetModel, ImagenUNetModel
from ..models.interface import StageNetwork
from ..text.completeness import random_weights, refuse_empty_vocabulary, refuse_random_weights
from ..utils.arguments import class_of
from ..utils.modules import find_not_finite, first_names, is_offloaded, unwrapped
from .stage_table import CallDefaults, StageKind


# type of networks in the pipelines' constructors: diffusers passes components of exactly these classes to another
# pipeline, and requires other classes by name
UNet = ImagenUNetModel | EfficientUNetModel | StageNetwork
StageSource = str | os.PathLike | DiffusionPipeline | tuple[StageNetwork, SchedulerMixin]

logger = logging.get_logger(__name__)

UNTRAINED = (
    "The network of the stage `{name}`, loaded from '{path}', is untrained: the last layers of its residual branches "
    "are zero, as in a new network. Load the folder of a training run, or leave the stage out."
)


class Stage(NamedTuple):
    """One diffusion model of a pipeline."""

    kind: StageKind
    unet: StageNetwork
    scheduler: SchedulerMixin
    guidance_unet: StageNetwork | None = None
    given_defaults: CallDefaults | None = None

    @property
    def defaults(self) -> CallDefaults:
        """Default arguments of a call."""
        defaults = self.kind.defaults if self.given_defaults is None else self.given_defaults
        can_be_guided = self.reads_text or self.guidance_unet is not None
        return defaults if can_be_guided else defaults._replace(guidance_scale=1.0)

    @property
    def name(self) -> str:
        """The stage's name in arguments and messages."""
        return self.kind.name

    @property
    def resolution(self) -> int:
        """Height and width of the images that the network was trained for, in pixels."""
        return self.unet.resolution

    @property
    def is_base(self) -> bool:
        """Whether the stage generates images from text alone, and not from those of the previous stage."""
        return not self.unet.takes_low_res

    @property
    def unets(self) -> list[StageNetwork]:
        """The network, and the weaker one that guides it if there is one, without the wrapper of torch.compile."""
        return [unwrapped(unet) for unet in (self.unet, self.guidance_unet) if unet is not None]

    @property
    def reads_text(self) -> bool:
        """Whether the network is conditioned on text."""
        return self.unet.text_width is not None


# ---- checks


def check_kinds(stages: list[Stage], starts_from_noise: bool) -> None:
    """Raise ValueError for a base network in a super-resolution stage, or the reverse."""
    for stage in stages:
        if stage.is_base == stage.kind.takes_low_res:
            raise ValueError(
                f"The network of the stage `{stage.name}` has `low_res_conditioning={not stage.is_base}`: it is one "
                "for " + ("a base stage." if stage.is_base else "super-resolution.")
            )
    if starts_from_noise and not stages[0].is_base:
        raise ValueError(
            f"The first stage is `{stages[0].name}`, a super-resolution stage, but there is no base stage before it."
        )


def check_stages(stages: list[Stage], text_width: int | None) -> None:
    """Raise ValueError for stages that do not fit together or the text, or loaded networks that lack weights."""
    check_kinds(stages, starts_from_noise=False)
    for stage in stages:
        if stage.scheduler is None:
            raise ValueError(f"The stage `{stage.name}` has a network, but no scheduler.")
        check_text_width(stage, text_width)
        for unet in stage.unets:
            check_loaded(stage.name, unet)
        if stage.guidance_unet is not None and stage.guidance_unet.takes_low_res == stage.is_base:
            raise ValueError(f"The guidance network of the stage `{stage.name}` is one for another kind of stage.")
    for below, stage in zip(stages, stages[1:]):
        if stage.resolution % below.resolution or stage.resolution == below.resolution:
            raise ValueError(
                f"The stage `{stage.name}` is for {stage.resolution} px, which is not a multiple of the "
                f"{below.resolution} px of `{below.name}`, the stage before it."
            )


def check_factors(stages: list[Stage], factors: dict[StageKind, int | None]) -> None:
    """
    Raise ValueError for a stage that was trained to upscale images of another size than the previous stage generates.
    """
    for below, stage in zip(stages, stages[1:]):
        factor = factors.get(stage.kind)
        if factor is not None and stage.resolution != factor * below.resolution:
            raise ValueError(
                f"The stage `{stage.name}` was trained to upscale images of {stage.resolution // factor} px, but "
                f"those of `{below.name}`, the stage before it, have {below.resolution} px."
            )


def check_text_width(stage: Stage, width: int | None) -> None:
    """Raise ValueError unless the network's text embeddings have this width; None for an unknown width."""
    for unet in stage.unets:
        if width is not None and unet.text_width not in (None, width):
            raise ValueError(
                f"The text encoder has embeddings of width {width}, but a network of the stage `{stage.name}` needs "
                f"width {unet.text_width}: use the encoder that it was trained with."
            )


def check_loaded(name: str, unet: StageNetwork) -> None:
    """Raise ValueError for a loaded network that lacks weights, and log a warning for an untrained one.

    Networks that were created in this process are not checked.
    """
    refuse_missing(f"The network of the stage `{name}`", unet)
    if was_loaded(unet) and not is_offloaded(unet) and unet.is_untrained():
        logger.warning(UNTRAINED.format(name=name, path=unet.config._name_or_path))


def refuse_missing(description: str, unet: StageNetwork) -> None:
    """Raise ValueError for a loaded network that lacks weights."""
    missing = missing_weights(unet) if was_loaded(unet) and not is_offloaded(unet) else []
    if missing:
        raise ValueError(
            f"{description}, loaded from '{unet.config._name_or_path}', lacks weights: {first_names(missing)}. Save "
            "the complete network again, or load it with `low_cpu_mem_usage=False` and train it."
        )


def refuse_untrained(stages: list[Stage]) -> None:
    """Raise ValueError for loaded networks that are untrained."""
    for stage in stages:
        unet = unwrapped(stage.unet)
        if was_loaded(unet) and unet.is_untrained():
            raise ValueError(UNTRAINED.format(name=stage.name, path=unet.config._name_or_path))


def missing_weights(unet: StageNetwork) -> list[str]:
    """Return parameters that a checkpoint lacked: diffusers leaves them on the meta device without a warning."""
    return [name for name, parameter in unwrapped(unet).named_parameters() if parameter.is_meta]


def was_loaded(unet: StageNetwork) -> bool:
    """Return whether the network was loaded from a folder or the Hub."""
    return bool(unet.config.get("_name_or_path"))


# ---- components


def check_components(components: dict[str, Any]) -> None:
    """Raise ValueError for a network of the wrong class, and for incomplete components that were loaded.

    Every way to create a pipeline calls this check: diffusers loads incomplete components without a warning.
    """
    for name, component in components.items():
        component = unwrapped(component)
        if isinstance(component, StageNetwork):
            refuse_missing(f"`{name}`", component)
        elif name.endswith("unet") and isinstance(component, (ModelMixin, PreTrainedModel)):
            raise ValueError(
                f"`{name}` is {class_of(component)}, but should be an ImagenUNetModel, an EfficientUNetModel "
                "or another StageNetwork."
            )
        elif isinstance(component, PreTrainedTokenizerBase):
            refuse_empty_vocabulary(f"`{name}`, loaded from '{component.name_or_path}',", component)
        elif isinstance(component, PreTrainedModel):
            refuse_random_weights(f"`{name}`, loaded from '{component.name_or_path}',", random_weights(component))
            broken = find_not_finite(component) if isinstance(component, IFSafetyChecker) else None
            if broken is not None:  # NaN compares as below any threshold, so that every image would pass
                raise ValueError(f"`{name}` has weights that are not finite, such as {broken}: load it again.")
