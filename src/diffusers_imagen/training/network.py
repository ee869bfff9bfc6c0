"""The network of a run: made, and set up for training."""

from pathlib import Path

import torch
from diffusers import AutoModel

from ..models.unet_base import ConditionalUNet
from ..pipelines.stages import missing_weights
from ..presets import create_unet
from .config import TrainingConfig
from .growing import grow_unet


def make_unet(config: TrainingConfig) -> ConditionalUNet:
    """The network to train, set to the resolution that it is trained at."""
    if config.preset is not None:
        unet = create_unet(config.preset)
    else:
        unet = load_unet(config.pretrained_model_name_or_path)
    if config.grow:
        unet = grow_unet(unet)
    return unet.at_resolution(config.resolution)


def load_unet(name: str) -> ConditionalUNet:
    """The network of a stage, in a folder or on the Hub, or of a folder of its own.

    Raises:
        ValueError: If there is none.
    """
    if Path(name).is_dir() and not any((Path(name) / part / "config.json").is_file() for part in ("unet", "")):
        raise ValueError(f"`pretrained_model_name_or_path` is '{name}', which has no unet/config.json.")
    subfolder = None if (Path(name) / "config.json").is_file() else "unet"
    try:
        unet = AutoModel.from_pretrained(name, subfolder=subfolder)  # knows our classes: they are registered
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', which has no network that can be loaded: {reason}"
        ) from error
    missing = missing_weights(unet)
    if missing:
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', whose network lacks {len(missing)} weights, {missing[0]} among "
            "them: it was saved by another version, or is not complete."
        )
    return unet


def prepare_network(unet: ConditionalUNet, config: TrainingConfig) -> ConditionalUNet:
    """Sets the network up for training, in place."""
    unet.train()
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.torch_compile:
        unet.compile()  # in place: no `_orig_mod.` in the names of saved weights
    return unet
