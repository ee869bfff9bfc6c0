"""The network of a run: made, checked against the run's settings, and set up for training."""

from pathlib import Path

import torch
from diffusers import AutoModel

from ..models.unet_base import ConditionalUNet
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
        return AutoModel.from_pretrained(name, subfolder=subfolder)  # knows our classes: they are registered
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', which has no network that can be loaded: {reason}"
        ) from error


def check_network(unet: ConditionalUNet, config: TrainingConfig, with_text: bool) -> None:
    """Checks that the network takes what the run will give it.

    Raises:
        ValueError: If it does not, with what to change.
    """
    sides = {"crop_size" if config.crop_size else "resolution": (config.crop_size or config.resolution,)}
    if config.aspect_ratio_buckets and not config.crop_size:
        sides = {"aspect_ratio_buckets": tuple(side for shape in config.bucket_shapes() for side in shape)}
    for name, values in sides.items():
        for side in values:
            if side % unet.total_stride:
                raise ValueError(
                    f"`{name}` has the side {side}, but this network takes multiples of {unet.total_stride}."
                )
    if unet.config.low_res_conditioning != (config.low_resolution is not None):
        kind = "a super-resolution" if unet.config.low_res_conditioning else "a base"
        raise ValueError(
            f"`low_resolution` is {config.low_resolution}, but this is {kind} stage's network: "
            + ("give the side of its conditioning image." if unet.config.low_res_conditioning else "leave it out.")
        )
    if config.low_resolution is not None and unet.config.low_res_noise_conditioning != bool(
        config.max_augmentation_sigma
    ):
        raise ValueError(
            f"`max_augmentation_sigma` is {config.max_augmentation_sigma}, but this network "
            + ("is" if unet.config.low_res_noise_conditioning else "is not")
            + " told its conditioning image's noise level: "
            + ("set it above 0, such as 0.5." if unet.config.low_res_noise_conditioning else "set it to 0.")
        )
    if (unet.config.encoder_hid_dim is not None) != with_text:
        raise ValueError(
            "This network reads text: give `text_encoder` or `embedding_cache`."
            if unet.config.encoder_hid_dim is not None
            else "`text_encoder` or `embedding_cache` is given, but this network reads no text."
        )


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
