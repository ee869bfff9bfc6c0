"""Presets: named configurations of NVIDIA NeMo's Imagen and of the networks that ship with this package.

docs/presets.md lists where each configuration was published, and where a documented size differs from its file.
"""

import inspect
from typing import Any, NamedTuple

from ..utils.arguments import check_choice
from . import EfficientUNetModel, ImagenUNetModel
from .unet_base import ConditionalUNet


class Preset(NamedTuple):
    """Network class, the entries of its configuration that differ from the defaults, and its number of parameters."""

    network_class: type[ConditionalUNet]
    config: dict[str, Any]
    num_parameters: int


T5 = {"encoder_hid_dim": 1024}  # the width of T5-11B, used by NeMo
MINILM = {"encoder_hid_dim": 384, "time_embedding_dim": 256, "norm_num_groups": 16}
# denoises residuals, which have a standard deviation of about 0.1 on emoji, without text
RESIDUAL = {"encoder_hid_dim": None, "time_embedding_dim": 256, "norm_num_groups": 16, "residual_scale": 0.2}

# fmt: off
IMAGEN_UNETS = {
    #                    px  channels of each level      layers           attention at     text low-res             parameters
    "500m_res_64":   (  64, (256,  512,  768, 1024),     3,               (32, 16, 8),  512, False, T5,       524_897_540),
    "2b_res_64":     (  64, (512, 1024, 1536, 2048),     3,               (32, 16, 8), 2048, False, T5,     2_171_162_116),
    "400m_res_256":  ( 256, (128, 256, 512, 768, 768),   (2, 2, 3, 4, 3), (32, 16),     512, True,  T5,       408_350_468),
    # trained at 16 and 32 px, then grown by a level to emoji_base_64 (models/growing.py); the shipped checkpoint was
    # trained further from its weights, with layers (0, 1, 2, 1, 1)
    "emoji_base_32": (  32, (32, 64, 128, 256),          1,               (8, 4),       256, False, MINILM,    13_401_988),
    "emoji_base_64": (  64, (32, 32, 64, 128, 256),      1,               (8, 4),       256, False, MINILM,    13_555_588),
}

EFFICIENT_UNETS = {
    #                    px  channels of each level         layers           attention, last levels  noise         parameters
    "600m_res_256":  ( 256, (128, 256, 512, 1024, 1024), (2, 4, 8, 8, 8), ("fused", "fused"),     True,  T5,       646_023_428),
    "400m_res_1024": (1024, (128, 128, 256, 512, 1024),  (1, 2, 4, 8, 8), ("cross",),             False, T5,       287_789_828),
    "600m_res_1024": (1024, (128, 256, 512, 1024, 1024), (2, 4, 8, 8, 8), ("cross", "cross"),     True,  T5,       639_193_348),
    "emoji_sr_256":  ( 256, (48, 96, 128, 192),          (1, 1, 2, 2),    (),                     False, RESIDUAL,   4_448_275),
}
# fmt: on


def _imagen_unet(resolution, channels, layers, attention, text_width, low_res, text_encoder, num_parameters) -> Preset:
    config = {
        "sample_size": resolution,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "attention_resolutions": attention,
        "cross_attention_dim": text_width,
        "low_res_conditioning": low_res,
        "low_res_noise_conditioning": low_res,
    }
    return Preset(ImagenUNetModel, {**config, **text_encoder}, num_parameters)


def _efficient_unet(resolution, channels, layers, attention, noise, text_encoder, num_parameters) -> Preset:
    config = {
        "sample_size": resolution,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "attention_types": (None,) * (len(channels) - len(attention)) + attention,
        "low_res_noise_conditioning": noise,
    }
    return Preset(EfficientUNetModel, {**config, **text_encoder}, num_parameters)


PRESETS = {name: _imagen_unet(*row) for name, row in IMAGEN_UNETS.items()} | {
    name: _efficient_unet(*row) for name, row in EFFICIENT_UNETS.items()
}


def create_unet(name: str, **overrides) -> ConditionalUNet:
    """Create a network by preset name, with random weights; keyword arguments override entries of its configuration.

    Raises:
        ValueError: For an unknown name, or an invalid configuration.
    """
    check_choice("preset", name, tuple(PRESETS))
    preset = PRESETS[name]
    entries = list(inspect.signature(preset.network_class).parameters)
    unknown = [override for override in overrides if override not in entries]
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is not an entry of the configuration of {name!r}, which has {', '.join(entries)}."
        )
    return preset.network_class(**{**preset.config, **overrides})
