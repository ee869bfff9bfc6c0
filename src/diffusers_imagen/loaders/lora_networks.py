"""Modifications of networks by adapters: rollback after errors, hotswapping, and weights per block."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..models.interface import StageNetwork
from ..utils.arguments import is_finite
from .lora_conversion import Adapter, configuration, matching, plain_name


if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

BEFORE_FUSING = "_scaling_before_fusing"  # attribute of layers with merged adapters
BLOCKS = {"down": "down_blocks", "mid": "mid_blocks", "up": "up_blocks"}  # diffusers' names


@contextmanager
def restored_after_error(unets: list[StageNetwork]) -> Iterator[None]:
    """Context manager that restores the networks' layers, adapters and trainable weights on error."""
    before = [Snapshot(unet) for unet in unets]
    try:
        yield
    except BaseException:
        for snapshot in before:
            snapshot.restore()
        raise


class Snapshot:
    """Snapshot of the state that loading an adapter changes in a network, except the values of weights."""

    def __init__(self, unet: StageNetwork):
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.unet = unet
        self.own = {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(unet).items()
            if name in ("peft_config", "_hf_peft_config_loaded", "_prepare_lora_hotswap_kwargs")
        }
        self.trainable = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
        self.children = [(module._modules, dict(module._modules)) for module in unet.modules()]
        # per adapter: scaling, rank, whether it is active, ...
        self.layers = [
            (module, {name: copied(value) for name, value in vars(module).items() if not name.startswith("_modules")})
            for module in unet.modules()
            if isinstance(module, BaseTunerLayer)
        ]

    def restore(self) -> None:
        for children, before in self.children:
            children.clear()
            children.update(before)
        for module, before in self.layers:
            vars(module).update(before)
        for parameter, trainable in self.trainable:
            parameter.requires_grad_(trainable)
        for name in ("peft_config", "_hf_peft_config_loaded", "_prepare_lora_hotswap_kwargs"):
            self.unet.__dict__.pop(name, None)
        self.unet.__dict__.update(self.own)


def copied(value: Any) -> Any:
    """Return a copy of a mutable value, else the value itself."""
    return value.copy() if type(value) in (dict, list, set) else value


def own_scaling(layer: "LoraLayer", adapter_name: str) -> float:
    """Return the scaling of a layer's update at weight 1."""
    rank = layer.r[adapter_name]
    return layer.lora_alpha[adapter_name] / (math.sqrt(rank) if layer.use_rslora.get(adapter_name) else rank)


def adapted_layers(unet: StageNetwork, adapter_name: str) -> "dict[str, LoraLayer]":
    """Return the layers that have an adapter of this name."""
    return {name: layer for name, layer in unet.named_modules() if adapter_name in getattr(layer, "lora_alpha", {})}


def fused_adapters(unets: "dict[str, StageNetwork]") -> dict[str, list[str]]:
    """Return the adapters that are merged into the weights, by component; without components that have none."""
    found = {
        component: {name for layer in unet.modules() for name in getattr(layer, "merged_adapters", ())}
        for component, unet in unets.items()
    }
    return {component: sorted(names) for component, names in found.items() if names}


def lora_layers(unets: "Iterable[StageNetwork]") -> "list[LoraLayer]":
    """Return the layers of networks that have adapters."""
    modules: Iterable[Any] = (module for unet in unets for module in unet.modules())
    return [module for module in modules if isinstance(getattr(module, "scaling", None), dict)]


@contextmanager
def scaled_to_fuse(layers: "list[LoraLayer]", scale: float, adapter_names: list[str] | None) -> Iterator[None]:
    """Context manager in which adapters are merged with weights that are multiplied by `scale`.

    Merged adapters keep these weights, with which peft subtracts them again, until `restore_scaling`. In diffusers the
    active adapters are scaled, even if they are merged already or others are to be merged, and remain so.
    """
    for layer in layers:
        names = set(layer.active_adapters if adapter_names is None else adapter_names)
        before = {name: layer.scaling[name] for name in names & {*layer.scaling} - {*layer.merged_adapters}}
        layer.scaling.update({name: value * scale for name, value in before.items()})
        vars(layer).setdefault(BEFORE_FUSING, {}).update(before)
    try:
        yield
    except BaseException:
        restore_scaling(layers)
        raise


def restore_scaling(layers: "list[LoraLayer]") -> None:
    """Give adapters that are not merged the weights that they had before `scaled_to_fuse`."""
    for layer in layers:
        before = vars(layer).get(BEFORE_FUSING, {})
        for name in before.keys() - {*layer.merged_adapters}:
            value = before.pop(name)
            if name in layer.scaling:
                layer.scaling[name] = value


def describe_adapter(unet: StageNetwork, adapter_name: str) -> dict[str, Any]:
    """Return the configuration to save with an adapter: peft's, with the actual ranks and scaling of the layers.

    `enable_lora_hotswap` and hotswapping change the ranks, but not the scaling.
    """
    config = unet.peft_config[adapter_name].to_dict()
    ranks, alphas, told = {}, {}, {}
    for name, layer in adapted_layers(unet, adapter_name).items():
        if adapter_name not in layer.lora_A:  # embeddings
            return config
        rank, plain = layer.lora_A[adapter_name].weight.shape[0], plain_name(name)
        same = rank == layer.r[adapter_name]
        scaling = own_scaling(layer, adapter_name)
        ranks[plain] = rank
        alphas[plain] = (
            layer.lora_alpha[adapter_name] if same else scaling * (rank**0.5 if config["use_rslora"] else rank)
        )
        told[plain] = [
            matching(config[f"{kind}_pattern"], plain, config[default])
            for kind, default in (("rank", "r"), ("alpha", "lora_alpha"))
        ]
    if all(told[name] == [ranks[name], alphas[name]] for name in ranks):
        return config
    return {**config, **configuration(ranks, alphas)}


def check_hotswap(component: str, unet: StageNetwork, adapter_name: str, adapter: Adapter) -> None:
    """Raise ValueError unless an adapter can replace one in a network."""
    layers = adapted_layers(unet, adapter_name)
    config = unet.peft_config[adapter_name]
    missing = [name for name in adapter.config["target_modules"] if name not in layers]
    if missing:
        raise ValueError(f"`hotswap` is True, but '{adapter_name}' does not adapt {component}.{missing[0]}.")
    if any(getattr(config, name, False) or adapter.config[name] for name in ("use_dora", "lora_bias")):
        raise ValueError("`hotswap` is True, but DoRA and adapters with biases cannot be swapped: unload the old one.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"`hotswap` is True, but '{adapter_name}' is fused: call `unfuse_lora` first.")
    if any(own_scaling(layer, adapter_name) == 0 for layer in layers.values()):
        raise ValueError(f"`hotswap` is True, but '{adapter_name}' has lora_alpha 0: unload it instead.")


def hotswap_adapter(unet: StageNetwork, adapter_name: str, adapter: Adapter, low_cpu_mem_usage: bool) -> None:
    """Replace the weights of a loaded adapter, after `check_hotswap`.

    The old scaling is kept, because saving and weighting depend on it; the new weights compensate for it.
    """
    layers, old, new = adapted_layers(unet, adapter_name), unet.peft_config[adapter_name], adapter.config
    state_dict = dict(adapter.state_dict)
    for name in new["target_modules"]:
        rank = new["rank_pattern"].get(f"^{name}", new["r"])
        alpha = new["alpha_pattern"].get(f"^{name}", new["lora_alpha"])
        factor = alpha / (math.sqrt(rank) if new["use_rslora"] else rank) / own_scaling(layers[name], adapter_name)
        if factor != 1:
            state_dict[f"{name}.lora_B.weight"] = state_dict[f"{name}.lora_B.weight"] * factor
    kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout")
    unet.load_lora_adapter(
        state_dict,
        prefix=None,
        adapter_name=adapter_name,
        metadata={**new, **{name: getattr(old, name) for name in kept}},
        hotswap=True,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    for layer in layers.values():  # peft supports one scaling for all
        scaling = own_scaling(layer, adapter_name)
        if isinstance(layer.scaling[adapter_name], torch.Tensor):  # in a network that may be compiled for it
            layer.scaling[adapter_name].fill_(scaling)
        else:
            layer.scaling[adapter_name] = scaling


def weights_by_layer(unet: StageNetwork, weights: dict[str, Any], component: str) -> dict[str, float]:
    """Return the weight of each adapted layer, 1 by default; names that are contained in others come first.

    Args:
        unet (`StageNetwork`): The network.
        weights (`dict`):
            By part of a layer's name, or in diffusers' form: `{"down": 0.5, "mid": 1, "up": {"block_1": 0.2}}`.
        component (`str`): The network's name, for messages.

    Raises:
        ValueError: If a weight is not a number, or no layer has the name.
    """
    flat: dict[str, float | Any] = {}
    for name, weight in weights.items():
        named = [name, *weight] if isinstance(weight, dict) else [name]
        if not all(isinstance(part, str) for part in named):
            raise ValueError(f"`adapter_weights` has {named} in {component}, but should have names of layers.")
        stem = BLOCKS.get(name, name)
        blocks = weight if isinstance(weight, dict) else {"": weight}
        flat |= {
            f"{stem}.{block.removeprefix('block_')}." if block else stem: value for block, value in blocks.items()
        }
    names = [f"{name}." for name, _ in unet.named_modules()]
    for name, weight in flat.items():
        if not is_finite(weight):
            raise ValueError(f"`adapter_weights` has {weight!r} for {component}.{name}, but should have a number.")
        if not any(name in layer for layer in names):
            raise ValueError(f"`adapter_weights` has {component}.{name}, but the network has no layer of that name.")
    layers = [name for name, layer in unet.named_modules() if hasattr(layer, "lora_alpha")]
    first = lambda layer: next((weight for name, weight in flat.items() if name in f"{layer}."), 1.0)  # noqa: E731
    return {layer: first(layer) for layer in sorted(layers, key=len, reverse=True)}
