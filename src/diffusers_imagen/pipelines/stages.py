"""The stages of a pipeline: a network and its scheduler each, and whether they fit, are complete and were trained."""

import os
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import logging
from transformers import PreTrainedModel

from ..models import EfficientUNetModel, ImagenUNetModel
from ..models.blocks import ResBlock
from ..models.unet_base import ConditionalUNet
from ..text.completeness import random_weights, refuse_random_weights
from ..utils.modules import first_names, is_offloaded, unwrapped


# diffusers compares a component's class with this hint when it hands components on to another pipeline
UNet = ImagenUNetModel | EfficientUNetModel
StageSource = str | os.PathLike | DiffusionPipeline | tuple[UNet, SchedulerMixin]

logger = logging.get_logger(__name__)

UNTRAINED = (
    "The network of the stage `{name}`, loaded from '{path}', was never trained: its residual branches end in the zeros "
    "of a new network. Load the folder that training wrote, or leave the stage out."
)
STAGE_NAMES = ("base", "sr256", "sr1024")
# the low-resolution image leaves little to decide: super-resolution needs few steps and no guidance
DEFAULT_STEPS = {"base": 18, "sr256": 8, "sr1024": 8}
DEFAULT_GUIDANCE = {"base": 4.0, "sr256": 1.0, "sr1024": 1.0}


class Stage(NamedTuple):
    """One diffusion model of a pipeline."""

    name: str
    unet: UNet
    scheduler: SchedulerMixin
    guidance_unet: UNet | None = None

    @property
    def resolution(self) -> int:
        """Side of the images that it was trained for, in pixels."""
        return self.unet.config.sample_size

    @property
    def unets(self) -> list[UNet]:
        """Its network, and the weaker one that guides it if there is one; compiled ones as they were before."""
        return [unwrapped(unet) for unet in (self.unet, self.guidance_unet) if unet is not None]

    @property
    def reads_text(self) -> bool:
        """Whether the network is conditioned on text."""
        return self.unet.config.encoder_hid_dim is not None


# ---- checks


def check_stages(stages: list[Stage], text_encoder: PreTrainedModel | None) -> None:
    """Raises ValueError for stages that do not fit together, or loaded networks that lack weights."""
    for stage in stages:
        if stage.scheduler is None:
            raise ValueError(f"The stage `{stage.name}` has a network, but no scheduler.")
        is_base, takes_image = stage.name == "base", stage.unet.config.low_res_conditioning
        if is_base == takes_image:
            raise ValueError(
                f"The network of the stage `{stage.name}` has `low_res_conditioning={takes_image}`: "
                + ("it is one for super-resolution." if is_base else "it is one for a base stage.")
            )
        check_text_width(stage, text_encoder)
        for unet in stage.unets:
            check_loaded(stage.name, unet)
        if stage.guidance_unet is not None and stage.guidance_unet.config.low_res_conditioning != takes_image:
            raise ValueError(f"The guidance network of the stage `{stage.name}` is one for another kind of stage.")
    for below, stage in zip(stages, stages[1:]):
        if stage.resolution % below.resolution or stage.resolution == below.resolution:
            raise ValueError(
                f"The stage `{stage.name}` is for {stage.resolution} px, which is no multiple of the "
                f"{below.resolution} px of `{below.name}`, the stage before it."
            )


def check_text_width(stage: Stage, text_encoder: PreTrainedModel | None) -> None:
    """Raises ValueError unless the network reads states as wide as the text encoder's."""
    width = getattr(getattr(text_encoder, "config", None), "hidden_size", None)
    for unet in stage.unets:
        expected = unet.config.encoder_hid_dim
        if width is not None and expected not in (None, width):
            raise ValueError(
                f"The text encoder, a {type(unwrapped(text_encoder)).__name__}, has states of width {width}, but a network of "
                f"the stage `{stage.name}` reads width {expected}: use the encoder that it was trained with."
            )


def check_loaded(name: str, unet: UNet) -> None:
    """Raises ValueError for a loaded network that lacks weights, and warns of one that was never trained.

    Networks that were built in this process are the caller's to judge.
    """
    refuse_missing(f"The network of the stage `{name}`", unet)
    if was_loaded(unet) and not is_offloaded(unet) and is_untrained(unet):
        logger.warning(UNTRAINED.format(name=name, path=unet.config._name_or_path))


def refuse_missing(description: str, unet: UNet) -> None:
    """Raises ValueError for a loaded network that lacks weights."""
    missing = missing_weights(unet) if was_loaded(unet) and not is_offloaded(unet) else []
    if missing:
        raise ValueError(
            f"{description}, loaded from '{unet.config._name_or_path}', lacks weights: {first_names(missing)}. Save it "
            "again from where it is complete, or load it with `low_cpu_mem_usage=False` and train it."
        )


def refuse_untrained(stages: list[Stage]) -> None:
    """Raises ValueError for loaded networks that were never trained."""
    for stage in stages:
        unet = unwrapped(stage.unet)
        if was_loaded(unet) and is_untrained(unet):
            raise ValueError(UNTRAINED.format(name=stage.name, path=unet.config._name_or_path))


def missing_weights(unet: UNet) -> list[str]:
    """Parameters that a checkpoint lacked: diffusers leaves them on the meta device, without a word."""
    return [name for name, parameter in unwrapped(unet).named_parameters() if parameter.is_meta]


def was_loaded(unet: UNet) -> bool:
    """Whether the network comes from a folder or the Hub."""
    return bool(unet.config.get("_name_or_path"))


def is_untrained(unet: UNet) -> bool:
    """Whether every residual branch ends in the zeros of a new network."""
    return not any(module.conv2.weight.any() for module in unet.modules() if isinstance(module, ResBlock))


# ---- components


def check_components(components: dict[str, Any]) -> None:
    """Raises ValueError for a network of another kind, and for a loaded network or text encoder that lacks weights.

    Whatever made a pipeline, its components come by here: diffusers loads them without a word about what is missing.
    """
    for name, component in components.items():
        component = unwrapped(component)
        if isinstance(component, ConditionalUNet):
            refuse_missing(f"`{name}`", component)
        elif name.endswith("unet") and isinstance(component, (ModelMixin, PreTrainedModel)):
            raise ValueError(
                f"`{name}` is a {type(component).__name__}, but should be an ImagenUNetModel or EfficientUNetModel."
            )
        elif isinstance(component, PreTrainedModel):
            refuse_random_weights(f"`{name}`, loaded from '{component.name_or_path}',", random_weights(component))
