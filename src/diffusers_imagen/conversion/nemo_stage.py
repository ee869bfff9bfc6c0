"""Stages of NeMo's Imagen: conversion of network, weights, scheduler, and settings for the pipeline."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin

from ..models import EfficientUNetModel, ImagenUNetModel
from ..schedulers import ContinuousDDPMScheduler, EDMHeunScheduler
from ..utils.arguments import bad_argument
from ..utils.bounds import MIN_AUGMENTATION_SIGMA
from ..utils.files import whole_file
from ..utils.streamed import Kind, bytes_of, read_kinds, read_tensors, write_tensors
from .nemo import check_weight, unet_from_nemo_config
from .nemo_archive import Config, NemoCheckpoint, open_nemo
from .nemo_keys import KeyPlan, bare_name, nemo_names, nemo_shape, plan_keys
from .nemo_training import Entries, objective


WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SCALE_FACTOR = 4  # of every super-resolution stage that NeMo published
# from NeMo's inference_pipeline.yaml, by resolution: EDM steps and guidance; 250 DDPM steps are from its documentation
CALL_DEFAULTS = {64: (30, 7.5), 256: (20, 8.0), 1024: (20, 7.5)}
DDPM_STEPS = 250


class StageReport(NamedTuple):
    """Report on the conversion of a checkpoint."""

    source: str
    parameters: int
    mapped: int  # keys of the checkpoint
    dropped: dict[str, str]  # keys that were skipped intentionally, and why
    left_out: dict[str, str]  # other content of the checkpoint, and why it was not converted
    dtypes: list[str]  # of the checkpoint's weights
    written: list[str]  # of the written weights
    config: dict[str, Any]  # NeMo's `model:` section


class StageParts(NamedTuple):
    """Stage as described by its configuration, without weights."""

    unet: ImagenUNetModel | EfficientUNetModel
    scheduler: SchedulerMixin
    scale_factor: int | None  # of a super-resolution stage
    token_length: int | None
    call_defaults: dict[str, float]


class NemoStage(NamedTuple):
    """Loaded stage, and the report."""

    parts: StageParts
    report: StageReport


def load_nemo_stage(
    source: str | os.PathLike,
    config: Config | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
    name: str = "source",
) -> NemoStage:
    """Load a stage of a NeMo archive or checkpoint into memory, with one copy of its weights.

    Args:
        source (`str` or `os.PathLike`):
            A `.nemo` archive, the folder that it was unpacked to, a Lightning `.ckpt`, or the folder of a distributed
            checkpoint.
        config (`str`, `os.PathLike` or `dict`, *optional*):
            NeMo's configuration, if `source` has none.
        ema (`bool`, defaults to `False`): Whether to use the averaged weights in `NAME-EMA.ckpt` next to `NAME.ckpt`.
        dtype (`torch.dtype`, *optional*): Dtype of the weights; as in the checkpoint if None.
        name (`str`): The argument's name, for messages.

    Raises:
        ValueError: If the checkpoint does not exist, is damaged, would execute code, or does not match its
            configuration.
    """
    with open_nemo(source, config, ema, name) as checkpoint:
        parts, plan = plan_stage(checkpoint)
        weights = {key: tensor.clone() for key, tensor in converted(checkpoint, parts.unet, plan, dtype)}
        report = make_report(checkpoint, plan, parts, [str(tensor.dtype) for tensor in weights.values()])
    parts.unet.load_state_dict(weights, assign=True)
    parts.unet.eval().requires_grad_(True)
    return NemoStage(parts, report)


def write_nemo_stage(
    checkpoint: NemoCheckpoint, folder: Path, dtype: torch.dtype | None = None
) -> tuple[StageParts, StageReport]:
    """Write the network of an open checkpoint to a folder, tensor by tensor: `config.json` and the weights.

    Returns:
        The stage without weights, its network on the meta device, and the report.

    Raises:
        ValueError: As `load_nemo_stage` does.
    """
    parts, plan = plan_stage(checkpoint)
    kinds: dict[str, Kind] = {}
    expected = {name: tuple(tensor.shape) for name, tensor in parts.unet.state_dict().items()}
    for key, names in plan.targets.items():
        kinds |= {name: (dtype or checkpoint.weights.tensors[key].dtype, expected[name]) for name in names}
    folder.mkdir(parents=True)
    parts.unet.save_config(folder)
    with whole_file(folder / WEIGHTS_FILE) as partial:
        write_tensors(partial, kinds, converted(checkpoint, parts.unet, plan, dtype))
    return parts, make_report(checkpoint, plan, parts, [str(kind[0]) for kind in kinds.values()])


def verify_nemo_stage(
    checkpoint: NemoCheckpoint, folder: Path, dtype: torch.dtype | None = None
) -> dict[str, dict[str, str]]:
    """Read the weights of a written network back under NeMo's names and compare them with the checkpoint.

    Returns:
        For each key of the checkpoint, the SHA-256 of its tensor in the written dtype, which both have in common, and
        `file` if that is the checkpoint's dtype, else `cast`.

    Raises:
        ValueError: If a tensor differs or is missing; names them.
    """
    parts, plan = plan_stage(checkpoint)
    path, names = folder / WEIGHTS_FILE, nemo_names(parts.unet)
    found, differing = {}, []
    kinds = read_kinds(path)
    keys = {bare_name(key): key for key in plan.targets}
    for key, tensor in checkpoint.weights.read([keys[name] for name in names]):
        ours = names[bare_name(key)]
        target = kinds[ours[0]][0][0]
        whole = torch.cat(list(read_tensors(path, kinds, ours)))
        shapes_agree = nemo_shape(bare_name(key), whole.shape) == tuple(tensor.shape)
        digests = [hashlib.sha256(bytes_of(part)).hexdigest() for part in (tensor.to(dtype or tensor.dtype), whole)]
        if digests[0] != digests[1] or not shapes_agree or target != (dtype or tensor.dtype):
            differing.append(key)
        found[key] = {"sha256": digests[0], "compared": "file" if tensor.dtype == target else "cast"}
    touched = {ours for group in names.values() for ours in group}
    untouched = [name for name in kinds if name not in touched]
    if differing or untouched:
        raise ValueError(f"'{path}' differs from the checkpoint: {(differing + untouched)[:5]}.")
    return found


def cascade_components(stages: Mapping[str, StageParts]) -> dict[str, Any]:
    """Return the arguments of a cascade's constructor, from stages by name."""
    components: dict[str, Any] = {"call_defaults": {name: parts.call_defaults for name, parts in stages.items()}}
    for name, parts in stages.items():
        components |= {f"{name}_unet": parts.unet, f"{name}_scheduler": parts.scheduler}
    return components


def plan_stage(checkpoint: NemoCheckpoint) -> tuple[StageParts, KeyPlan]:
    """Return the stage of a checkpoint's configuration, without weights, and the assignment of its weights."""
    parts = describe_stage(checkpoint.config)
    return parts, plan_keys({key: found.shape for key, found in checkpoint.weights.tensors.items()}, parts.unet)


def describe_stage(config: dict[str, Any]) -> StageParts:
    """Create the stage described by a `model:` section, with its network on the meta device.

    Raises:
        ValueError: For a section or a value that NeMo does not support.
    """
    with torch.device("meta"):
        unet = unet_from_nemo_config(config)
    sections = ("preconditioning_type", "preconditioning", "conditioning", "unet_type")
    nemo = Entries({"model": {name: config[name] for name in sections if name in config}})
    trained = objective(nemo)
    is_edm = trained["preconditioning"] == "edm"
    if unet.takes_low_res_noise_level and not is_edm:
        raise bad_argument("noise_cond_aug", True, "false with DDPM: NeMo has it for EDM only")
    steps, guidance = CALL_DEFAULTS.get(unet.resolution, CALL_DEFAULTS[256 if unet.takes_low_res else 64])
    defaults = {"num_inference_steps": steps if is_edm else DDPM_STEPS, "guidance_scale": guidance}
    if unet.takes_low_res_noise_level:
        defaults["low_res_noise_level"] = MIN_AUGMENTATION_SIGMA
    # NeMo's samplers always use dynamic thresholding
    thresholding = {"thresholding": True, "dynamic_thresholding_ratio": 0.995}
    scheduler = (
        EDMHeunScheduler(sigma_data=trained["sigma_data"], **thresholding)
        if is_edm
        else ContinuousDDPMScheduler(
            beta_schedule=trained["beta_schedule"], prediction_type=trained["prediction_type"], **thresholding
        )
    )
    return StageParts(
        unet,
        scheduler,
        scale_factor(config) if unet.takes_low_res else None,
        nemo.get("model.conditioning.token_length"),
        defaults,
    )


def scale_factor(config: dict[str, Any]) -> int:
    """Return the upsampling factor of a super-resolution stage, from the settings of its training data."""
    train = (config.get("data") or {}).get("train") if isinstance(config.get("data"), dict) else None
    train = train if isinstance(train, dict) else {}
    older = train.get("corruption_aug") if isinstance(train.get("corruption_aug"), dict) else {}
    sizes = train.get("target_resolutions", (older or {}).get("target_resolution"))
    if not isinstance(sizes, list) or len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        return SCALE_FACTOR
    return sizes[1] // sizes[0] if sizes[1] > sizes[0] and sizes[1] % sizes[0] == 0 else SCALE_FACTOR


def converted(
    checkpoint: NemoCheckpoint, unet: ImagenUNetModel | EfficientUNetModel, plan: KeyPlan, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and weights of this package's network; each weight is valid until the next is read."""
    shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    for key, tensor in checkpoint.weights.read(list(plan.targets)):
        check_weight(key, tensor)
        names = plan.targets[key]
        for name, part in zip(names, tensor.chunk(len(names))):
            part = part.reshape(shapes[name])
            if dtype is not None and dtype != part.dtype:
                part = part.to(dtype)
                if not part.isfinite().all():
                    raise ValueError(f"`dtype` is {dtype}, but {key!r} has values out of its range: use bfloat16.")
            yield name, part


def make_report(checkpoint: NemoCheckpoint, plan: KeyPlan, parts: StageParts, written: list[str]) -> StageReport:
    """Create the report on a checkpoint."""
    dtypes = {str(checkpoint.weights.tensors[key].dtype) for key in plan.targets}
    return StageReport(
        checkpoint.name,
        parts.unet.num_parameters(),
        len(plan.targets),
        plan.dropped,
        checkpoint.left_out,
        sorted(dtypes),
        sorted(set(written)),
        checkpoint.config,
    )
