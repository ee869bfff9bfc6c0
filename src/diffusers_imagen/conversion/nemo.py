"""Networks from configurations and weights of NVIDIA NeMo's Imagen (removed from NeMo in v2.5)."""

from collections.abc import Mapping
from typing import Any

import torch

from ..models import EfficientUNetModel, ImagenUNetModel
from ..models.attention import StableImagenAttnProcessor
from ..models.config_checks import MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, RANGES, check_integer, check_integers
from ..utils.arguments import bad_argument, class_of, shown
from .nemo_keys import plan_keys, why_dropped


# Options of NeMo's networks, and their defaults.
REQUIRED = object()
SHARED_DEFAULTS = {
    "embed_dim": REQUIRED,
    "image_size": REQUIRED,
    "channels": 3,
    "text_embed_dim": None,  # NeMo's model sets the width of its conditioning
    "per_head_channels": 64,
    "attention_type": "fused",
    "feature_pooling_type": "attention",
    "learned_sinu_pos_emb_dim": 16,
    "use_null_token": False,
    "init_conv_kernel_size": 3,
    "gradient_checkpointing": False,  # training only, like `flash_attention`: they do not change the network
    "flash_attention": False,
    "stable_attention": True,
    "scale_shift_norm": True,
    "noise_cond_aug": False,
}
UNET_DEFAULTS = {
    **SHARED_DEFAULTS,
    "channel_mult": [1, 2, 3, 4],
    "num_res_blocks": 3,
    "num_attn_heads": 4,
    "cond_dim": 512,
    "attention_resolutions": [8, 16, 32],
    "dropout": False,
    "resblock_updown": False,
    "resample_with_conv": True,
    "low_res_cond": False,
}
EFFICIENT_DEFAULTS = {
    **SHARED_DEFAULTS,
    "channel_mult": [1, 1, 2, 4, 8],
    "num_resblocks": [1, 2, 4, 8, 8],
    "num_attn_heads": 8,
    "atnn_enabled_at": [0, 0, 0, 0, 1],
    "stride": 2,
    "skip_connection_scaling": False,
}

# Allowed values of NeMo's options; the network checks their combination.
INTEGERS = {
    "embed_dim": (1, MAX_CHANNELS),
    "image_size": RANGES["sample_size"],
    "channels": RANGES["in_channels"],
    "text_embed_dim": RANGES["encoder_hid_dim"],
    "per_head_channels": (-1, MAX_CHANNELS),  # -1: the channels divided by `num_attn_heads`
    "num_attn_heads": RANGES["num_attention_heads"],
    "learned_sinu_pos_emb_dim": (0, 65_536),
    "init_conv_kernel_size": RANGES["conv_kernel_size"],
    "cond_dim": RANGES["cross_attention_dim"],
}
LISTS = {
    "channel_mult": (1, MAX_CHANNELS),
    "num_res_blocks": (0, MAX_LAYERS),
    "num_resblocks": (1, MAX_LAYERS),
    "attention_resolutions": RANGES["sample_size"],
    "atnn_enabled_at": (0, 1),
}
NULLABLE = ("text_embed_dim", "learned_sinu_pos_emb_dim")
FLAGS = (
    "use_null_token",
    "gradient_checkpointing",
    "flash_attention",
    "stable_attention",
    "scale_shift_norm",
    "noise_cond_aug",
    "resblock_updown",
    "resample_with_conv",
    "low_res_cond",
    "skip_connection_scaling",
)


def load_nemo_unet(
    model_config: dict[str, Any], state_dict: dict[str, torch.Tensor]
) -> ImagenUNetModel | EfficientUNetModel:
    """Build the network of a NeMo `model:` configuration and load its weights.

    Args:
        model_config (`dict`): The `model:` section of NeMo's configuration.
        state_dict (`dict[str, torch.Tensor]`):
            Weights under NeMo's names, with or without the prefixes `model.`, `model.model.unet.` and `_orig_mod.`.

    Raises:
        ValueError: If a key has no counterpart in the network, or a parameter has no key; names all of them.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"`state_dict` is {class_of(state_dict)}, but should map NeMo's names to tensors.")
    model = unet_from_nemo_config(model_config)
    for key, tensor in state_dict.items():
        if not isinstance(key, str) or why_dropped(key, isinstance(model, EfficientUNetModel)) is None:
            check_weight(key, tensor)
    plan = plan_keys({key: tensor.shape for key, tensor in state_dict.items()}, model)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    converted = {}
    for key, targets in plan.targets.items():
        for name, part in zip(targets, state_dict[key].chunk(len(targets))):
            converted[name] = part.reshape(expected[name])
    model.load_state_dict(converted)
    return model


def unet_from_nemo_config(model_config: dict[str, Any]) -> ImagenUNetModel | EfficientUNetModel:
    """Build the network of NeMo's `model:` configuration, with random weights.

    Missing options have NeMo's defaults.

    Raises:
        ValueError: For an option or a value that NeMo's networks do not support.
    """
    if not isinstance(model_config, dict):
        raise bad_argument("model_config", model_config, "the `model:` section, a mapping")
    unet_type = model_config.get("unet_type")
    if unet_type not in ("base", "sr", "sr-unet"):
        raise bad_argument("unet_type", unet_type, "'base', 'sr' or 'sr-unet'")
    is_efficient = unet_type == "sr"
    unet = _with_defaults(model_config.get("unet"), EFFICIENT_DEFAULTS if is_efficient else UNET_DEFAULTS)
    counts_heads = unet["per_head_channels"] == -1
    shared = {
        "sample_size": unet["image_size"],
        "in_channels": unet["channels"],
        "out_channels": unet["channels"],
        "block_out_channels": tuple(unet["embed_dim"] * mult for mult in unet["channel_mult"]),
        "attention_head_dim": None if counts_heads else unet["per_head_channels"],
        "num_attention_heads": unet["num_attn_heads"] if counts_heads else None,
        "encoder_hid_dim": unet["text_embed_dim"] or _conditioning_width(model_config),
        "text_pooling": unet["feature_pooling_type"],
        "use_null_token": unet["use_null_token"],
        "time_embedding_dim": 4 * unet["embed_dim"],
        "learned_sinusoidal_dim": unet["learned_sinu_pos_emb_dim"] or None,
        "time_scale_shift": "scale_shift" if unet["scale_shift_norm"] else "default",
        "conv_kernel_size": unet["init_conv_kernel_size"],
        "low_res_noise_conditioning": _flag(
            "noise_cond_aug", model_config.get("noise_cond_aug", unet["noise_cond_aug"])
        ),
    }
    model = _efficient_unet(unet, shared) if is_efficient else _imagen_unet(unet, shared, unet_type == "sr-unet")
    if unet["stable_attention"]:
        model.set_attn_processor(StableImagenAttnProcessor())
    return model


def _with_defaults(unet: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """Complete the `unet:` section with NeMo's defaults."""
    if not isinstance(unet, dict):
        raise bad_argument("unet", unet, "a section, with NeMo's options of the network")
    unknown = [key for key in unet if key not in defaults]
    if unknown:
        raise ValueError(f"`unet` has the options {unknown}, but NeMo's network takes {list(defaults)}.")
    missing = [key for key, default in defaults.items() if default is REQUIRED and key not in unet]
    if missing:
        raise ValueError(f"`unet` lacks the options {missing}, which have no default.")
    unet = {**defaults, **unet}
    for key, value in unet.items():
        if key in INTEGERS and not (key in NULLABLE and value is None):
            check_integer(key, value, *INTEGERS[key])
        elif key in LISTS and not (key == "num_res_blocks" and isinstance(value, int)):
            values = [int(at) if isinstance(at, bool) else at for at in value] if isinstance(value, list) else value
            check_integers(key, values, *LISTS[key], (0 if key == "attention_resolutions" else 1, MAX_LEVELS))
        elif key in FLAGS:
            unet[key] = _flag(key, value)
    return unet


def _flag(key: str, value: Any) -> bool:
    """Return a boolean; NeMo's files also use 0 and 1."""
    if value not in (0, 1) or isinstance(value, float):
        raise bad_argument(key, value, "true or false")
    return bool(value)


def _conditioning_width(model_config: dict[str, Any]) -> int:
    """Return the width of the text embeddings, if the network's section does not specify it."""
    conditioning = model_config.get("conditioning")
    if not isinstance(conditioning, dict) or "embed_dim" not in conditioning:
        raise bad_argument("conditioning", conditioning, "a section with an `embed_dim`")
    check_integer("conditioning.embed_dim", conditioning["embed_dim"], *INTEGERS["text_embed_dim"])
    return conditioning["embed_dim"]


def check_weight(key: str, tensor: Any) -> None:
    """Raise a ValueError that names the key unless the value is a tensor of finite weights."""
    if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
        raise ValueError(f"`state_dict` has a value {class_of(tensor)} under {shown(key)}, but should have a tensor.")
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.ndim:
        raise ValueError(
            f"`state_dict` has a tensor of {tensor.dtype} and shape {tuple(tensor.shape)} on {tensor.device} under "
            f"{key!r}, but should have weights, of floating point."
        )
    if not tensor.isfinite().all():
        raise ValueError(f"`state_dict` has values that are not finite under {key!r}: the training diverged.")


def _imagen_unet(unet: dict[str, Any], shared: dict[str, Any], is_super_resolution: bool) -> ImagenUNetModel:
    """Build the counterpart of NeMo's `UNetModel`."""
    layers = unet["num_res_blocks"]
    # NeMo rounds these down to strides, and ignores strides without a level
    strides = {unet["image_size"] // resolution for resolution in unet["attention_resolutions"]}
    strides &= {2**level for level in range(len(unet["channel_mult"]))}
    return ImagenUNetModel(
        layers_per_block=layers if isinstance(layers, int) else tuple(layers),
        attention_resolutions=tuple(unet["image_size"] // stride for stride in sorted(strides)),
        attention_type=unet["attention_type"],
        cross_attention_dim=unet["cond_dim"],
        resample_type="resnet" if unet["resblock_updown"] else "conv" if unet["resample_with_conv"] else "pool",
        dropout=float(unet["dropout"]) if isinstance(unet["dropout"], bool) else unet["dropout"],
        low_res_conditioning=is_super_resolution or bool(unet["low_res_cond"]),
        **shared,
    )


def _efficient_unet(unet: dict[str, Any], shared: dict[str, Any]) -> EfficientUNetModel:
    """Build the counterpart of NeMo's `EfficientUNetModel`."""
    if unet["stride"] != 2:
        raise bad_argument("stride", unet["stride"], "2: NeMo's levels do not fit together otherwise")
    return EfficientUNetModel(
        layers_per_block=tuple(unet["num_resblocks"]),
        attention_types=tuple(unet["attention_type"] if at else None for at in unet["atnn_enabled_at"]),
        skip_connection_scaling=unet["skip_connection_scaling"],
        **shared,
    )
