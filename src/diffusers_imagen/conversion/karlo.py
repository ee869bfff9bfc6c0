"""Conversion of Karlo's super-resolution U-Nets (unCLIP, arXiv 2204.06125; without text) from diffusers' format.

Karlo upsamples from 64 to 256 pixels with two of them, one for the last step. In diffusers, each is a `UNet2DModel`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel

from ..models import ImagenUNetModel
from ..models.config_checks import RANGES, check_integer
from ..utils.arguments import check_choice, class_of
from .diffusers_unet import (
    MODULES,
    as_tuple,
    check_fixed,
    check_levels,
    complete_config,
    defaults_of,
    level_modules,
    renamed,
    take_weights,
)


# Entries of diffusers' configuration that may vary among Karlo's networks, and those that differ from the default.
FREE = {
    *("sample_size", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types"),
    *("resnet_time_scale_shift", "time_embedding_dim", "dropout"),
}
COMMON = {"in_channels": 6, "add_attention": False}


def config_from_karlo(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the configuration of a Karlo super-resolution network to that of an `ImagenUNetModel`.

    Args:
        config: Configuration of diffusers' `UNet2DModel`.

    Raises:
        ValueError: For a configuration that differs from Karlo's; names the entry.
    """
    config = complete_config(config, UNet2DModel)
    check_fixed(config, {**defaults_of(UNet2DModel), **COMMON}, FREE, "Karlo")
    check_levels(config)
    for kind in config["down_block_types"]:
        check_choice("down_block_types", kind, ("ResnetDownsampleBlock2D",))
    check_integer("sample_size", config["sample_size"], *RANGES["sample_size"])
    check_choice("resnet_time_scale_shift", config["resnet_time_scale_shift"], ("default", "scale_shift"))
    channels = tuple(config["block_out_channels"])
    return {
        "sample_size": config["sample_size"],
        "block_out_channels": channels,
        "layers_per_block": as_tuple(config["layers_per_block"]),
        "attention_resolutions": (),
        "mid_block_add_attention": False,
        "encoder_hid_dim": None,
        "time_embedding_dim": config["time_embedding_dim"],
        "sinusoidal_dim": channels[0],
        "time_scale_shift": config["resnet_time_scale_shift"],
        "resample_type": "resnet_nearest",
        "dropout": config["dropout"],
        "low_res_conditioning": True,
        "low_res_upsampling": "bicubic_antialias",
        "trained_beta_schedule": "squaredcos_cap_v2",
    }


def unet_from_karlo(unet: UNet2DModel) -> ImagenUNetModel:
    """Convert a super-resolution network of Karlo to an `ImagenUNetModel`, which shares the memory of its weights.

    Raises:
        ValueError: For any other network.
    """
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"`unet` is {class_of(unet)}, but should be a UNet2DModel.")
    config = dict(unet.config)
    with torch.device("meta"):
        ours = ImagenUNetModel(**config_from_karlo(config))
    return take_weights(ours, unet, renamed(list(unet.state_dict()), {**MODULES, **level_modules(config)}, {}))
