"""Checks that a network fits the data and the objective, before any work is done."""

from typing import Any

import torch
from accelerate import Accelerator

from ..diffusion.preconditioning import PRECONDITIONINGS
from ..models.interface import StageNetwork
from ..schedulers import EDMAdamsScheduler
from ..schedulers.foreign_configs import NO_BETAS, is_discrete
from ..text.source import TextSource
from ..utils.arguments import shown
from ..utils.errors import one_line
from .config import TrainingConfig
from .devices import is_spread
from .pretrained_stage import read_scheduler


def check_network(config: TrainingConfig, unet: StageNetwork, with_text: bool) -> None:
    """Check resolution, conditioning image and text.

    Args:
        config (`TrainingConfig`): Configuration of the data and its processing.
        unet (`StageNetwork`): The network.
        with_text (`bool`): Whether batches have text.

    Raises:
        ValueError: If the network cannot be trained on such batches.
    """
    check_conditioning(config, unet)
    resolution = config.crop_size or config.resolution
    name = "crop_size" if config.crop_size else "resolution"
    shapes = [(resolution, resolution)]
    if config.crop_size is None and (buckets := config.bucket_shapes()) is not None:
        name, shapes = "aspect_ratio_buckets", buckets
    stride = unet.total_stride
    for shape in shapes:
        if shape[0] % stride or shape[1] % stride:
            near = sorted({max(stride, shape[0] // stride * stride), -(-shape[0] // stride) * stride})
            raise ValueError(
                f"`{name}` gives images of {shape[0]}x{shape[1]}, but this network needs multiples of {stride}, "
                f"such as {' or '.join(map(str, near))}."
            )
    if unet.takes_low_res != (config.low_resolution is not None):
        needs = (
            "is conditioned on an image: set `low_resolution`" if unet.takes_low_res else "is not conditioned on one"
        )
        raise ValueError(f"`low_resolution` is {config.low_resolution}, but this network {needs}.")
    told = unet.takes_low_res_noise_level
    if config.low_resolution is not None and told != bool(config.noise_conditioning_augmentation):
        raise ValueError(
            f"`noise_conditioning_augmentation` is {config.noise_conditioning_augmentation}, but this network is "
            + ("" if told else "not ")
            + "conditioned on the noise level of its low-resolution image: set it "
            + ("above 0, such as 0.5." if told else "to 0.")
        )
    if with_text and unet.text_width is None:
        raise ValueError("`text_encoder` or `embedding_cache` is given, but this network was built without text.")
    if not with_text and unet.text_width is not None:
        raise ValueError("This network is conditioned on text: pass `text_encoder` or `embedding_cache`.")


def check_conditioning(config: TrainingConfig, unet: StageNetwork) -> None:
    """Check that the training objective fits the conditioning and the output of the network.

    Raises:
        ValueError: If the network has discrete betas and the objective does not, its output is neither a prediction
            nor a prediction with a variance, or its augmentation differs from the configured one.
    """
    betas = unet.trained_beta_schedule
    has_variance = unet.out_channels == 2 * unet.in_channels
    if config.preconditioning != "discrete" and (betas is not None or has_variance):
        reason = (
            "was trained with discrete betas" if betas is not None else "also predicts a variance of discrete betas"
        )
        raise ValueError(
            f"`preconditioning` is {config.preconditioning!r}, but this network {reason}: set it to 'discrete'."
        )
    if betas not in (None, config.beta_schedule):
        raise ValueError(
            f"`beta_schedule` is {config.beta_schedule!r}, but this network was trained with {betas!r}: set it to "
            "this value."
        )
    if not has_variance and unet.out_channels != unet.in_channels:
        raise ValueError(
            f"`out_channels` of the network is {unet.out_channels}, but should be {unet.in_channels}, or twice that "
            "with a variance, for training."
        )
    default = TrainingConfig.noise_conditioning_augmentation
    if unet.low_res_augmentation == "discrete" and config.noise_conditioning_augmentation != default:
        raise ValueError(
            f"`noise_conditioning_augmentation` is {config.noise_conditioning_augmentation}, but this network is "
            "conditioned on an index, which is drawn among all 1000: leave it out."
        )


def check_modules(config: TrainingConfig, accelerator: Accelerator, modules: list[torch.nn.Module]) -> None:
    """Check that additional modules can be trained with the network.

    Raises:
        ValueError: If there are any, and weights are sharded over processes.
    """
    if modules and is_spread(accelerator):
        raise ValueError(
            f"`loss_weighting` is {config.loss_weighting!r}, but {accelerator.distributed_type.value} supports only "
            "one module."
        )


def check_text(unet: StageNetwork, text: TextSource | None) -> None:
    """Check that the network's text embeddings have the source's width, and the same padded positions.

    Raises:
        ValueError: If not.
    """
    if text is None or unet.text_width is None:
        return
    if unet.text_width != text.width:
        raise ValueError(
            f"The text embeddings have width {text.width}, but this network needs {unet.text_width}: use the text "
            "encoder, or the embedding cache, that it was trained with."
        )
    if unet.attends_padding != text.keeps_padding:
        raise ValueError(
            f"The text embeddings have `keeps_padding` {text.keeps_padding}, but should have {unet.attends_padding}, "
            "like `attends_padding` of the network."
        )
    if text.keeps_padding and "" not in text:
        raise ValueError(
            "`embedding_cache` lacks the empty text, which replaces dropped captions: pass `text_encoder` too, or "
            "write the cache again."
        )


def check_objective(config: TrainingConfig) -> None:
    """
    Check that the objective is the one that a pretrained stage was trained with, according to its scheduler, if any.

    Raises:
        ValueError: If the objective differs, or the scheduler's configuration is malformed.
    """
    name, saved = str(config.pretrained_model_name_or_path), read_scheduler(config)
    if saved is None:
        return
    if is_discrete(saved):
        saved = {"preconditioning": "discrete", **saved, "beta_schedule": check_discrete(name, saved)}
    trained = saved.get("preconditioning")
    if trained not in PRECONDITIONINGS:  # not a scheduler of this package
        return
    keys = {"edm": (), "discrete": ("beta_schedule",)}.get(trained, ("prediction_type", "beta_schedule"))
    expected = {key: saved[key] for key in ("preconditioning", "sigma_data", *keys) if key in saved}
    if expected.get("beta_schedule") == NO_BETAS:  # a scheduler without betas
        del expected["beta_schedule"]
    for key, value in expected.items():
        if getattr(config, key) != value:
            raise ValueError(
                f"`{key}` is {getattr(config, key)!r}, but '{name}' was trained with {value!r}: set it to this value."
            )


def check_discrete(name: str, saved: dict[str, Any]) -> str:
    """Check that training supports a scheduler with discrete betas, of the stage `name`; return its `beta_schedule`.

    Raises:
        ValueError: If it has other than diffusers' default 1000 noise levels, or the network does not predict noise.
    """
    try:
        found = EDMAdamsScheduler.from_config(saved).config
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', whose scheduler cannot be read: {one_line(error)}"
        ) from error
    expected = EDMAdamsScheduler(preconditioning="discrete").config
    named = () if found.beta_schedule == "squaredcos_cap_v2" else ("beta_start", "beta_end")  # cosine has no ends
    for key in ("num_train_timesteps", "prediction_type", "trained_betas", *named):
        if found[key] != expected[key]:
            raise ValueError(
                f"`{key}` of the scheduler of '{name}' is {shown(found[key])}, but should be {expected[key]!r} for "
                "further training."
            )
    return found.beta_schedule
