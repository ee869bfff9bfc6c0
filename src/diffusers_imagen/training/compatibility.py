"""Whether a network can take the data, asked before any work is done."""

from pathlib import Path

import torch
from accelerate import Accelerator

from ..diffusion.preconditioning import PRECONDITIONINGS
from ..models.interface import StageNetwork
from ..schedulers import EDMHeunScheduler
from ..schedulers.foreign_configs import NO_BETAS, is_discrete
from ..utils.arguments import bad_argument
from ..utils.files import read_json_object
from .config import TrainingConfig
from .devices import is_spread
from .network import find_network


def check_network(config: TrainingConfig, unet: StageNetwork, with_text: bool) -> None:
    """Checks resolution, conditioning image and text.

    Args:
        config (`TrainingConfig`): The data, and what is done to it.
        unet (`StageNetwork`): The network.
        with_text (`bool`): Whether batches have text.

    Raises:
        ValueError: If the network cannot be trained on such batches.
    """
    check_conditioning(unet)
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
                f"`{name}` gives images of {shape[0]}x{shape[1]}, but this network takes multiples of {stride}, "
                f"such as {' or '.join(map(str, near))}."
            )
    if unet.takes_low_res != (config.low_resolution is not None):
        needs = "is conditioned on one: give `low_resolution`" if unet.takes_low_res else "takes none"
        raise ValueError(f"`low_resolution` is {config.low_resolution}, but this network {needs}.")
    told = unet.takes_low_res_noise_level
    if config.low_resolution is not None and told != bool(config.noise_conditioning_augmentation):
        raise ValueError(
            f"`noise_conditioning_augmentation` is {config.noise_conditioning_augmentation}, but this network is "
            + ("" if told else "not ")
            + "told its conditioning image's noise level: set it "
            + ("above 0, such as 0.5." if told else "to 0.")
        )
    if with_text and unet.text_width is None:
        raise ValueError("`text_encoder` or `embedding_cache` is given, but this network was built without text.")
    if not with_text and unet.text_width is not None:
        raise ValueError("This network reads text: give `text_encoder` or `embedding_cache`.")


def check_conditioning(unet: StageNetwork) -> None:
    """Checks that training makes what the network reads and predicts.

    Raises:
        ValueError: If it is conditioned as DeepFloyd IF's networks are, or predicts a variance.
    """
    for name, value, expected in (
        ("attends_padding", unet.attends_padding, False),
        ("low_res_augmentation", unet.low_res_augmentation, "edm"),
        ("out_channels", unet.out_channels, unet.in_channels),
    ):
        if value != expected:
            raise ValueError(f"`{name}` of the network is {value!r}, but should be {expected!r} to be trained here.")


def check_modules(config: TrainingConfig, accelerator: Accelerator, modules: list[torch.nn.Module]) -> None:
    """Checks that modules can be trained beside the network.

    Raises:
        ValueError: If there are any, and weights are spread over processes.
    """
    if modules and is_spread(accelerator):
        raise ValueError(
            f"`loss_weighting` is {config.loss_weighting!r}, but {accelerator.distributed_type.value} trains one module "
            "only."
        )


def check_width(unet: StageNetwork, width: int | None) -> None:
    """Checks the width of the text embeddings; None is that of no text."""
    if width is not None and unet.text_width not in (None, width):
        raise ValueError(
            f"The text embeddings are {width} wide, but this network reads {unet.text_width}: give the text encoder, or "
            "the embedding cache, that it was made for."
        )


def check_objective(config: TrainingConfig) -> None:
    """Checks that a stage is trained further for what it was trained for, as its scheduler says, where it has one.

    Raises:
        ValueError: If the objective is another, or the scheduler's configuration is malformed.
    """
    name = str(config.pretrained_model_name_or_path)
    subfolder = find_network(config)
    if subfolder is None:  # the folder of a network, in a stage or a cascade
        place, part = str(Path(name).with_name(Path(name).name.replace("unet", "scheduler"))), None
        if not Path(place).is_dir():
            return
    else:
        place, part = name, subfolder.replace("unet", "scheduler")
    file = Path(place) / (part or "") / EDMHeunScheduler.config_name
    if file.exists():
        saved = read_json_object(file)
    elif Path(place).is_dir():
        return
    else:
        try:
            saved = EDMHeunScheduler.load_config(place, subfolder=part)  # reads what any scheduler saved
        except OSError:
            return
    if is_discrete(saved):
        trainable = "a stage whose `preconditioning` is 'edm' or 'variance_preserving': 'discrete' is sampled only"
        raise bad_argument("pretrained_model_name_or_path", name, trainable)
    trained = saved.get("preconditioning")
    if trained not in PRECONDITIONINGS:  # a scheduler that is not of this package
        return
    keys = ("sigma_data",) if trained == "edm" else ("sigma_data", "prediction_type", "beta_schedule")
    expected = {"preconditioning": trained, **{key: saved[key] for key in keys if key in saved}}
    if expected.get("beta_schedule") == NO_BETAS:  # a fast sampler, which needs none
        del expected["beta_schedule"]
    for key, value in expected.items():
        if getattr(config, key) != value:
            raise ValueError(
                f"`{key}` is {getattr(config, key)!r}, but '{name}' was trained with {value!r}: set it to that."
            )
