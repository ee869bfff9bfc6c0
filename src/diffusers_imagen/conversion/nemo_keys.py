"""Mapping of weight names between checkpoints of NeMo's Imagen and this package's networks.

A NeMo key has three parts, each with a table: position of the block, layer of the block, and weight or bias.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, islice
from typing import Any, NamedTuple, cast

from ..models import EfficientUNetModel, ImagenUNetModel
from ..models.blocks import ImagenBlock
from ..utils.arguments import shown
from ..utils.modules import first_names


MAX_NAMES = 20  # per message
PREFIX = "model.model.unet."  # of a network's weights in NeMo's checkpoints
# prefixes of a weight's name: from Lightning, Megatron and torch.compile
WRAPPERS = re.compile(r"(state_dict\.)?((model|module|unet|_orig_mod)\.)*")
# NeMo registers the first convolution of its U-Net twice, and loads it from the second
TWIN, FIRST_CONVOLUTION = "init_conv.0.", "input_blocks.0.0."
# other entries among the weights, and why they are not converted
OTHERS = {
    r"(state_dict\.)?((model|module)\.)*text_encoder\.": "the frozen text encoder, which is specified separately",
    r"(optimizer|optimizer_states|lr_schedulers|chained_\d+\.optimizer)\b": "state of the optimizer, which is not carried over",
    r".*\._extra_state(/|$)": "state of Transformer Engine's FP8 layers, which has no weights",
}

# Positions in the network that both have; the functions below number those of the blocks.
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

# Layer of a block. A tuple splits the output channels of one NeMo layer over several layers here.
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


UNET_ONLY, EFFICIENT_ONLY = ("skip_connection", "out_layers.3"), ("shortcut", "out_layers.2")
PROJECTIONS = ("q", "qkv", "kv", "kv_self", "kv_context", "proj_out")
# Layers of each attention type.
LAYERS_OF_KIND = {
    "self": ["norm", "qkv", "proj_out"],
    "cross": ["norm", "norm_context", "q", "kv", "proj_out"],
    "fused": ["norm", "norm_self", "norm_context", "q", "kv_self", "kv_context", "proj_out"],
}
LAYERS_OF_KIND["stacked"] = [
    *(f"self_attention_block.{layer}" for layer in LAYERS_OF_KIND["self"]),
    *(f"cross_attention_block.{layer}" for layer in LAYERS_OF_KIND["cross"]),
    *(layer for layer in STACKED_LAYERS if not layer.endswith("_block")),
]


class KeyPlan(NamedTuple):
    """Assignment of each key of a checkpoint."""

    targets: dict[str, tuple[str, ...]]  # this package's names; several split the output channels
    dropped: dict[str, str]  # keys and reasons


def plan_keys(shapes: Mapping[str, Sequence[int]], model: ImagenUNetModel | EfficientUNetModel) -> KeyPlan:
    """Assign the weights of a checkpoint to the parameters of a network.

    Args:
        shapes: Shapes of the checkpoint's tensors, by key.
        model: The network, which may be on the meta device.

    Raises:
        ValueError: If a key has no parameter, two keys have the same one, a parameter has no key, or a shape differs;
            names all of them.
    """
    efficient = isinstance(model, EfficientUNetModel)
    positions = _positions(model)
    kinds = model.config.attention_types if efficient else (model.config.attention_type,)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plan, leftovers, found = KeyPlan({}, {}), [], dict[str, str]()
    for key in shapes:
        reason = why_dropped(key, efficient)
        if reason is not None:
            plan.dropped[key] = reason
            continue
        targets = _convert_key(bare_name(key), positions, "stacked" in kinds) or [key]
        if any(target not in expected for target in targets):
            leftovers += [key] if targets == [key] else targets
            continue
        plan.targets[key] = tuple(targets)
        for target in targets:
            if target in found:
                raise ValueError(f"`state_dict` has one weight twice, as {shown(found[target])} and as {shown(key)}.")
            found[target] = key
    gaps = [name for name in expected if name not in found]
    sizes: dict[str, tuple[tuple[int, ...], ...]] = {}
    for key, names in plan.targets.items():
        part = share_of(shapes[key], len(names))
        sizes |= {name: (part, expected[name]) for name in names if not fits(part, expected[name])}
    if sizes:
        sizes = dict(islice(sizes.items(), MAX_NAMES))
        raise ValueError(f"`state_dict` does not fit the configuration. Actual and expected shapes: {sizes}.")
    if leftovers or gaps:
        raise ValueError(
            f"`state_dict` does not fit the configuration. Unexpected keys: {listed(leftovers)}. "
            f"Missing parameters: {listed(gaps)}."
        )
    return plan


def listed(names: Sequence[str]) -> str:
    """List the first of many names, shortened, and the number of others."""
    text = str([name[:200] for name in names[:MAX_NAMES]])
    return text if len(names) <= MAX_NAMES else f"{text} and {len(names) - MAX_NAMES} others"


def bare_name(key: str) -> str:
    """Return a key without the prefixes added by wrappers."""
    return key[cast(re.Match, WRAPPERS.match(key)).end() :]


def why_dropped(key: str, efficient: bool) -> str | None:
    """Return the reason why a key's tensor is skipped intentionally; None if it is not."""
    if not efficient and bare_name(key).startswith(TWIN):
        return f"the same layer as {FIRST_CONVOLUTION.rstrip('.')}, which NeMo registers twice"
    return next((reason for pattern, reason in OTHERS.items() if re.match(pattern, key)), None)


def share_of(shape: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the shape of one of several layers whose output channels are concatenated."""
    if count > 1 and (not len(shape) or shape[0] % count):
        return (*shape, -1)  # matches nothing
    return (shape[0] // count, *shape[1:]) if len(shape) else ()


def fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether the shapes are equivalent: 1x1 convolutions over tokens are linear layers here."""
    return tuple(size for size in shape if size != 1) == tuple(size for size in expected if size != 1)


def nemo_names(model: ImagenUNetModel | EfficientUNetModel) -> dict[str, tuple[str, ...]]:
    """Map NeMo's names of a network's weights, without prefix, to this package's: the reverse of `plan_keys`.

    Raises:
        ValueError: For a weight without a counterpart in NeMo's networks.
    """
    efficient = isinstance(model, EfficientUNetModel)
    positions = _positions(model)
    kinds = {kind for kind in model.config.attention_types if kind} if efficient else {model.config.attention_type}
    untaken = dict.fromkeys(model.state_dict())
    names = {}
    for name in candidates(positions, kinds, efficient):
        targets = tuple(_convert_key(name, positions, "stacked" in kinds) or [""])
        if all(target in untaken for target in targets):
            names[name] = targets
            for target in targets:
                del untaken[target]
    if untaken:
        raise ValueError(f"NeMo's networks have no place for {first_names(list(untaken))}.")
    return names


def nemo_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a weight in NeMo, where projections of tokens are 1x1 convolutions."""
    layer = name.removesuffix(".weight")
    is_projection = layer != name and layer.rpartition(".")[2] in PROJECTIONS and len(shape) == 2
    return (*shape, 1) if is_projection else tuple(shape)


def candidates(positions: Mapping[str, str], kinds: Iterable[str], efficient: bool) -> Iterable[str]:
    """Generate all possible NeMo weight names in a network with these attention types."""
    attention = [layer for kind in kinds for layer in LAYERS_OF_KIND[kind]]
    resnet = [layer for layer in RESNET_LAYERS if layer not in (UNET_ONLY if efficient else EFFICIENT_ONLY)]
    for position, place in positions.items():
        layers = [""] if position.endswith((".op", ".conv")) else ["", *resnet]
        layers = attention if place.endswith("attention") else layers
        for layer in layers:
            for parameter in ("weight", "bias", ""):
                yield ".".join(filter(None, (position, layer, parameter)))


def _positions(model: ImagenUNetModel | EfficientUNetModel) -> dict[str, str]:
    """Map NeMo's positions of a network's modules to this package's names."""
    return _efficient_positions(model) if isinstance(model, EfficientUNetModel) else _unet_positions(model)


def _unet_positions(model: ImagenUNetModel) -> dict[str, str]:
    """Return the positions of a U-Net: NeMo numbers blocks and resamplers consecutively, first down, then up."""
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
    """Return the positions of an Efficient U-Net: NeMo numbers levels from full resolution, in the decoder too."""
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
    """Return this package's names for a NeMo name, or None if there are none."""
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
    """Return the longest key of the table that is `name` or a dotted prefix of it."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in table), None)
