"""Checkpoints of NVIDIA NeMo's Imagen (removed from NeMo in v2.5): configuration and weights to our networks.

A NeMo key is read in three parts, each with a table: where the block sits, which layer of the block, weight or bias.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, islice
from typing import Any, cast

import torch

from ..models import EfficientUNetModel, ImagenUNetModel
from ..models.attention import StableImagenAttnProcessor
from ..models.blocks import ImagenBlock
from ..models.config_checks import MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, RANGES, check_integer, check_integers
from ..utils.arguments import bad_argument, shown


# Position in the network, of what both have; those of the blocks are counted in the functions below.
SHARED_POSITIONS = {
    "time_embed.0.weights": "time_embedding.sinusoid.weight",
    "time_embed.1": "time_embedding.mlp.linear_1",
    "time_embed.3": "time_embedding.mlp.linear_2",
    "lowres_time_embed.0.weights": "low_res_time_embedding.sinusoid.weight",
    "lowres_time_embed.1": "low_res_time_embedding.mlp.linear_1",
    "lowres_time_embed.3": "low_res_time_embedding.mlp.linear_2",
    "text_to_cond": "text_embedding.proj",
    "attention_pooling.0.W": "text_embedding.pooling.score",
    "attention_pooling.1": "text_embedding.pooling.norm",
    "attention_pooling.2": "text_embedding.pooling.proj",
    "to_text_non_attn_cond.0": "text_embedding.pooled_norm",
    "to_text_non_attn_cond.1": "text_embedding.pooled_mlp.linear_1",
    "to_text_non_attn_cond.3": "text_embedding.pooled_mlp.linear_2",
    "null_text_embedding": "text_embedding.null_token",
}

# Layer of a block. A tuple splits the output channels of one NeMo layer over several of ours.
RESNET_LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.2": "conv2",  # Efficient U-Net
    "out_layers.3": "conv2",  # U-Net, whose third layer is dropout
    "skip_connection": "conv_shortcut",
    "shortcut": "conv_shortcut",
    "h_upd.conv": "resample_branch",
    "x_upd.conv": "resample_shortcut",
}
ATTENTION_LAYERS = {
    "norm": "norm",
    "norm_self": "norm_kv",
    "norm_context": "norm_context",
    "q": "to_q",
    "qkv": ("to_q", "to_k", "to_v"),
    "kv": ("to_k", "to_v"),
    "kv_self": ("to_k", "to_v"),
    "kv_context": ("add_k_proj", "add_v_proj"),
    "proj_out": "to_out.0",
}
STACKED_LAYERS = {
    "norm": "norm",
    "proj_in": "proj_in",
    "self_attention_block": "attn1",
    "cross_attention_block": "attn2",
    "ff.norm": "norm_ff",
    "ff.net.0.proj": "ff.net.0.proj",
    "ff.net.2": "ff.net.2",
    "proj_out": "proj_out",
}

# What NeMo's networks take, and what they take it to be where a configuration is silent.
REQUIRED = object()
SHARED_DEFAULTS = {
    "embed_dim": REQUIRED,
    "image_size": REQUIRED,
    "channels": 3,
    "text_embed_dim": None,  # NeMo's model fills in the width of its conditioning
    "per_head_channels": 64,
    "attention_type": "fused",
    "feature_pooling_type": "attention",
    "learned_sinu_pos_emb_dim": 16,
    "use_null_token": False,
    "init_conv_kernel_size": 3,
    "gradient_checkpointing": False,  # a matter of training, with `flash_attention`: no network differs by them
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

# What values NeMo's options may have; the network that they describe checks them together.
INTEGERS = {
    "embed_dim": (1, MAX_CHANNELS),
    "image_size": RANGES["sample_size"],
    "channels": RANGES["in_channels"],
    "text_embed_dim": RANGES["encoder_hid_dim"],
    "per_head_channels": (-1, MAX_CHANNELS),  # -1: as many as `num_attn_heads` leaves
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
    """Builds the network of a NeMo `model:` configuration and loads its weights.

    Args:
        model_config (`dict`): The `model:` section of NeMo's configuration.
        state_dict (`dict[str, torch.Tensor]`):
            Weights under NeMo's names, with or without the prefixes `model.`, `model.model.unet.` and `_orig_mod.`.

    Raises:
        ValueError: If a key has no place in the network, or the network has a parameter without a key; all are named.
    """
    _check_state_dict(state_dict)
    model = unet_from_nemo_config(model_config)
    stacked = model_config["unet"].get("attention_type") == "stacked"
    positions = _efficient_positions(model) if isinstance(model, EfficientUNetModel) else _unet_positions(model)

    converted, leftovers = {}, []
    for key, tensor in state_dict.items():
        name = re.sub(r"^(model\.)*(unet\.)?(_orig_mod\.)?", "", key)
        if name.startswith("init_conv.0."):  # NeMo registers the first convolution of its U-Net twice
            continue
        targets = _convert_key(name, positions, stacked)
        if targets is None:
            leftovers.append(key)
            continue
        for target, part in zip(targets, tensor.chunk(len(targets))):
            converted[target] = part
    expected = model.state_dict()
    gaps = [key for key in expected if key not in converted]
    leftovers += [key for key in converted if key not in expected]
    sizes = [key for key in converted if key in expected and converted[key].numel() != expected[key].numel()]
    if sizes:
        shapes = {key: (tuple(converted[key].shape), tuple(expected[key].shape)) for key in sizes}
        raise ValueError(
            f"`state_dict` does not fit the configuration. Shapes that are, and that should be: {shapes}."
        )
    if leftovers or gaps:
        raise ValueError(
            f"`state_dict` does not fit the configuration. Keys without a place: {leftovers}. "
            f"Parameters without a key: {gaps}."
        )
    # 1x1 convolutions over tokens are linear layers here
    model.load_state_dict({key: tensor.reshape(expected[key].shape) for key, tensor in converted.items()})
    return model


def unet_from_nemo_config(model_config: dict[str, Any]) -> ImagenUNetModel | EfficientUNetModel:
    """The network that NeMo's `model:` configuration describes, with random weights.

    Options that the configuration leaves out have NeMo's defaults.

    Raises:
        ValueError: For an option, or a value of one, that NeMo's networks do not have.
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
    """The `unet:` section with NeMo's defaults for what it leaves out."""
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
    """A switch; NeMo's files have 0 and 1, too."""
    if value not in (0, 1) or isinstance(value, float):
        raise bad_argument(key, value, "true or false")
    return bool(value)


def _conditioning_width(model_config: dict[str, Any]) -> int:
    """The width of the text, where the network's own section does not say it."""
    conditioning = model_config.get("conditioning")
    if not isinstance(conditioning, dict) or "embed_dim" not in conditioning:
        raise bad_argument("conditioning", conditioning, "a section with an `embed_dim`")
    check_integer("conditioning.embed_dim", conditioning["embed_dim"], *INTEGERS["text_embed_dim"])
    return conditioning["embed_dim"]


def _check_state_dict(state_dict: Any) -> None:
    """Raises ValueError unless it is a mapping from names to finite weights."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"`state_dict` is a {type(state_dict).__name__}, but should map NeMo's names to tensors.")
    for key, tensor in state_dict.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"`state_dict` has a {type(tensor).__name__} under {shown(key)}, but should have a tensor."
            )
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.ndim:
            raise ValueError(
                f"`state_dict` has a tensor of {tensor.dtype} and shape {tuple(tensor.shape)} on {tensor.device} under "
                f"{key!r}, but should have weights, of floating point."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"`state_dict` has values that are not finite under {key!r}: the training diverged.")


def _imagen_unet(unet: dict[str, Any], shared: dict[str, Any], is_super_resolution: bool) -> ImagenUNetModel:
    """NeMo's `UNetModel`."""
    layers = unet["num_res_blocks"]
    # NeMo puts attention at the strides that these floor to, and ignores those that no level has
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
    """NeMo's `EfficientUNetModel`."""
    if unet["stride"] != 2:
        raise bad_argument("stride", unet["stride"], "2: NeMo's levels do not fit together otherwise")
    return EfficientUNetModel(
        layers_per_block=tuple(unet["num_resblocks"]),
        attention_types=tuple(unet["attention_type"] if at else None for at in unet["atnn_enabled_at"]),
        skip_connection_scaling=unet["skip_connection_scaling"],
        **shared,
    )


def _unet_positions(model: ImagenUNetModel) -> dict[str, str]:
    """Positions of a U-Net: NeMo numbers blocks and resamplers through, first down, then up."""
    positions = {
        **SHARED_POSITIONS,
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_blocks.0.resnets.0",
        "middle_block.1": "mid_blocks.0.attention",
        "middle_block.2": "mid_blocks.1.resnets.0",
        "out.0": "norm_out",
        "out.2": "conv_out",
    }
    number, blocks = 1, count()
    for level, num_layers in enumerate(model.num_layers):
        if level > 0:
            positions[f"input_blocks.{number}.0.op"] = f"downsamplers.{level - 1}"
            positions[f"input_blocks.{number}.0"] = f"downsamplers.{level - 1}"
            number += 1
        for block in islice(blocks, num_layers):
            positions[f"input_blocks.{number}.0"] = f"down_blocks.{block}.resnets.0"
            positions[f"input_blocks.{number}.1"] = f"down_blocks.{block}.attention"
            number += 1
    blocks = count()
    for i, num_layers in enumerate(reversed(model.num_layers)):
        for block in islice(blocks, num_layers + 1):
            positions[f"output_blocks.{block}.0"] = f"up_blocks.{block}.resnets.0"
            upsampler = 1
            if model.up_blocks[block].attention is not None:
                positions[f"output_blocks.{block}.1"] = f"up_blocks.{block}.attention"
                upsampler = 2
        positions[f"output_blocks.{block}.{upsampler}.conv"] = f"upsamplers.{i}"
        positions[f"output_blocks.{block}.{upsampler}"] = f"upsamplers.{i}"
    return positions


def _efficient_positions(model: EfficientUNetModel) -> dict[str, str]:
    """Positions of an Efficient U-Net: NeMo numbers the levels from full resolution, also on the way up."""
    positions = {**SHARED_POSITIONS, "init_conv": "conv_in", "out": "conv_out"}
    last = len(model.down_blocks) - 1
    for level, block in enumerate(cast(Iterable[ImagenBlock], model.down_blocks)):
        positions[f"DBlocks.{level}.conv"] = f"downsamplers.{level}"
        positions[f"UBlocks.{level}.conv"] = f"upsamplers.{last - 1 - level}"
        for nemo, ours in (
            (f"DBlocks.{level}", f"down_blocks.{level}"),
            (f"UBlocks.{level}", f"up_blocks.{last - level}"),
        ):
            positions[f"{nemo}.attention_layer"] = f"{ours}.attention"
            for j in range(len(block.resnets)):
                positions[f"{nemo}.blocks.{j}"] = f"{ours}.resnets.{j}"
    return positions


def _convert_key(name: str, positions: dict[str, str], stacked: bool) -> list[str] | None:
    """Our names for a NeMo name, or None if it has no place."""
    nemo_position = _longest_prefix(name, positions)
    if nemo_position is None:
        return None
    position, rest = positions[nemo_position], name[len(nemo_position) :].lstrip(".")
    if rest in ("", "weight", "bias"):
        return [".".join(filter(None, [position, rest]))]

    layers: Mapping[str, str | Sequence[str]] = RESNET_LAYERS
    if position.endswith("attention"):
        layers = ATTENTION_LAYERS
        if stacked:
            nemo_layer = _longest_prefix(rest, STACKED_LAYERS)
            if nemo_layer is None:
                return None
            position, rest = f"{position}.{STACKED_LAYERS[nemo_layer]}", rest[len(nemo_layer) + 1 :]
            if rest in ("weight", "bias"):
                return [f"{position}.{rest}"]
    nemo_layer, _, parameter = rest.rpartition(".")
    if nemo_layer not in layers:
        return None
    targets = layers[nemo_layer]
    return [f"{position}.{layer}.{parameter}" for layer in ([targets] if isinstance(targets, str) else targets)]


def _longest_prefix(name: str, table: dict[str, Any]) -> str | None:
    """The longest key of the table that is `name` or a dotted beginning of it."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in table), None)
