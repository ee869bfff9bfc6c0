"""Creation of the network of a run, and its setup for training."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate.utils import DistributedType
from diffusers import AutoModel, DiffusionPipeline, UNet2DConditionModel

from ..conversion.deepfloyd import config_from_deepfloyd, unet_from_deepfloyd
from ..models import ImagenUNetModel
from ..models.growing import change_layers, grow_unet
from ..models.interface import StageNetwork
from ..models.presets import create_unet
from ..models.unet_base import ConditionalUNet
from ..pipelines.stage_table import STAGES
from ..pipelines.stages import missing_weights
from ..utils.arguments import class_of, shown
from ..utils.errors import describe_fault
from ..utils.files import read_json_object
from .config import TrainingConfig


OF_A_CASCADE = [kind.unet for kind in STAGES]
NETWORK_CLASSES = "ImagenUNetModel, EfficientUNetModel or a class passed to `register_network`"
THEIR_NETWORK = UNet2DConditionModel.__name__  # the class of DeepFloyd IF's networks in diffusers
DROPOUT_SEED = 33  # a word after the run's seed, different from those of its data and steps


@contextmanager
def fresh_weights(seed: int) -> Iterator[None]:
    """Context manager in which new weights are drawn with this seed; the state of the global generator, from which
    layers draw, is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def make_unet(config: TrainingConfig) -> StageNetwork:
    """Create or load the network to train, set to the training resolution. New weights, of the whole network or of
    added levels and blocks, are determined by `config.seed`.

    Raises:
        ValueError: If there is none, or its class does not support the configured change.
    """
    with fresh_weights(config.seed):
        unet = start_network(config)
        if not (config.grow or config.layers_per_block):
            return unet.at_resolution(config.resolution)
        if not isinstance(unet, ImagenUNetModel):
            argument = "grow" if config.grow else "layers_per_block"
            raise ValueError(
                f"`{argument}` is {getattr(config, argument)}, but only an ImagenUNetModel supports this, and "
                f"'{config.pretrained_model_name_or_path}' has a network {class_of(unet)}."
            )
        if config.grow:
            unet = grow_unet(unet)
        if config.layers_per_block:
            unet = change_layers(unet, config.layers_per_block)
    return unet.at_resolution(config.resolution)


def start_network(config: TrainingConfig) -> StageNetwork:
    """Create or load the configured network, before it is changed."""
    if config.preset is not None:
        return create_unet(config.preset)
    if config.model_config_name_or_path is not None:
        name = config.model_config_name_or_path
        return fresh_unet("model_config_name_or_path", name, find_network(config), config.revision)
    name = str(config.pretrained_model_name_or_path)
    return load_unet(name, find_network(config), **config.hub_options(name))


def find_network(config: TrainingConfig) -> str | None:
    """Return the subfolder of the network that a run starts from: in a cascade that of the stage with these sizes, in
    a single stage `unet`; None if the name is that of the network's own folder.

    A base stage can be trained at another resolution than its network's, a super-resolution stage cannot.

    Raises:
        ValueError: If a cascade has no such stage, or its model_index.json or a config.json is malformed.
    """
    argument = "pretrained_model_name_or_path" if config.pretrained_model_name_or_path else "model_config_name_or_path"
    name = getattr(config, argument)
    if (Path(name) / "config.json").is_file():
        return None
    index = load_index(name, config.revision)
    parts = [part for part in OF_A_CASCADE if has_part(index, part)]
    if not parts:
        return "unet"
    with torch.device("meta"):  # only their sizes are needed, without memory for weights
        networks = {part: fresh_unet(argument, name, part, config.revision) for part in parts}
    takes_low_res, below = config.low_resolution is not None, None
    for part, unet in networks.items():
        if unet.takes_low_res == takes_low_res and (unet.resolution == config.resolution or not takes_low_res):
            if takes_low_res and below is not None and config.low_resolution != below:
                raise ValueError(
                    f"`low_resolution` is {config.low_resolution}, but should be {below}, the resolution of the "
                    f"stage before `{part}` in the cascade '{name}'."
                )
            return part
        below = unet.resolution
    sizes = [f"{unet.resolution} {'with' if unet.takes_low_res else 'without'} one" for unet in networks.values()]
    raise ValueError(
        f"`resolution` is {config.resolution} and `low_resolution` {config.low_resolution}, but should be those of a "
        f"stage of the cascade '{name}': {', '.join(sizes)}."
    )


def load_index(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return a pipeline's model_index.json; empty for a stage without it."""
    if Path(name).is_dir():
        index = Path(name) / DiffusionPipeline.config_name
        return read_json_object(index) if index.exists() else {}
    try:
        return DiffusionPipeline.load_config(name, revision=revision)
    except OSError:
        return {}


def has_part(index: dict[str, Any], part: str) -> bool:
    """Return whether a pipeline's model_index.json names a component that is not left out."""
    return isinstance(index.get(part), list) and index[part][:1] != [None]


def fresh_unet(argument: str, name: str, subfolder: str | None, revision: str | None = None) -> StageNetwork:
    """Create a network with new weights, from the config.json in a folder or on the Hub that an argument names.

    Raises:
        ValueError: If there is none, or the network is not supported.
    """
    what = f"`{argument}` is '{name}', "
    try:
        found = ConditionalUNet.load_config(name, subfolder=subfolder, revision=revision)
    except Exception as error:
        raise ValueError(f"{what}which has no config.json: {describe_fault(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what}whose config.json is not an object.")
    try:
        return find_network_class(what, found).from_config(found)
    except (TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{what}from which no network can be created: {describe_fault(error)}") from error


def find_network_class(what: str, config: dict[str, Any]) -> type[StageNetwork]:
    """Return the class that a config.json names.

    Raises:
        ValueError: If there is none; the message begins with `what`.
    """
    network_class = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(network_class, type) and issubclass(network_class, StageNetwork)):
        raise ValueError(f"{what}whose network class is {config.get('_class_name')}, but should be {NETWORK_CLASSES}.")
    return network_class


def load_unet(name: str, subfolder: str | None = "unet", **hub: str) -> StageNetwork:
    """Load a network from a folder, or from a Hub repository with `revision` and `variant` in `hub`.

    Raises:
        ValueError: If there is none.
    """
    what = f"`pretrained_model_name_or_path` is '{name}', "
    if Path(name).is_dir() and not (Path(name) / (subfolder or "") / "config.json").is_file():
        raise ValueError(
            f"{what}which has no {subfolder or '.'}/config.json: pass a stage, a cascade or the folder of a network."
        )
    try:
        config = ConditionalUNet.load_config(name, subfolder=subfolder, revision=hub.get("revision"))
    except Exception as error:
        raise ValueError(f"{what}which has no network that can be loaded: {describe_fault(error)}") from error
    if isinstance(config, dict) and config.get("_class_name") == THEIR_NETWORK:
        return load_deepfloyd(what, name, subfolder, config, **hub)
    if isinstance(config, dict) and "_class_name" in config:
        find_network_class(what, config)
    try:
        unet = AutoModel.from_pretrained(name, subfolder=subfolder, **hub)  # our classes are registered
    except Exception as error:  # for any content of its files
        raise ValueError(f"{what}which has no network that can be loaded: {describe_fault(error)}") from error
    if not isinstance(unet, StageNetwork):
        raise ValueError(f"{what}whose network class is {type(unet).__name__}, but should be {NETWORK_CLASSES}.")
    if getattr(unet, "peft_config", None):  # the stage would be saved with the layers of the adapter
        raise ValueError(
            f"{what}whose network has a LoRA adapter: pass the network that the adapter was trained on, or merge the two "
            "by `fuse_lora()`, `unload_lora_weights()` and `save_pretrained` of the pipeline."
        )
    refuse_missing(what, missing_weights(unet))
    return unet


def load_deepfloyd(what: str, name: str, subfolder: str | None, config: dict[str, Any], **hub: str) -> StageNetwork:
    """Load a network of DeepFloyd IF in diffusers' format, with this configuration, as an `ImagenUNetModel`.

    Raises:
        ValueError: If it is another network, or cannot be loaded; the message begins with `what`.
    """
    try:
        config_from_deepfloyd(config)  # before weights are downloaded
        theirs = UNet2DConditionModel.from_pretrained(name, subfolder=subfolder, **hub)
        refuse_missing(what, missing_weights(theirs))
        return unet_from_deepfloyd(theirs)
    except Exception as error:  # for any content of its files
        if str(error).startswith(what):
            raise
        raise ValueError(f"{what}which has no network that can be loaded: {describe_fault(error)}") from error


def refuse_missing(what: str, missing: list[str]) -> None:
    """Raise ValueError, beginning with `what`, if a network lacks weights."""
    if missing:
        raise ValueError(
            f"{what}whose network lacks {len(missing)} weights, such as {missing[0]}: it was saved by another "
            "version, or is incomplete."
        )


def check_finite(unet: StageNetwork, name: str | None = None) -> None:
    """Raise an error for a network with weights that are not finite.

    Args:
        unet (`StageNetwork`): The network.
        name (`str`, *optional*): Its folder or Hub id.

    Raises:
        ValueError: If a weight is not finite.
    """
    wrong = [key for key, value in unet.state_dict().items() if not value.isfinite().all()]
    if wrong:
        which = "The network" if name is None else f"`pretrained_model_name_or_path` is '{name}', whose network"
        raise ValueError(
            f"{which} has {len(wrong)} weights that are not finite, such as {wrong[0]}: its training diverged, or "
            "the file is damaged."
        )


@contextmanager
def seeded_dropout(unet: torch.nn.Module, *words: int) -> Iterator[None]:
    """Context manager in which dropout layers draw with a seed for the step from the global generators, whose state is
    restored. Does nothing if there is no dropout."""
    if not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in unet.modules()):
        yield
        return
    device = next(unet.parameters()).device
    seed = int(np.random.SeedSequence(words[0], spawn_key=(DROPOUT_SEED, *words[1:])).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def choose_attention(unet: StageNetwork, config: TrainingConfig) -> None:
    """Set the configured attention backend.

    Raises:
        ValueError: If diffusers has no backend of this name, or its package is not installed.
    """
    if config.attention_backend is None:
        return
    try:
        unet.set_attention_backend(config.attention_backend)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"`attention_backend` is {shown(config.attention_backend)}: {describe_fault(error)}"
        ) from error


def prepare_network(unet: StageNetwork, config: TrainingConfig, distributed_type: DistributedType) -> StageNetwork:
    """Set up the network for training, in place."""
    unet.train()
    if config.channels_last and distributed_type != DistributedType.FSDP:  # which requires contiguous shards
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does not declare it
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.torch_compile:
        unet.compile()  # in place, so that the names of saved weights do not change
    return unet
