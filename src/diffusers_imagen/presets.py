"""Configurations of the networks that ship with the package."""

from .models import EfficientUNetModel, ImagenUNetModel
from .models.unet_base import ConditionalUNet


EMOJI = {"encoder_hid_dim": 384, "time_embedding_dim": 256, "norm_num_groups": 16}

EMOJI_BASE = {"layers_per_block": 1, "attention_resolutions": (8, 4), "cross_attention_dim": 256, **EMOJI}

PRESETS = {
    # trained at 16 and 32 px, then grown by a level to emoji_base_64 (training/growing.py)
    "emoji_base_32": (
        ImagenUNetModel,
        {"sample_size": 32, "block_out_channels": (32, 64, 128, 256), **EMOJI_BASE},
    ),
    "emoji_base_64": (
        ImagenUNetModel,
        {"sample_size": 64, "block_out_channels": (32, 32, 64, 128, 256), **EMOJI_BASE},
    ),
    "emoji_sr_256": (
        EfficientUNetModel,
        {
            "sample_size": 256,
            "block_out_channels": (48, 96, 128, 192),
            "layers_per_block": (1, 1, 2, 2),
            "attention_types": (None, None, None, "cross"),
            "low_res_noise_conditioning": True,
            **EMOJI,
        },
    ),
}


def create_unet(name: str, **overrides) -> ConditionalUNet:
    """A network by preset name, with random weights; keyword arguments replace entries of its configuration."""
    if name not in PRESETS:
        raise ValueError(f"`preset` is {name!r}, but should be one of {', '.join(PRESETS)}.")
    network_class, config = PRESETS[name]
    return network_class(**{**config, **overrides})
