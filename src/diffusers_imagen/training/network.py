"""The network of a run: made, and set up for training."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate.utils import DistributedType
from diffusers import AutoModel, DiffusionPipeline

from ..models import ImagenUNetModel
from ..models.growing import change_layers, grow_unet
from ..models.presets import create_unet
from ..models.unet_base import ConditionalUNet
from ..pipelines.stages import missing_weights
from ..utils.arguments import shown
from ..utils.errors import describe_fault
from ..utils.files import read_json_object
from .config import TrainingConfig


DROPOUT_SEED = 33  # a word after the run's seed, unlike those of its data and steps


@contextmanager
def fresh_weights(seed: int) -> Iterator[None]:
    """Weights that are drawn inside are those of a seed; the global generator, which layers draw from, gets its state
    back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def make_unet(config: TrainingConfig) -> ConditionalUNet:
    """The network to train, set to the resolution that it is trained at. What it has of fresh weights, all or those of
    levels and blocks that were added, `config.seed` decides.

    Raises:
        ValueError: If there is none, or the configuration changes one whose kind cannot be changed.
    """
    with fresh_weights(config.seed):
        unet = start_network(config)
        if (config.grow or config.layers_per_block) and not isinstance(unet, ImagenUNetModel):
            argument = "grow" if config.grow else "layers_per_block"
            raise ValueError(
                f"`{argument}` is {getattr(config, argument)}, but only an ImagenUNetModel can be changed so, and "
                f"'{config.pretrained_model_name_or_path}' has an {type(unet).__name__}."
            )
        if config.grow:
            unet = grow_unet(unet)
        if config.layers_per_block:
            unet = change_layers(unet, config.layers_per_block)
    return unet.at_resolution(config.resolution)


def start_network(config: TrainingConfig) -> ConditionalUNet:
    """The network that the configuration names, before it is changed."""
    if config.preset is not None:
        return create_unet(config.preset)
    if config.model_config_name_or_path is not None:
        return unet_of_config(config)
    return load_unet(config.pretrained_model_name_or_path, find_network(config))


def find_network(config: TrainingConfig) -> str | None:
    """The subfolder of the network that a run begins with: of a cascade that of the stage which the resolutions name,
    of a single stage `unet`; None if the name is that of the network itself.

    Raises:
        ValueError: If a cascade has no such stage, or its model_index.json is malformed.
    """
    name = config.pretrained_model_name_or_path or config.model_config_name_or_path
    if (Path(name) / "config.json").is_file():
        return None
    parts = load_index(name)
    if "base_unet" not in parts:
        return "unet"
    wanted = "base_unet" if config.low_resolution is None else f"sr{config.resolution}_unet"
    stages = [
        part
        for part, kind in parts.items()
        if re.fullmatch(r"(base|sr\d+)_unet", part) and isinstance(kind, list) and kind[:1] != [None]
    ]
    if wanted not in stages:
        raise ValueError(
            f"`resolution` is {config.resolution}, but the cascade '{name}' has no {wanted} among {stages}: name one of "
            "its stages by `resolution` and `low_resolution`."
        )
    return wanted


def load_index(name: str) -> dict[str, Any]:
    """What a pipeline's model_index.json says; nothing for a stage that has none."""
    if Path(name).is_dir():
        index = Path(name) / DiffusionPipeline.config_name
        return read_json_object(index) if index.exists() else {}
    try:
        return DiffusionPipeline.load_config(name)
    except OSError:
        return {}


def unet_of_config(config: TrainingConfig) -> ConditionalUNet:
    """A network with fresh weights, of `config.model_config_name_or_path`.

    Raises:
        ValueError: If there is none, or none that this loop trains.
    """
    name = config.model_config_name_or_path
    try:
        found = ConditionalUNet.load_config(name, subfolder=find_network(config))
    except Exception as error:
        reason = describe_fault(error)
        raise ValueError(f"`model_config_name_or_path` is '{name}', which has no config.json: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"`model_config_name_or_path` is '{name}', whose config.json holds no object.")
    network_class = getattr(diffusers, str(found.get("_class_name")), None)
    if not (isinstance(network_class, type) and issubclass(network_class, ConditionalUNet)):
        raise ValueError(
            f"`model_config_name_or_path` is '{name}', which is of {found.get('_class_name')}, but should be of "
            "ImagenUNetModel or EfficientUNetModel."
        )
    try:
        return network_class.from_config(found)
    except (TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"`model_config_name_or_path` is '{name}', of which no network can be made: {describe_fault(error)}"
        ) from error


def load_unet(name: str, subfolder: str | None = "unet") -> ConditionalUNet:
    """A network in a folder, or of a repository on the Hub.

    Raises:
        ValueError: If there is none.
    """
    if Path(name).is_dir() and not (Path(name) / (subfolder or "") / "config.json").is_file():
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', which has no {subfolder or '.'}/config.json: give a stage, a "
            "cascade or the folder of a network."
        )
    try:
        unet = AutoModel.from_pretrained(name, subfolder=subfolder)  # knows our classes: they are registered
    except Exception as error:  # whatever is in its files
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', which has no network that can be loaded: "
            f"{describe_fault(error)}"
        ) from error
    if not isinstance(unet, ConditionalUNet):
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', which has an {type(unet).__name__}, but should have an "
            "ImagenUNetModel or EfficientUNetModel."
        )
    missing = missing_weights(unet)
    if missing:
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{name}', whose network lacks {len(missing)} weights, {missing[0]} among "
            "them: it was saved by another version, or is not complete."
        )
    return unet


def check_finite(unet: ConditionalUNet, name: str | None = None) -> None:
    """Refuses a network that cannot be trained, because a weight is not finite.

    Args:
        unet (`ConditionalUNet`): The network.
        name (`str`, *optional*): Where it is from.

    Raises:
        ValueError: If one is not.
    """
    wrong = [key for key, value in unet.state_dict().items() if not value.isfinite().all()]
    if wrong:
        which = "The network" if name is None else f"`pretrained_model_name_or_path` is '{name}', whose network"
        raise ValueError(
            f"{which} has {len(wrong)} weights that are not finite, {wrong[0]} among them: its training diverged, or "
            "the file is damaged."
        )


@contextmanager
def seeded_dropout(unet: torch.nn.Module, *words: int) -> Iterator[None]:
    """What layers of dropout draw inside belongs to a step: they draw from the global generators, which get their state
    back. Nothing where there are none."""
    if not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in unet.modules()):
        yield
        return
    device = next(unet.parameters()).device
    seed = int(np.random.SeedSequence(words[0], spawn_key=(DROPOUT_SEED, *words[1:])).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def choose_attention(unet: ConditionalUNet, config: TrainingConfig) -> None:
    """Takes the attention that the configuration names.

    Raises:
        ValueError: If diffusers has none of that name, or it needs what is not installed.
    """
    if config.attention_backend is None:
        return
    try:
        unet.set_attention_backend(config.attention_backend)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"`attention_backend` is {shown(config.attention_backend)}: {describe_fault(error)}"
        ) from error


def prepare_network(
    unet: ConditionalUNet, config: TrainingConfig, distributed_type: DistributedType
) -> ConditionalUNet:
    """Sets the network up for training, in place."""
    unet.train()
    if config.channels_last and distributed_type != DistributedType.FSDP:  # whose shards have to be contiguous
        unet.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.torch_compile:
        unet.compile()  # in place: no `_orig_mod.` in the names of saved weights
    return unet
