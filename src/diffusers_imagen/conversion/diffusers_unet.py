"""Shared code for converting diffusers' U-Nets: complete configurations, names of blocks, and assignment of weights."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..models.config_checks import MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, check_integers, per_level
from ..utils.arguments import bad_argument, check_choice, shown


# Supported block types, and whether they have attention.
DOWN_BLOCKS = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}
UP_BLOCKS = {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True}

# Modules of every network, and their names in this package; `level_modules` has those of the levels.
MODULES = {
    "conv_in": "conv_in",
    "time_embedding": "time_embedding.mlp",
    "mid_block.resnets.0": "mid_blocks.0.resnets.0",
    "mid_block.resnets.1": "mid_blocks.1.resnets.0",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}


def defaults_of(network_class: type[nn.Module]) -> dict[str, Any]:
    """Return the default configuration of a network class."""
    parameters = inspect.signature(network_class.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def complete_config(config: Any, network_class: type[nn.Module]) -> dict[str, Any]:
    """Complete a configuration with defaults, without diffusers' metadata; raise ValueError if it is of another class."""
    if not isinstance(config, Mapping):
        raise bad_argument("config", config, f"a configuration of {network_class.__name__}")
    name = config.get("_class_name", network_class.__name__)
    if name != network_class.__name__:
        raise bad_argument("_class_name", name, repr(network_class.__name__))
    entries = {name: value for name, value in config.items() if not name.startswith("_")}
    return {**defaults_of(network_class), **entries}


def check_fixed(config: dict[str, Any], fixed: dict[str, Any], free: Collection[str], family: str) -> None:
    """Raise ValueError for an entry that is not in `fixed` or differs from it, unless it is in `free`; names the entry."""
    for name, value in config.items():
        if name not in fixed:
            raise ValueError(f"`{name}` is {shown(value)}, but networks of {family} do not have it.")
        if name not in free and value != fixed[name]:
            raise bad_argument(name, value, f"{fixed[name]!r} in a network of {family}")


def check_levels(config: dict[str, Any]) -> None:
    """Check `block_out_channels`, `layers_per_block` and the types of the blocks, which must be mirrored."""
    channels, down, up = (config[name] for name in ("block_out_channels", "down_block_types", "up_block_types"))
    check_integers("block_out_channels", channels, 1, MAX_CHANNELS, (1, MAX_LEVELS))
    layers = per_level("layers_per_block", config["layers_per_block"], len(channels))
    check_integers("layers_per_block", layers, 1, MAX_LAYERS, (1, MAX_LEVELS))
    for name, kinds, blocks in (("down_block_types", down, DOWN_BLOCKS), ("up_block_types", up, UP_BLOCKS)):
        if not isinstance(kinds, (list, tuple)) or len(kinds) != len(channels):
            raise bad_argument(name, kinds, f"a list of {len(channels)}, one for each of `block_out_channels`")
        for kind in kinds:
            check_choice(name, kind, tuple(blocks))
    if [UP_BLOCKS[kind] for kind in up[::-1]] != [DOWN_BLOCKS[kind] for kind in down]:
        raise bad_argument("up_block_types", up, "with attention at the levels at which `down_block_types` has it")


def level_modules(config: dict[str, Any]) -> dict[str, str]:
    """Map the names of the levels' modules to their names in this package's network."""
    layers = per_level("layers_per_block", config["layers_per_block"], len(config["block_out_channels"]))
    return block_names("down", layers) | block_names("up", [count + 1 for count in layers[::-1]])


def block_names(way: str, layers: Sequence[int]) -> dict[str, str]:
    """Map the modules of "down" or "up": diffusers numbers layers per level, this package numbers all blocks."""
    names, block = {}, 0
    for level, count in enumerate(layers):
        for layer in range(count):
            names[f"{way}_blocks.{level}.resnets.{layer}"] = f"{way}_blocks.{block}.resnets.0"
            names[f"{way}_blocks.{level}.attentions.{layer}"] = f"{way}_blocks.{block}.attention"
            block += 1
        names[f"{way}_blocks.{level}.{way}samplers.0"] = f"{way}samplers.{level}"
    return names


def renamed(names: Sequence[str], modules: Mapping[str, str], attention: Mapping[str, str]) -> dict[str, str]:
    """Map each weight's name to that in this package's network, by its module and by its layer within attention."""
    new_names = {}
    for name in names:
        module = max((module for module in modules if name.startswith(f"{module}.")), key=len)
        layer, _, rest = name.removeprefix(f"{module}.").partition(".")
        layer = attention.get(layer, layer) if ".attentions." in module else layer
        new_names[name] = ".".join(filter(None, (modules[module], layer, rest)))
    return new_names


def take_weights(network: Any, source: nn.Module | Mapping[str, torch.Tensor], names: Mapping[str, str]) -> Any:
    """Assign the weights of another network to one on the meta device, without a copy; `names` maps theirs to its own.

    Raises:
        ValueError: For a weight that is missing, unexpected or of another shape; names it as in the source.
    """
    weights = source.state_dict() if isinstance(source, nn.Module) else source
    for name in [*names, *weights]:
        if name not in weights:
            raise ValueError(f"The weights have no `{name}`, which a network of this configuration has.")
        if name not in names:
            raise ValueError(f"The weights have `{name}`, which no network of this configuration has.")
    shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    for name, new_name in names.items():
        if tuple(weights[name].shape) != shapes[new_name]:
            raise ValueError(
                f"`{name}` has shape {tuple(weights[name].shape)}, but should have {shapes[new_name]} by the configuration."
            )
    network.load_state_dict({names[name]: weight for name, weight in weights.items()}, assign=True)
    return network.train(source.training if isinstance(source, nn.Module) else False)


def as_tuple(value: Any) -> Any:
    """Convert a list from a configuration file to a tuple, recursively."""
    return tuple(value) if isinstance(value, list) else value
