"""Conversion and checking of LoRA weights from the formats of diffusers, peft and kohya's scripts for peft."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from ..utils.arguments import is_finite
from .lora_names import diffusers_names, idle_layers


logger = logging.get_logger(__name__)

StateDict = dict[str, torch.Tensor]
Layer = nn.Linear | nn.Conv2d  # layers that support adapters

BARE = ""  # component of weights that do not name one
MAX_RANK = 4096
MAX_PATTERNS = 4096
WRAPPER = "_orig_mod"  # prefix added by torch.compile
DOWN, UP, ALPHA, MAGNITUDE, BIAS = "down", "up", "alpha", "magnitude", "bias"
PARTS = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), DOWN),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), UP),
    "alpha": ALPHA,
    "lora_magnitude_vector": MAGNITUDE,
}
KEY = re.compile(
    rf"(?P<layer>.+?)\.(?P<part>{'|'.join(map(re.escape, PARTS))})"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<kind>weight|bias))?"
)
# diffusers before 0.18
OLD_KEY = re.compile(
    r"(?P<block>.+?)(?:\.processor)?\.(?P<layer>to_[a-z]+|add_[kv]_proj)_lora\.(?P<part>down|up)\.weight"
)
OTHER_METHODS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.boft_": "BOFT",
    r"\.ia3_": "IA3",
    r"\.dora_scale$": "LyCORIS's DoRA",
    r"\.lora_mid\b": "Tucker-decomposed LoCon",
    r"\.lora_embedding_": "LoRA of embeddings",
    r"\.diff(_b)?$": "full differences of weights",
    r"\.base_layer\b": "the network's own weights",
    r"\bmodules_to_save\b": "whole layers",
}
# peft settings that change the meaning of the weights, or the weights on which they were trained
UNSUPPORTED_SETTINGS = (
    *("fan_in_fan_out", "layer_replication", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "megatron_config", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config"),
)
# start from weights other than the network's
UNSUPPORTED_BEGINNINGS = ("pissa", "olora", "corda", "loftq", "lora_ga", "lora-ga")


@dataclass
class Update:
    """Adapter weights of a layer by part, each with its original key."""

    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.parts[DOWN].shape[0]


@dataclass
class Adapter:
    """Weights and configuration of a network's adapter, in peft's format."""

    state_dict: StateDict
    config: dict[str, Any]


def plain_name(name: str) -> str:
    """Return a key or a module's name without torch.compile's prefix."""
    return ".".join(part for part in name.split(".") if part != WRAPPER)


def split_key(key: str, components: list[str]) -> tuple[str, str, str]:
    """Split a key into component, layer and part; the component is `BARE` if the key has none."""
    name = plain_name(key).removeprefix("module.").removeprefix("base_model.model.")
    method = next((method for pattern, method in OTHER_METHODS.items() if re.search(pattern, name)), None)
    if method is not None:
        raise ValueError(f"The weights have the key '{key}', which is of {method}; only LoRA and DoRA can be loaded.")
    component, _, rest = name.partition(".")
    if component.startswith("text_encoder") or name.startswith("lora_te"):
        raise ValueError(
            f"The weights have the key '{key}', which adapts a text encoder; only networks can be adapted."
        )
    if component not in components:
        component, rest = BARE, name
    old, match = OLD_KEY.fullmatch(rest), KEY.fullmatch(rest)
    if old:
        layer = "to_out.0" if old["layer"] == "to_out" else old["layer"]
        return component, f"{old['block']}.{layer}", old["part"]
    if match is None or (match["kind"] == "bias" and PARTS[match["part"]] != UP):
        raise ValueError(f"The weights have the key '{key}', which is not a LoRA key.")
    return component, match["layer"], BIAS if match["kind"] == "bias" else PARTS[match["part"]]


def group_weights(state_dict: StateDict, components: list[str]) -> dict[str, dict[str, Update]]:
    """Group weights by component and layer, as named by their keys; raise ValueError for duplicates."""
    updates: dict[str, dict[str, Update]] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise ValueError(f"The weights have the key {key!r}, but keys should be strings.")
        component, layer, part = split_key(key, components)
        if part == ALPHA and is_finite(value):
            value = torch.tensor(float(value))
        if type(value) not in (torch.Tensor, nn.Parameter) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"The weights have a {describe_value(value)} under '{key}', but should have a tensor.")
        update = updates.setdefault(component, {}).setdefault(layer, Update())
        if part in update.parts:
            raise ValueError(
                f"The weights have both '{update.keys[part]}' and '{key}', only one of which can be loaded."
            )
        update.parts[part], update.keys[part] = value.detach(), key
    return updates


def describe_value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor on {value.device.type} of layout {value.layout}"
    return type(value).__name__


def adaptable_layers(unet: nn.Module) -> dict[str, tuple[str, Layer]]:
    """Return the layers that support adapters: by plain name, the name in the network and the layer without adapters."""
    layers: dict[str, tuple[str, Layer]] = {}
    inside: list[str] = []
    for name, module in unet.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if hasattr(module, "base_layer"):  # already has adapters
            inside.append(f"{name}.")
            module = module.get_base_layer()
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            layers[plain_name(name)] = (name, module)
    return layers


def named_layers(
    component: str, unet: nn.Module, names: Mapping[str, str], updates: dict[str, Update]
) -> dict[str, tuple[str, Layer]]:
    """Return `adaptable_layers` by the names used in updates: the network's own, or diffusers' (`diffusers_names`).

    A few layers of residual blocks have the name of another layer in diffusers: diffusers' names take precedence, with
    a warning if all names are ambiguous.
    """
    own = adaptable_layers(unet)
    theirs = {name: own[ours] for name, ours in names.items() if ours in own}
    found = [{layer: matches(layers, layer) for layer in updates} for layers in (theirs, own)]
    counts = [sum(map(bool, matched.values())) for matched in found]
    if counts[1] > counts[0] or not theirs:
        return own
    if counts[0] == counts[1] == len(updates):
        both = [(layer, name, found[1][layer]) for layer, name in found[0].items()]
        strays = [layer for layer, name, other in both if theirs[name[0]][0] != own[other[0]][0]]
        if strays:
            logger.warning(
                f"The LoRA weights change {component}.{strays[0]}, which diffusers and this package both have as a name, "
                f"of different layers: it is taken for diffusers', which is {theirs[found[0][strays[0]][0]][0]} here."
            )
    return theirs


def without_idle(component: str, idle: set[str], updates: dict[str, Update]) -> dict[str, Update]:
    """Drop updates of unused layers that the network lacks, with a warning; see `idle_layers`."""
    kept = {layer: update for layer, update in updates.items() if layer not in idle}
    if kept and len(kept) < len(updates):
        first = next(layer for layer in updates if layer in idle)
        logger.warning(
            f"The LoRA weights of {component} for {len(updates) - len(kept)} layers as {first} are left out: "
            "cross-attention reads no keys and values of the image."
        )
    return kept or updates


def make_adapter(
    component: str,
    unet: nn.Module,
    updates: dict[str, Update],
    config: dict[str, Any] | None,
    names: Mapping[str, str] | None = None,
) -> Adapter:
    """Convert updates to weights and configuration for peft.

    Args:
        component (`str`): The network's name, for messages.
        unet (`nn.Module`): The network, which is not modified.
        updates (`dict[str, Update]`):
            By layer, named as in the network, in diffusers for DeepFloyd IF networks, or in kohya's scripts, where
            dots are underscores.
        config (`dict`, *optional*): Configuration of the weights; without it, lora_alpha is in the keys or the rank.
        names (`Mapping[str, str]`, *optional*): New names of the layers, by their names in the network.

    Raises:
        ValueError: If the weights are incomplete, not finite or do not match the network, or the configuration does
            not match the weights.
    """
    theirs = diffusers_names(unet)
    updates = without_idle(component, idle_layers(theirs), updates)
    layers = named_layers(component, unet, theirs, updates)
    named = {place_of(component, layers, layer, update): update for layer, update in updates.items()}
    if len(named) != len(updates):
        raise ValueError(f"The weights for {component} change a layer twice, under its name and under kohya's.")
    settings = Settings.read(config or {}, component)
    state_dict, ranks, alphas = {}, {}, {}
    for layer, update in named.items():
        name, module = layers[layer]
        name = name if names is None else names[plain_name(name)]
        for key, value in fit(f"{component}.{layer}", module, update).items():
            state_dict[f"{name}.{key}"] = value
        ranks[name] = settings.checked_rank(layer, update)
        alphas[name] = settings.alpha(layer, update)
    extras = {}
    for setting, part in (("use_dora", MAGNITUDE), ("lora_bias", BIAS)):
        having = [layer for layer, update in named.items() if part in update.parts]
        extras[setting] = bool(having)
        if having and len(having) < len(named) or (config or {}).get(setting, bool(having)) != bool(having):
            raise ValueError(f"The weights for {component} have `{part}` in {len(having)} of {len(named)} layers.")
    return Adapter(state_dict, {**configuration(ranks, alphas), **extras, **settings.kept})


def place_of(component: str, layers: dict[str, tuple[str, Layer]], layer: str, update: Update) -> str:
    """Return the plain name of the layer that a key refers to; raise ValueError if it is ambiguous or missing."""
    found = matches(layers, layer)
    if len(found) == 1:
        return found[0]
    key = next(iter(update.keys.values()))
    if found:
        raise ValueError(f"The weights have the key '{key}', which may be of {' or '.join(found)} in {component}.")
    raise ValueError(
        f"The LoRA weights change {component}.{layer}, which this network does not have as a layer that can be adapted "
        f"(key '{key}')."
    )


def matches(layers: dict[str, tuple[str, Layer]], layer: str) -> list[str]:
    """Return the plain names that match a name, possibly in kohya's format."""
    if layer in layers:
        return [layer]
    flat = layer.removeprefix("lora_unet_")
    return [name for name in layers if "." not in layer and name.replace(".", "_") == flat]


def fit(layer: str, module: Layer, update: Update) -> StateDict:
    """Return the parts of an update in the shapes of peft's layer for `module`, by suffix of their keys."""
    parts, keys = update.parts, update.keys
    missing = [part for part in (DOWN, UP) if part not in parts]
    if missing:
        raise ValueError(
            f"The LoRA weights for {layer} lack the factor {missing[0]} (key '{next(iter(keys.values()))}')."
        )
    down, up = parts[DOWN], parts[UP]
    window: tuple[int, ...] = (1, 1)
    if isinstance(module, nn.Linear):
        width_in, width_out = module.in_features, module.out_features
    else:
        width_in, width_out, window = module.in_channels // module.groups, module.out_channels, module.kernel_size
    for part, value in ((DOWN, down), (UP, up)):
        if value.ndim not in (2, 4) or 0 in value.shape:
            raise ValueError(f"The LoRA weights have the shape {tuple(value.shape)} under '{keys[part]}'.")
    window_of = lambda value: tuple(value.shape[2:]) or (1, 1)  # noqa: E731
    for found, width in ((down.shape[1], width_in), (up.shape[0], width_out)):
        if found != width:
            raise ValueError(f"The LoRA weights for {layer} have width {found}, but the layer has {width}.")
    if window_of(down) != window or window_of(up) != (1, 1):
        raise ValueError(
            f"The LoRA weights for {layer} have windows of {window_of(down)} and {window_of(up)}, but the layer has "
            f"{window}, and the second should be (1, 1)."
        )
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"The LoRA weights for {layer} have factors of ranks {down.shape[0]} and {up.shape[1]}.")
    if down.shape[0] > MAX_RANK:
        raise ValueError(f"The LoRA weights for {layer} have rank {down.shape[0]}, but it should be up to {MAX_RANK}.")
    fitted = {"lora_A.weight": down.reshape(-1, width_in, *window), "lora_B.weight": up.reshape(width_out, -1, 1, 1)}
    if isinstance(module, nn.Linear):
        fitted = {key: value.flatten(1) for key, value in fitted.items()}
    for part, key, shape in (
        (BIAS, "lora_B.bias", (width_out,)),
        (MAGNITUDE, "lora_magnitude_vector", (width_out,) if isinstance(module, nn.Linear) else (1, width_out, 1, 1)),
    ):
        if part in parts:
            if parts[part].numel() != width_out or max(parts[part].shape, default=1) != width_out:
                raise ValueError(
                    f"The LoRA weights have {tuple(parts[part].shape)} under '{keys[part]}', not {shape}."
                )
            fitted[key] = parts[part].reshape(shape)
    named = dict(zip(fitted, (keys[part] for part in (DOWN, UP, BIAS, MAGNITUDE) if part in parts)))
    return {key: as_precise(named[key], value, module) for key, value in fitted.items()}


def as_precise(key: str, value: torch.Tensor, module: Layer) -> torch.Tensor:
    """Convert to a finite floating-point tensor, at least as precise as the layer's weights, at most float32."""
    if not value.is_floating_point():
        raise ValueError(f"The LoRA weights have {value.dtype} under '{key}', but should have floats.")
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        value = value.float()
    own = module.weight.dtype
    if own in (torch.float32, torch.bfloat16, torch.float16):
        value = value.to(torch.promote_types(value.dtype, own))
    check_finite(key, value)
    return value.contiguous()


def check_finite(key: str, value: torch.Tensor) -> None:
    """Raise ValueError for NaN or infinity among weights."""
    if not torch.isfinite(value).all():
        kind = "NaN" if value.isnan().any() else "infinity"
        raise ValueError(f"The LoRA weights have {kind} under '{key}': the file is damaged, or its training diverged.")


@dataclass
class Settings:
    """Ranks and scaling from a configuration; no code is imported, downloaded or executed."""

    component: str
    rank: float | None
    lora_alpha: float | None
    rank_pattern: dict[str, float]
    alpha_pattern: dict[str, float]
    kept: dict[str, Any]

    @classmethod
    def read(cls, config: dict[str, Any], component: str) -> "Settings":
        """Read peft's settings; raise ValueError for invalid values, and for ones that require other weights."""
        kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
        if kind not in (None, "LORA"):
            raise ValueError(f"`peft_type` of the adapter for {component} is {kind!r}, but should be 'LORA'.")
        for name in UNSUPPORTED_SETTINGS:
            if config.get(name):
                raise ValueError(f"`{name}` of the adapter for {component} is set, which cannot be loaded.")
        if config.get("bias") not in (None, "none"):
            raise ValueError(f"`bias` of the adapter for {component} is {config['bias']!r}, but should be 'none'.")
        beginning = config.get("init_lora_weights")
        if isinstance(beginning, str) and beginning.lower().startswith(UNSUPPORTED_BEGINNINGS):
            raise ValueError(
                f"`init_lora_weights` of the adapter for {component} is {beginning!r}: it was trained on other weights than "
                "the network's, and must be converted to plain LoRA by peft."
            )
        for name in ("use_rslora", "use_dora", "lora_bias"):
            if not isinstance(config.get(name, False), bool):
                raise ValueError(f"`{name}` of the adapter for {component} is {config[name]!r}, but should be a bool.")
        dropout = number(config, "lora_dropout", component) or 0.0
        if not 0 <= dropout < 1:
            raise ValueError(f"`lora_dropout` of the adapter for {component} is {dropout}, but should be in [0, 1).")
        return cls(
            component,
            number(config, "r", component),
            number(config, "lora_alpha", component),
            patterns(config, "rank_pattern", component),
            patterns(config, "alpha_pattern", component),
            kept={"use_rslora": config.get("use_rslora", False), "lora_dropout": dropout},
        )

    def checked_rank(self, layer: str, update: Update) -> int:
        rank = matching(self.rank_pattern, layer, self.rank)
        if rank is not None and rank != update.rank:
            raise ValueError(
                f"The LoRA weights for {self.component}.{layer} have rank {update.rank}, but their configuration says "
                f"{rank}."
            )
        return update.rank

    def alpha(self, layer: str, update: Update) -> float:
        """Return the lora_alpha of a layer: from its key, from the configuration, or the rank."""
        told = matching(self.alpha_pattern, layer, self.lora_alpha)
        if ALPHA not in update.parts:
            return update.rank if told is None else told
        key, value = update.keys[ALPHA], update.parts[ALPHA]
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"The weights have {tuple(value.shape)} of {value.dtype} under '{key}', not a number.")
        alpha = value.float()
        check_finite(key, alpha)
        if told is not None and not math.isclose(told, alpha.item(), rel_tol=1e-2):
            raise ValueError(f"The weights have {alpha.item()} under '{key}', but their configuration says {told}.")
        return int(alpha) if alpha == alpha.round() else alpha.item()


def number(config: dict[str, Any], name: str, component: str) -> float | None:
    """Return a setting that must be a finite number; None if missing."""
    value = config.get(name)
    if value is None:
        return None
    if not is_finite(value):
        raise ValueError(f"`{name}` of the adapter for {component} is {str(value)[:80]!r}, but should be a number.")
    return value


def patterns(config: dict[str, Any], name: str, component: str) -> dict[str, float]:
    """Return a setting that maps regular expressions to numbers."""
    found = config.get(name)
    if not found:
        return {}
    if not isinstance(found, dict) or len(found) > MAX_PATTERNS or not all(map(is_finite, found.values())):
        raise ValueError(f"`{name}` of the adapter for {component} should have numbers by the names of layers.")
    for pattern in map(str, found):
        try:
            # repeated groups and many repetitions may take exponential time to match
            if len(pattern) > 300 or re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{?]", pattern)) > 3:
                raise re.error("it is too long, or repeats too much")
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"`{name}` of the adapter for {component} has {pattern[:80]!r}: {error}.") from error
    return {str(pattern): value for pattern, value in found.items()}


def matching(found: dict[str, float], layer: str, default: float | None) -> float | None:
    """Return the number whose pattern matches the end of a layer's name, as peft matches it."""
    for pattern, value in found.items():
        plain = pattern.removeprefix("^")
        if re.fullmatch(r"[\w.]+", plain):  # nearly all are plain, and comparing is a hundred times faster
            if layer == plain or plain == pattern and layer.endswith(f".{plain}"):
                return value
        elif re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def configuration(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """Return peft's settings for layers with these ranks and alphas."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }
