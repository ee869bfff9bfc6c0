"""Conversion of DeepFloyd IF's U-Nets between diffusers' format and this package's: weights are renamed, not changed.

IF's U-Net and `ImagenUNetModel` both follow Nichol and Dhariwal 2021 (arXiv 2102.09672); `ImagenUNetModel` has options
for the differences. diffusers represents it as a `UNet2DConditionModel`, which covers many other architectures: their
configurations raise an error.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..diffusion.discrete_ddpm import BetaSchedule
from ..models import ImagenUNetModel
from ..models.config_checks import RANGES, check_integer
from ..utils.arguments import bad_argument, check_choice, class_of
from .diffusers_unet import (
    DOWN_BLOCKS,
    MODULES,
    UP_BLOCKS,
    as_tuple,
    check_fixed,
    check_levels,
    complete_config,
    defaults_of,
    level_modules,
    renamed,
    take_weights,
)


# Modules that only IF's networks have, and their names in this package's.
TEXT_MODULES = {
    "class_embedding": "low_res_time_embedding.mlp",
    "encoder_hid_proj": "text_embedding.proj",
    "add_embedding.norm1": "text_embedding.pooling.norm1",
    "add_embedding.pool": "text_embedding.pooling",
    "add_embedding.proj": "text_embedding.pooling.proj",
    "add_embedding.norm2": "text_embedding.pooling.norm2",
    "mid_block.attentions.0": "mid_blocks.0.attention",
}
# Attention layers with other names; layers of residual blocks, embeddings and pooling have the same names.
ATTENTION_LAYERS = {"group_norm": "norm", "norm_cross": "norm_context"}
CROSS_ATTENTION_LAYERS = {**ATTENTION_LAYERS, "add_k_proj": "to_k", "add_v_proj": "to_v"}

# Entries of diffusers' configuration that vary among IF's networks; `check_kind` and `ImagenUNetModel` check them.
FREE = {
    *("sample_size", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types"),
    *("attention_head_dim", "only_cross_attention", "mid_block_only_cross_attention", "time_embedding_dim", "dropout"),
    *("encoder_hid_dim", "cross_attention_dim", "addition_embed_type_num_heads", "class_embed_type"),
}
# Entries that have the same value in all of them, other than diffusers' default.
COMMON = {
    "out_channels": 6,  # noise, and the variance for DDPM's "learned_range"
    "act_fn": "gelu",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
}
# By `class_embed_type`: stage I, and stage II, which is conditioned on its low-resolution image's noise level.
STAGES: dict[str | None, dict[str, Any]] = {
    None: {"in_channels": 3},
    "timestep": {
        "in_channels": 6,
        "time_embedding_act_fn": "gelu",  # equivalent to the activation at the start of every block in stage I
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1 / 0.7071,
        "mid_block_scale_factor": 1 / 0.7071,
    },
}
DEFAULTS = defaults_of(UNet2DConditionModel)
BETA_SCHEDULE: BetaSchedule = (
    "squaredcos_cap_v2"  # with 1000 noise levels, for all networks and the low-resolution image
)


def config_from_deepfloyd(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the configuration of a DeepFloyd IF network to that of an `ImagenUNetModel`.

    Args:
        config: Configuration of diffusers' `UNet2DConditionModel`.

    Raises:
        ValueError: For a configuration that differs from IF's published networks; names the entry.
    """
    config = check_kind(config)
    resolution, channels = config["sample_size"], tuple(config["block_out_channels"])
    upscales = config["class_embed_type"] == "timestep"
    attends = [DOWN_BLOCKS[kind] for kind in config["down_block_types"]]
    cross = config["only_cross_attention"]
    return {
        "sample_size": resolution,
        "in_channels": 3,
        "out_channels": config["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": as_tuple(config["layers_per_block"]),
        "attention_resolutions": tuple(resolution // 2**level for level, attended in enumerate(attends) if attended),
        "attention_type": "cross" if cross else "fused",
        "attention_head_dim": config["attention_head_dim"],
        "encoder_hid_dim": config["encoder_hid_dim"],
        "cross_attention_dim": config["cross_attention_dim"],
        "text_pooling": "class_token",
        "text_pooling_num_heads": config["addition_embed_type_num_heads"],
        "time_embedding_dim": config["time_embedding_dim"],
        "sinusoidal_dim": channels[0],
        "resample_type": "resnet_nearest",
        "dropout": config["dropout"],
        "low_res_conditioning": upscales,
        "low_res_noise_conditioning": upscales,
        "low_res_augmentation": "discrete" if upscales else "edm",
        "act_fn": config["act_fn"],
        "resnet_out_scale_factor": config["resnet_out_scale_factor"],
        "shared_attention_norm": not cross,
        "attends_padding": True,
        "trained_beta_schedule": BETA_SCHEDULE,
    }


def config_to_deepfloyd(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the configuration of an `ImagenUNetModel` back to that of diffusers' `UNet2DConditionModel`.

    Args:
        config: Configuration of an `ImagenUNetModel`.

    Raises:
        ValueError: If it is not a DeepFloyd IF network; names the entry.
    """
    channels, resolution = config["block_out_channels"], config["sample_size"]
    strides = {resolution // attended for attended in config["attention_resolutions"]}
    attends = [2**level in strides for level in range(len(channels))]
    theirs = {
        **DEFAULTS,
        **COMMON,
        **STAGES["timestep" if config["low_res_conditioning"] else None],
        "class_embed_type": "timestep" if config["low_res_conditioning"] else None,
        "sample_size": resolution,
        "block_out_channels": tuple(channels),
        "layers_per_block": as_tuple(config["layers_per_block"]),
        "down_block_types": tuple(
            kind for attended in attends for kind, has in DOWN_BLOCKS.items() if has == attended
        ),
        "up_block_types": tuple(
            kind for attended in attends[::-1] for kind, has in UP_BLOCKS.items() if has == attended
        ),
        "attention_head_dim": config["attention_head_dim"],
        "only_cross_attention": config["attention_type"] == "cross",
        "time_embedding_dim": config["time_embedding_dim"],
        "dropout": config["dropout"],
        "encoder_hid_dim": config["encoder_hid_dim"],
        "cross_attention_dim": config["cross_attention_dim"],
        "addition_embed_type_num_heads": config["text_pooling_num_heads"] or DEFAULTS["addition_embed_type_num_heads"],
    }
    expected = {**defaults_of(ImagenUNetModel), **config_from_deepfloyd(theirs)}
    if config.get("trained_beta_schedule") is None:  # not declared, as in networks saved before this option existed
        del expected["trained_beta_schedule"]
    for name, value in config.items():
        if name in expected and as_tuple(value) != as_tuple(expected[name]):
            raise bad_argument(name, value, f"{expected[name]!r} in a network of DeepFloyd IF")
    return theirs


def unet_from_deepfloyd(
    unet: UNet2DConditionModel | Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None
) -> ImagenUNetModel:
    """Convert a network of DeepFloyd IF to an `ImagenUNetModel`, which shares the memory of its weights.

    Args:
        unet: The network, or its weights by diffusers' names.
        config: The weights' `UNet2DConditionModel` configuration; None with a network.

    Raises:
        ValueError: For a configuration that differs from IF's published networks, or weights that do not match it.
    """
    if isinstance(unet, nn.Module):
        if config is not None:
            raise bad_argument("config", config, "None with a network, which has its own")
        if not isinstance(unet, UNet2DConditionModel):
            raise ValueError(f"`unet` is {class_of(unet)}, but should be a UNet2DConditionModel.")
        config = dict(unet.config)
    config = check_kind(config)
    with torch.device("meta"):
        ours = ImagenUNetModel(**config_from_deepfloyd(config))
    return take_weights(ours, unet, weight_names(config))


def unet_to_deepfloyd(unet: ImagenUNetModel) -> UNet2DConditionModel:
    """Convert a network from `unet_from_deepfloyd`, possibly fine-tuned, back to diffusers' class; it shares its memory.

    Raises:
        ValueError: If it is not a DeepFloyd IF network.
    """
    if not isinstance(unet, ImagenUNetModel):
        raise ValueError(f"`unet` is {class_of(unet)}, but should be an ImagenUNetModel.")
    config = config_to_deepfloyd(unet.config)
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**config)
    return take_weights(theirs, unet, {ours: name for name, ours in weight_names(config).items()})


def check_kind(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a complete configuration of `UNet2DConditionModel`; raise ValueError unless it is one of IF's networks."""
    config = complete_config(config, UNet2DConditionModel)
    if config["encoder_hid_dim_type"] is None:  # diffusers fills these in where they are None
        config["encoder_hid_dim_type"] = "text_proj"
    if config["mid_block_only_cross_attention"] is None:
        config["mid_block_only_cross_attention"] = config["only_cross_attention"]
    stage = config["class_embed_type"]
    check_choice("class_embed_type", stage, tuple(STAGES))
    check_fixed(config, {**DEFAULTS, **COMMON, **STAGES[stage]}, FREE, "DeepFloyd IF")
    check_levels(config)
    check_text(config)
    return config


def check_text(config: dict[str, Any]) -> None:
    """Check the remaining entries that vary among IF's networks and that `ImagenUNetModel` does not check itself."""
    for name in ("sample_size", "encoder_hid_dim", "cross_attention_dim", "attention_head_dim"):
        check_integer(name, config[name], *RANGES[name])
    heads, width, cross = (
        config[name] for name in ("addition_embed_type_num_heads", "encoder_hid_dim", "only_cross_attention")
    )
    check_integer("addition_embed_type_num_heads", heads, *RANGES["text_pooling_num_heads"])
    if width % heads:
        raise bad_argument("addition_embed_type_num_heads", heads, f"a divisor of `encoder_hid_dim`, which is {width}")
    if not isinstance(cross, bool):
        raise bad_argument("only_cross_attention", cross, "True or False")
    if config["mid_block_only_cross_attention"] != cross:
        value = config["mid_block_only_cross_attention"]
        raise bad_argument("mid_block_only_cross_attention", value, "None, or as `only_cross_attention`")


def layer_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Map the names of diffusers' modules that have weights to their names in this package's network.

    Args:
        config: Configuration of an `ImagenUNetModel`.

    Raises:
        ValueError: If it is not a DeepFloyd IF network; names the entry.
    """
    names = weight_names(config_to_deepfloyd(config))
    return {name.rpartition(".")[0]: ours.rpartition(".")[0] for name, ours in names.items()}


def weight_names(config: dict[str, Any]) -> dict[str, str]:
    """Map the names of diffusers' weights to their names in this package's network; `config` is diffusers'."""
    with torch.device("meta"):
        weights = UNet2DConditionModel(**config).state_dict()
    attention = CROSS_ATTENTION_LAYERS if config["only_cross_attention"] else ATTENTION_LAYERS
    return renamed(list(weights), {**MODULES, **TEXT_MODULES, **level_modules(config)}, attention)
