"""The stages of a pipeline: a network and its scheduler each, from wherever they are kept."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import diffusers
from diffusers import AutoModel, DiffusionPipeline, SchedulerMixin
from diffusers import __version__ as diffusers_version
from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub import file_exists
from transformers import AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel

from ..models import EfficientUNetModel, ImagenUNetModel
from ..models.blocks import ResBlock
from ..schedulers import EDMHeunScheduler


# diffusers compares a component's class with this hint when it hands components on to another pipeline
UNet = Union[ImagenUNetModel, EfficientUNetModel]
StageSource = Union[str, os.PathLike, DiffusionPipeline, tuple[UNet, SchedulerMixin]]

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
    guidance_unet: Optional[UNet] = None

    @property
    def resolution(self) -> int:
        """Side of the images that it was trained for, in pixels."""
        return self.unet.config.sample_size

    @property
    def unets(self) -> list[UNet]:
        """Its network, and the weaker one that guides it if there is one; compiled ones as they were before."""
        return [unwrap_module(unet) for unet in (self.unet, self.guidance_unet) if unet is not None]

    @property
    def reads_text(self) -> bool:
        """Whether the network is conditioned on text."""
        return self.unet.config.encoder_hid_dim is not None


# ---- checks


def check_stages(stages: list[Stage], text_encoder: Optional[PreTrainedModel]) -> None:
    """Raises ValueError for stages that do not fit together, or loaded networks that lack weights."""
    for stage in stages:
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


def check_text_width(stage: Stage, text_encoder: Optional[PreTrainedModel]) -> None:
    """Raises ValueError unless the network reads states as wide as the text encoder's."""
    width = getattr(getattr(text_encoder, "config", None), "hidden_size", None)
    for unet in stage.unets:
        expected = unet.config.encoder_hid_dim
        if width is not None and expected not in (None, width):
            raise ValueError(
                f"The text encoder, a {type(unwrap_module(text_encoder)).__name__}, has states of width {width}, but a network of "
                f"the stage `{stage.name}` reads width {expected}: use the encoder that it was trained with."
            )


def check_loaded(name: str, unet: UNet) -> None:
    """Raises ValueError for a loaded network that lacks weights, and warns of one that was never trained.

    Networks that were built in this process are the caller's to judge. Weights that offloading has put on the meta
    device are elsewhere, and not missing.
    """
    if not was_loaded(unet) or any(hasattr(module, "_hf_hook") for module in unet.modules()):
        return
    missing = missing_weights(unet)
    if missing:
        raise ValueError(
            f"The network of the stage `{name}`, loaded from '{unet.config._name_or_path}', lacks weights: "
            f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}. Save it again from where it is "
            "complete, or load it with `low_cpu_mem_usage=False` and train it."
        )
    if is_untrained(unet):
        logger.warning(UNTRAINED.format(name=name, path=unet.config._name_or_path))


def refuse_untrained(stages: list[Stage]) -> None:
    """Raises ValueError for loaded networks that were never trained."""
    for stage in stages:
        unet = unwrap_module(stage.unet)
        if was_loaded(unet) and is_untrained(unet):
            raise ValueError(UNTRAINED.format(name=stage.name, path=unet.config._name_or_path))


def missing_weights(unet: UNet) -> list[str]:
    """Parameters that a checkpoint lacked: diffusers leaves them on the meta device, without a word."""
    return [name for name, parameter in unet.named_parameters() if parameter.is_meta]


def was_loaded(unet: UNet) -> bool:
    """Whether the network comes from a folder or the Hub."""
    return bool(unet.config.get("_name_or_path"))


def is_untrained(unet: UNet) -> bool:
    """Whether every residual branch ends in the zeros of a new network."""
    return not any(module.conv2.weight.any() for module in unet.modules() if isinstance(module, ResBlock))


# ---- folders


def load_stage(source: StageSource, **kwargs) -> dict[str, Any]:
    """The components of a stage: `unet`, `scheduler`, and of a folder or pipeline that has them the text parts.

    Args:
        source: A single-stage pipeline, the pair of its network and scheduler, or the folder or Hub id of either a
            single-stage pipeline or of `unet/` and `scheduler/` alone.
        kwargs: For diffusers' `from_pretrained`, such as `dtype`, `variant` or `revision`.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(source, DiffusionPipeline):
        components = source.components
    elif isinstance(source, (tuple, list)) and len(source) == 2:
        components = {"unet": source[0], "scheduler": source[1]}
    elif isinstance(source, (str, os.PathLike)):
        components = load_folder(str(source), **kwargs)
    else:
        components = {}
    unet, scheduler = components.get("unet"), components.get("scheduler")
    if not isinstance(unwrap_module(unet), (ImagenUNetModel, EfficientUNetModel)) or not isinstance(
        scheduler, SchedulerMixin
    ):
        raise ValueError(
            f"A stage is {source!r}, but should be a folder, a Hub id, a single-stage pipeline, or a network and its "
            "scheduler."
        )
    return components


def load_folder(folder: str, **kwargs) -> dict[str, Any]:
    """The components in a folder or Hub repository: of its pipeline, or else of `unet/` and `scheduler/`."""
    if os.path.isdir(folder):
        has_index = os.path.isfile(os.path.join(folder, "model_index.json"))
        if not has_index and not os.path.isfile(os.path.join(folder, "unet", "config.json")):
            raise ValueError(
                f"A stage is '{folder}', a folder with neither a model_index.json nor a network in unet/."
            )
    else:
        has_index = file_exists(folder, "model_index.json", revision=kwargs.get("revision"), token=kwargs.get("token"))
    if has_index:
        return DiffusionPipeline.from_pretrained(folder, **kwargs).components
    for name in ("text_encoder", "tokenizer"):  # which only a pipeline has
        kwargs.pop(name, None)
    config = EDMHeunScheduler.load_config(folder, subfolder="scheduler")  # of any scheduler
    scheduler_class = getattr(diffusers, config["_class_name"])
    return {
        "unet": AutoModel.from_pretrained(folder, subfolder="unet", **kwargs),
        "scheduler": scheduler_class.from_pretrained(folder, subfolder="scheduler"),
    }


def load_text_parts(folder: str, **kwargs) -> dict[str, Any]:
    """The text encoder and the tokenizer in `text_encoder/` and `tokenizer/` of a folder or Hub repository."""
    return {
        "text_encoder": AutoModelForTextEncoding.from_pretrained(folder, subfolder="text_encoder", **kwargs).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(folder, subfolder="tokenizer"),
    }


def write_model_index(folder: Union[str, os.PathLike], scale_factor: Optional[int] = None) -> None:
    """Makes a folder with `unet/` and `scheduler/` one that opens as a single-stage pipeline.

    `text_encoder/` and `tokenizer/` become part of it if they are there.

    Args:
        folder: The folder, whose `model_index.json` is written beside and moved into place.
        scale_factor: How many times larger than its low-resolution image a super-resolution stage's image is.

    Raises:
        ValueError: If a configuration is missing, or `scale_factor` does not fit the kind of stage.
    """
    folder = Path(folder)
    configs = {name: folder / name / file for name, file in INDEXED_CONFIGS.items()}
    for name in ("unet", "scheduler"):
        if not configs[name].is_file():
            raise ValueError(f"`folder` is '{folder}', which lacks {configs[name].relative_to(folder)}.")
    unet = json.loads(configs["unet"].read_text())
    is_base = not unet["low_res_conditioning"]
    if is_base != (scale_factor is None):
        raise ValueError(
            f"`scale_factor` is {scale_factor!r}, but the network in '{folder}' is one for "
            + ("a base stage, which has none." if is_base else "super-resolution, which needs one.")
        )
    index = {
        "_class_name": "ImagenPipeline" if is_base else "ImagenSuperResolutionPipeline",
        "_diffusers_version": diffusers_version,
        "unet": ["diffusers_imagen", unet["_class_name"]],
        "scheduler": indexed_class(json.loads(configs["scheduler"].read_text())["_class_name"]),
        "tokenizer": [None, None],
        "text_encoder": [None, None],
    }
    if is_base:
        index["guidance_unet"] = [None, None]
    else:
        index["scale_factor"] = scale_factor
    if configs["text_encoder"].is_file() and configs["tokenizer"].is_file():
        index["text_encoder"] = ["transformers", json.loads(configs["text_encoder"].read_text())["architectures"][0]]
        index["tokenizer"] = ["transformers", json.loads(configs["tokenizer"].read_text())["tokenizer_class"]]
    partial = folder / ".model_index.json.partial"
    partial.write_text(json.dumps(dict(sorted(index.items())), indent=2) + "\n")
    os.replace(partial, folder / "model_index.json")


INDEXED_CONFIGS = {
    "unet": "config.json",
    "scheduler": "scheduler_config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
}


def indexed_class(class_name: str) -> list[str]:
    """Library and class of a scheduler, as a `model_index.json` has them."""
    module = getattr(diffusers, class_name).__module__
    return [module.split(".")[0], class_name]
