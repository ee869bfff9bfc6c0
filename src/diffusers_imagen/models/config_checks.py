"""Checks of a network's configuration and call arguments: each raises a ValueError that names the argument.

A configuration may come from an untrusted file; a network is built, and memory allocated, only if its configuration is
valid.
"""

from collections.abc import Sequence
from typing import Any, get_args

import torch

from ..diffusion.discrete_ddpm import BETA_SCHEDULES
from ..utils.arguments import bad_argument, check_choice, class_of, is_finite
from .attention import ATTENTION_TYPES
from .blocks import ActivationType, ResampleType, TimeScaleShift
from .embeddings import TextPooling
from .interface import LowResAugmentation, LowResUpsampling


# Lowest and highest value of each entry: far above any published configuration, and low enough that no file makes a
# machine run out of memory.
MAX_LEVELS = 12
MAX_LAYERS = 128  # per level
MAX_CHANNELS = 16_384
MAX_PARAMETERS = 10_000_000_000  # NeMo's largest has 2.2 billion
RANGES = {
    "sample_size": (1, 65_536),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "attention_head_dim": (1, MAX_CHANNELS),
    "num_attention_heads": (1, MAX_CHANNELS),
    "encoder_hid_dim": (1, 65_536),
    "cross_attention_dim": (1, 65_536),
    "time_embedding_dim": (8, 65_536),
    "learned_sinusoidal_dim": (2, 65_536),
    "sinusoidal_dim": (2, 65_536),
    "text_pooling_num_heads": (1, MAX_CHANNELS),
    "conv_kernel_size": (1, 31),
    "norm_num_groups": (1, MAX_CHANNELS),
}
OPTIONAL = (
    "attention_head_dim",
    "num_attention_heads",
    "encoder_hid_dim",
    "time_embedding_dim",
    "learned_sinusoidal_dim",
    "sinusoidal_dim",
    "text_pooling_num_heads",
)
FLAGS = (
    "use_null_token",
    "skip_connection_scaling",
    "low_res_conditioning",
    "low_res_noise_conditioning",
    "shared_attention_norm",
    "mid_block_add_attention",
    "attends_padding",
)
CHOICES = {
    "act_fn": get_args(ActivationType),
    "attention_type": tuple(ATTENTION_TYPES),
    "low_res_augmentation": get_args(LowResAugmentation),
    "low_res_upsampling": get_args(LowResUpsampling),
    "resample_type": get_args(ResampleType),
    "text_pooling": get_args(TextPooling),
    "time_scale_shift": get_args(TimeScaleShift),
    "trained_beta_schedule": (None, *BETA_SCHEDULES),
}


def check_config(config: dict[str, Any], min_layers: int) -> None:
    """Check the sizes in a network's configuration, one by one and together.

    Args:
        config: The configuration, as registered.
        min_layers: The minimum number of layers per level.

    Raises:
        ValueError: For a value of the wrong type, out of range, or inconsistent with the others; names the argument.
    """
    without_class_token = {} if "text_pooling_num_heads" in config else {"text_pooling": ("attention", "mean")}
    for name, choices in {**CHOICES, **without_class_token}.items():
        if name in config:
            check_choice(name, config[name], choices)
    for name, (minimum, maximum) in RANGES.items():
        if name in config and not (name in OPTIONAL and config[name] is None):
            check_integer(name, config[name], minimum, maximum)
    for name in FLAGS:
        if name in config and not isinstance(config[name], bool):
            raise bad_argument(name, config[name], "True or False")
    scale = config.get("residual_scale")
    if scale is not None:
        if not is_finite(scale) or scale <= 0:
            raise bad_argument("residual_scale", scale, "None or a finite number above 0")
        if not config["low_res_conditioning"] or config["out_channels"] != config["in_channels"]:
            expected = "None but with `low_res_conditioning` and as many `out_channels` as `in_channels`"
            raise bad_argument("residual_scale", scale, expected)
    dropout = config["dropout"]
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise bad_argument("dropout", dropout, "a number from 0 to below 1")
    channels = config["block_out_channels"]
    check_integers("block_out_channels", channels, 1, MAX_CHANNELS, (1, MAX_LEVELS))
    layers = per_level("layers_per_block", config["layers_per_block"], len(channels))
    check_integers("layers_per_block", layers, min_layers, MAX_LAYERS, (1, MAX_LEVELS))

    if config["conv_kernel_size"] % 2 == 0:
        raise bad_argument("conv_kernel_size", config["conv_kernel_size"], "odd")
    for name in ("learned_sinusoidal_dim", "sinusoidal_dim"):
        if (config.get(name) or 0) % 2:
            raise bad_argument(name, config[name], "even")
    check_groups("block_out_channels", channels, config["norm_num_groups"])
    stride = 2 ** (len(channels) - 1)
    if config["sample_size"] % stride:
        raise ValueError(
            f"`sample_size` is {config['sample_size']}, but should be a multiple of {stride}: a network with "
            f"{len(channels)} levels in `block_out_channels` halves the image {len(channels) - 1} times."
        )
    parameters = estimate_parameters(config, layers)
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"`block_out_channels` {tuple(channels)} and `layers_per_block` {tuple(layers)} make a network of about "
            f"{parameters / 1e9:.0f} billion parameters, but {MAX_PARAMETERS / 1e9:.0f} billion is the maximum."
        )


def check_options(config: dict[str, Any]) -> None:
    """Check options that only have an effect in combination with others: one without effect is an error.

    Args:
        config: The configuration of an `ImagenUNetModel`, which has passed `check_config`.

    Raises:
        ValueError: For an option without effect; names it.
    """
    scale, heads, text_width = (
        config[name] for name in ("resnet_out_scale_factor", "text_pooling_num_heads", "encoder_hid_dim")
    )
    if not is_finite(scale) or scale <= 0:
        raise bad_argument("resnet_out_scale_factor", scale, "a finite number above 0")
    if config["sinusoidal_dim"] is not None and config["learned_sinusoidal_dim"] is not None:
        raise bad_argument("sinusoidal_dim", config["sinusoidal_dim"], "None with `learned_sinusoidal_dim`")
    if config["text_pooling"] != "class_token" and heads is not None:
        raise bad_argument("text_pooling_num_heads", heads, "None where `text_pooling` is not 'class_token'")
    if config["text_pooling"] == "class_token" and text_width is not None and (heads is None or text_width % heads):
        raise bad_argument("text_pooling_num_heads", heads, f"a divisor of `encoder_hid_dim`, which is {text_width}")
    if config["shared_attention_norm"] and (config["attention_type"] != "fused" or text_width is None):
        raise bad_argument("shared_attention_norm", True, "False but with text and an `attention_type` of 'fused'")
    if config["attends_padding"] and text_width is None:
        raise bad_argument("attends_padding", True, "False in a network without text")
    if config["low_res_augmentation"] != "edm" and not config["low_res_noise_conditioning"]:
        expected = "'edm' where `low_res_noise_conditioning` is False"
        raise bad_argument("low_res_augmentation", config["low_res_augmentation"], expected)
    upsamples = config["low_res_conditioning"] and config["low_res_augmentation"] == "edm"
    if config["low_res_upsampling"] != "bicubic" and not upsamples:
        expected = "'bicubic' but with `low_res_conditioning` and a `low_res_augmentation` of 'edm'"
        raise bad_argument("low_res_upsampling", config["low_res_upsampling"], expected)


def check_groups(name: str, widths: Sequence[int], groups: int) -> None:
    """Raise ValueError for a width that is not divisible by the number of groups of the normalization."""
    indivisible = [width for width in widths if width % groups]
    if indivisible:
        raise ValueError(f"`norm_num_groups` is {groups}, which does not divide {indivisible[0]} of `{name}`.")


def estimate_parameters(config: dict[str, Any], layers: Sequence[int]) -> int:
    """Estimate the number of parameters of a network, within a factor of two."""
    channels = config["block_out_channels"]
    time_dim = config["time_embedding_dim"] or 4 * channels[0]
    text_dim = config["encoder_hid_dim"] or 0
    context_dim = config.get("cross_attention_dim", text_dim) if text_dim else 0
    blocks = zip(channels, layers)
    count = sum((2 * num_layers + 1) * width * (18 * width + 2 * time_dim) for width, num_layers in blocks)
    count += 36 * max(channels) ** 2  # the middle
    count += time_dim * (config.get("sinusoidal_dim") or 0)
    if config["text_pooling"] == "class_token":
        count += text_dim * (3 * text_dim + time_dim)
    return count + 2 * time_dim**2 + text_dim * (context_dim + 1) + context_dim * (time_dim + 2 * max(channels))


def per_level(name: str, value: Any, num_levels: int) -> tuple:
    """Return one value per level: an int applies to all levels, a list must have one entry for each."""
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        raise bad_argument(name, value, "a list with one entry per level")
    values = (value,) * num_levels if isinstance(value, int) else tuple(value)
    if len(values) != num_levels:
        raise ValueError(f"`{name}` has {len(values)} entries, but `block_out_channels` has {num_levels}.")
    return values


def check_integer(name: str, value: Any, minimum: int, maximum: int) -> None:
    """Raise ValueError unless the value is a Python int in a closed range; NumPy integers cannot be saved as JSON."""
    if not is_within(value, minimum, maximum):
        raise bad_argument(name, value, f"an integer from {minimum} to {maximum}")


def is_within(value: Any, minimum: int, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def check_integers(name: str, values: Any, minimum: int, maximum: int, lengths: tuple[int, int]) -> None:
    """Raise ValueError unless the value is a list of such integers, of a length within `lengths`."""
    if not isinstance(values, (list, tuple)):
        raise bad_argument(name, values, "a list of integers")
    if not lengths[0] <= len(values) <= lengths[1]:
        raise ValueError(
            f"`{name}` has {len(values)} entries, but should have {lengths[0]} to {lengths[1]}, one per level."
        )
    if not all(is_within(value, minimum, maximum) for value in values):
        raise bad_argument(name, values, f"a list of integers from {minimum} to {maximum}")


def check_image(name: str, image: Any, channels: int) -> None:
    """Raise ValueError unless the image is a tensor `(batch, channels, height, width)`."""
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"`{name}` is {class_of(image)}, but should be a tensor.")
    if image.ndim != 4 or image.shape[1] != channels:
        raise ValueError(f"`{name}` has shape {tuple(image.shape)}, but should be (batch, {channels}, height, width).")


def as_timesteps(name: str, value: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
    """Return a conditioning value as `(B,)` in float32; raise ValueError unless it is one number or one per sample."""
    if not isinstance(value, (torch.Tensor, float, int)):
        raise bad_argument(name, value, "a number, or a tensor of one number per sample")
    value = torch.as_tensor(value, dtype=torch.float32, device=sample.device)
    if value.numel() not in (1, len(sample)):
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}, but should have one value, or {len(sample)}.")
    return value.reshape(-1).expand(len(sample))
