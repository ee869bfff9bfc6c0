"""The network of a run: made, and set up for training."""

import re
from pathlib import Path
from typing import Any, Optional

import diffusers
import torch
from accelerate.utils import DistributedType
from diffusers import AutoModel, DiffusionPipeline

from ..models import ImagenUNetModel
from ..models.unet_base import ConditionalUNet
from ..pipelines.stages import missing_weights
from ..presets import create_unet
from ..utils.errors import describe_fault
from ..utils.files import read_json_object
from .config import TrainingConfig
from .growing import change_layers, grow_unet


def make_unet(config: TrainingConfig) -> ConditionalUNet:
    """The network to train, set to the resolution that it is trained at.

    Raises:
        ValueError: If there is none, or the configuration changes one whose kind cannot be changed.
    """
    if config.preset is not None:
        unet = create_unet(config.preset)
    elif config.model_config_name_or_path is not None:
        unet = unet_of_config(config)
    else:
        unet = load_unet(config.pretrained_model_name_or_path, find_network(config))
    if (config.grow or config.layers_per_block) and not isinstance(unet, ImagenUNetModel):
        argument = "grow" if config.grow else "layers_per_block"
        raise ValueError(
            f"`{argument}` is {getattr(config, argument)}, but only an ImagenUNetModel can be changed so, and "
            f"'{config.pretrained_model_name_or_path}' has an {type(unet).__name__}."
        )
    if config.grow:
        unet = grow_unet(unet)
    if config.layers_per_block:
        unet = change_layers(unet, config.layers_per_block)
    return unet.at_resolution(config.resolution)


def find_network(config: TrainingConfig) -> Optional[str]:
    """The subfolder of the network that a run begins with: of a cascade that of the stage which the resolutions name,
    of a single stage `unet`; None if the name is that of the network itself.

    Raises:
        ValueError: If a cascade has no such stage, or its model_index.json is malformed.
    """
    name = config.pretrained_model_name_or_path or config.model_config_name_or_path
    if (Path(name) / "config.json").is_file():
        return None
    parts = load_index(name)
    if "base_unet" not in parts:
        return "unet"
    wanted = "base_unet" if config.low_resolution is None else f"sr{config.resolution}_unet"
    stages = [
        part
        for part, kind in parts.items()
        if re.fullmatch(r"(base|sr\d+)_unet", part) and isinstance(kind, list) and kind[:1] != [None]
    ]
    if wanted not in stages:
        raise ValueError(
            f"`resolution` is {config.resolution}, but the cascade '{name}' has no {wanted} among {stages}: name one of "
            "its stages by `resolution` and `low_resolution`."
        )
    return wanted


def load_index(name: str) -> dict[str, Any]:
    """What a pipeline's model_index.json says; nothing for a stage that has none."""
    if Path(name).is_dir():
        index = Path(name) / DiffusionPipeline.config_name
        return read_json_object(index) if index.exists() else {}
    try:
        return DiffusionPipeline.load_config(name)
    except OSError:
        return {}


def unet_of_config(config: TrainingConfig) -> ConditionalUNet:
    """A network with fresh weights, of `config.model_config_name_or_path`.

    Raises:
        ValueError: If there is none, or none that this loop trains.
    """
    name = config.model_config_name_or_path
    try:
        found = ConditionalUNet.load_config(name, subfolder=find_network(config))
    except Exception as error:
        reason = describe_fault(error)
        raise ValueError(f"`model_config_name_or_path` is '{name}', which has no config.json: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"`model_config_name_or_path` is '{name}', whose config.json holds no object.")
    network_class = getattr(diffusers, str(found.get("_class_name")), None)
    if not (isinstance(network_class, type) and issubclass(network_class, ConditionalUNet)):
        raise ValueError(
            f"`model_config_name_or_path` is '{name}', which is of {found.get('_class_name')}, but should be of "
            "ImagenUNetModel or EfficientUNetModel."
        )
    try:
        return network_class.from_config(found)
    except (TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"`model_config_name_or_path` is '{name}', of which no network can be made: {describe_fault(error)}"
        ) from error


def load_unet(name: str, subfolder: Optional[str] = "unet") -> ConditionalUNet:
    """A network in a folder, or of a repository on the Hub.

    Raises:
        ValueError: If there is none.
    """
    if Path(name).is_dir() and not (Path(name) / (subfolder or "") / "config.json").is_file():
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', which has no {subfolder or '.'}/config.json: give a stage, a "
            "cascade or the folder of a network."
        )
    try:
        unet = AutoModel.from_pretrained(name, subfolder=subfolder)  # knows our classes: they are registered
    except Exception as error:  # whatever is in its files
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', which has no network that can be loaded: "
            f"{describe_fault(error)}"
        ) from error
    if not isinstance(unet, ConditionalUNet):
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', which has an {type(unet).__name__}, but should have an "
            "ImagenUNetModel or EfficientUNetModel."
        )
    missing = missing_weights(unet)
    if missing:
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', whose network lacks {len(missing)} weights, {missing[0]} among "
            "them: it was saved by another version, or is not complete."
        )
    return unet


def choose_attention(unet: ConditionalUNet, config: TrainingConfig) -> None:
    """Takes the attention that the configuration names.

    Raises:
        ValueError: If diffusers has none of that name, or it needs what is not installed.
    """
    if config.attention_backend is None:
        return
    try:
        unet.set_attention_backend(config.attention_backend)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"`attention_backend` is {config.attention_backend!r}: {error}") from error


def prepare_network(
    unet: ConditionalUNet, config: TrainingConfig, distributed_type: DistributedType
) -> ConditionalUNet:
    """Sets the network up for training, in place."""
    unet.train()
    if config.channels_last and distributed_type != DistributedType.FSDP:  # whose shards have to be contiguous
        unet.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.torch_compile:
        unet.compile()  # in place: no `_orig_mod.` in the names of saved weights
    return unet
