"""Export of networks to NeMo's archives, the reverse of the conversion."""

import io
import os
import tarfile
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from diffusers import SchedulerMixin

from ..models import EfficientUNetModel, ImagenUNetModel
from ..utils.arguments import bad_argument
from ..utils.files import whole_file
from ..utils.modules import first_names
from .nemo import unet_from_nemo_config
from .nemo_archive import CONFIG
from .nemo_keys import FIRST_CONVOLUTION, PREFIX, TWIN, nemo_names, nemo_shape
from .nemo_training import NOISE_SCHEDULES, PREDICTIONS


WEIGHTS_FILE = "model_weights.ckpt"


def nemo_config(
    unet: ImagenUNetModel | EfficientUNetModel,
    scheduler: SchedulerMixin,
    token_length: int | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Create NeMo's `model:` section for a network.

    Args:
        unet: The network, which may be on the meta device.
        scheduler: Its scheduler, whose configuration describes how it was trained.
        token_length: Number of tokens per prompt.
        recorded: The section that it was converted from. Its `unet:` section is kept if it still describes the
            network; its other entries are always kept.

    Raises:
        ValueError: If NeMo does not support such a network; names the entry of its configuration.
    """
    described = {"unet_type": "sr" if isinstance(unet, EfficientUNetModel) else "base", **preconditioning(scheduler)}
    if unet.takes_low_res and isinstance(unet, ImagenUNetModel):
        described["unet_type"] = "sr-unet"
    described["noise_cond_aug"] = unet.takes_low_res_noise_level
    conditioning = {"drop_rate": 0.1, "token_length": 128, **(dict(recorded or {}).get("conditioning") or {})}
    conditioning["embed_dim"] = unet.text_width
    if token_length is not None:
        conditioning["token_length"] = token_length
    section = {**(recorded or {}), **described, "conditioning": conditioning}
    if recorded is not None:
        section["preconditioning"] = {**(recorded.get("preconditioning") or {}), **described["preconditioning"]}
        if find_difference(unet, section) is None:
            return section
    section["unet"] = efficient_section(unet) if isinstance(unet, EfficientUNetModel) else unet_section(unet)
    difference = find_difference(unet, section)
    if difference is not None:
        raise ValueError(f"NeMo has no network like this one: {difference}")
    return section


def export_nemo(
    unet: ImagenUNetModel | EfficientUNetModel,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    output: str | os.PathLike,
) -> int:
    """Write a `.nemo` archive: the configuration, and the weights under NeMo's names, in their dtype.

    Args:
        unet: The network, which may be on the meta device.
        weights: Its weights by this package's names, which may be memory-mapped.
        config: NeMo's `model:` section, from `nemo_config`.
        output: The file to write.

    Returns:
        The number of tensors.

    Raises:
        ValueError: If a weight has no counterpart in NeMo.
    """
    names = nemo_names(unet)
    state_dict = {}
    for name, ours in names.items():
        whole = weights[ours[0]] if len(ours) == 1 else torch.cat([weights[part] for part in ours])
        state_dict[PREFIX + name] = whole.reshape(nemo_shape(name, whole.shape))
        if name.startswith(FIRST_CONVOLUTION):
            state_dict[PREFIX + TWIN + name.removeprefix(FIRST_CONVOLUTION)] = state_dict[PREFIX + name]
    with whole_file(output) as partial:
        heavy = partial.with_name(f"{partial.name}.weights.partial")
        try:
            torch.save(state_dict, heavy)
            text = yaml.safe_dump(dict(config), sort_keys=False).encode()
            with tarfile.open(partial, "w") as tar:
                add(tar, f"./{CONFIG}", len(text), io.BytesIO(text))
                with open(heavy, "rb") as file:
                    add(tar, f"./{WEIGHTS_FILE}", heavy.stat().st_size, file)
        finally:
            heavy.unlink(missing_ok=True)
    return len(state_dict)


def add(tar: tarfile.TarFile, name: str, size: int, file: Any) -> None:
    """Add a regular file to the archive, without user names and times of this machine."""
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, file)


def preconditioning(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return NeMo's entries for the preconditioning in a scheduler's configuration."""
    config = scheduler.config
    kind = config.get("preconditioning", "edm")
    if kind == "edm":
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise bad_argument(
                "prediction_type", config["prediction_type"], "'epsilon', which NeMo's EDM networks predict"
            )
        section = {"loss_type": "l2", "sigma_data": config["sigma_data"]}
        return {"preconditioning_type": "EDM", "preconditioning": section}
    objectives = {ours: name for name, ours in PREDICTIONS.items()}
    schedules = {ours: name for name, ours in NOISE_SCHEDULES.items()}
    prediction, schedule = config.get("prediction_type"), config.get("beta_schedule")
    if kind != "variance_preserving" or prediction not in objectives or schedule not in schedules:
        trained = f"{kind}, {prediction}, {schedule}"
        raise bad_argument("scheduler", trained, "EDM, or continuous DDPM that predicts the noise or the image")
    section = {"loss_type": "l2", "pred_objective": objectives[prediction], "noise_schedule": schedules[schedule]}
    return {"preconditioning_type": "DDPM", "preconditioning": section}


def shared_section(unet: ImagenUNetModel | EfficientUNetModel) -> dict[str, Any]:
    """Return the entries of `unet:` shared by both networks."""
    config = unet.config
    width = (config.time_embedding_dim or 4 * config.block_out_channels[0]) // 4
    return {
        "embed_dim": width,
        "image_size": config.sample_size,
        "channels": config.in_channels,
        "channel_mult": [channels // width for channels in config.block_out_channels],
        "num_attn_heads": config.num_attention_heads or 8,
        "per_head_channels": -1 if config.num_attention_heads else config.attention_head_dim,
        "feature_pooling_type": config.text_pooling,
        "learned_sinu_pos_emb_dim": config.learned_sinusoidal_dim or 0,
        "use_null_token": config.use_null_token,
        "init_conv_kernel_size": config.conv_kernel_size,
        "gradient_checkpointing": False,
        "scale_shift_norm": config.time_scale_shift == "scale_shift",
        "stable_attention": False,
        "flash_attention": False,
    }


def unet_section(unet: ImagenUNetModel) -> dict[str, Any]:
    """Return the `unet:` section for NeMo's `UNetModel`."""
    layers = unet.config.layers_per_block
    return {
        **shared_section(unet),
        "num_res_blocks": layers if isinstance(layers, int) else list(layers),
        "cond_dim": unet.config.cross_attention_dim,
        "attention_type": unet.config.attention_type,
        "attention_resolutions": sorted(unet.config.attention_resolutions),
        "dropout": unet.config.dropout or False,
        "resblock_updown": unet.config.resample_type == "resnet",
        "resample_with_conv": unet.config.resample_type != "pool",
        "low_res_cond": unet.takes_low_res,
    }


def efficient_section(unet: EfficientUNetModel) -> dict[str, Any]:
    """Return the `unet:` section for NeMo's `EfficientUNetModel`."""
    levels = len(unet.config.block_out_channels)
    layers, kinds = unet.config.layers_per_block, unet.config.attention_types
    kinds = [kinds] * levels if isinstance(kinds, (str, type(None))) else list(kinds)
    return {
        **shared_section(unet),
        "num_resblocks": [layers] * levels if isinstance(layers, int) else list(layers),
        "attention_type": next((kind for kind in kinds if kind), "fused"),
        "atnn_enabled_at": [int(kind is not None) for kind in kinds],
        "stride": 2,
        "skip_connection_scaling": unet.config.skip_connection_scaling,
    }


def find_difference(unet: ImagenUNetModel | EfficientUNetModel, section: dict[str, Any]) -> str | None:
    """Describe how the network of a NeMo section differs from this one; None if it does not."""
    try:
        with torch.device("meta"):
            other = unet_from_nemo_config(section)
    except ValueError as error:  # names the entry that NeMo does not support
        return str(error)
    ours, theirs = comparable(unet), comparable(other)
    differing = [name for name in ours if ours[name] != theirs.get(name)]
    if type(unet) is not type(other):
        differing.append("its class")
    return f"it differs in {first_names(differing)}." if differing else None


def comparable(unet: ImagenUNetModel | EfficientUNetModel) -> dict[str, Any]:
    """Return a normalized configuration, which is equal for equivalent networks."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    levels = len(config["block_out_channels"])
    config["time_embedding_dim"] = config["time_embedding_dim"] or 4 * config["block_out_channels"][0]
    for name in ("layers_per_block", "attention_types"):
        if name in config and not isinstance(config[name], (list, tuple)):
            config[name] = [config[name]] * levels
    if "attention_resolutions" in config:
        config["attention_resolutions"] = sorted(config["attention_resolutions"])
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
