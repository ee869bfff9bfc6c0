"""Networks that the benchmark compares; benchmark_contenders.py has what is timed of them.

- `ours`: both predictions of guidance in one batch, the text encoded in advance, attention through diffusers'
  backends, channels_last. Variants: the text encoded in every call, another memory format, each attention backend,
  compiled block by block (`compile_repeated_blocks`) or as a whole.
- `plain`: the same layers in a straightforward implementation: two passes, each of which encodes the text, attention
  by einsum, no operation in place, torch's own group normalization.
- `diffusers`: a UNet2DConditionModel with the same levels and a width that gives about as many FLOPs.
- `deepfloyd`: the UNet2DConditionModel of DeepFloyd IF that `ours` was converted from, with random weights: the same
  network, only for the presets IF-I-M, IF-I-L and IF-I-XL.
- `imagen-pytorch`: the `Unet` of that package with about as many FLOPs, if it is installed.

A network without text makes one prediction.
"""

import ast
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from benchmark_contenders import (
    Contender,
    DeepFloyd,
    Diffusers,
    ImagenPytorch,
    Inputs,
    Ours,
    Plain,
    TextEveryCall,
    make_inputs,
    placed,
)
from benchmark_measures import Case, count_flops
from diffusers import UNet2DConditionModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn
from transformers import T5Config

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.conversion import unet_from_deepfloyd, unet_to_deepfloyd
from diffusers_imagen.models.presets import PRESETS, create_unet
from diffusers_imagen.models.unet_base import ConditionalUNet


SYSTEMS = ("ours", "compiled", "plain", "diffusers", "deepfloyd", "imagen-pytorch")
COMPILE = ("blocks", "whole")
# Configurations of DeepFloyd/IF-I-*-v1.0 as written by diffusers' conversion script, by the widths of their levels.
# IF-I-M has 371,605,830 parameters.
DEEPFLOYD = {
    "IF-I-M": (192, 384, 576, 768),
    "IF-I-L": (320, 640, 960, 1280),
    "IF-I-XL": (704, 1408, 2112, 2816),
}
DEEPFLOYD_CONFIG = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "act_fn": "gelu",
    "attention_head_dim": 64,
    "encoder_hid_dim": 4096,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "addition_embed_type": "text",
}
NAMES = [*PRESETS, *DEEPFLOYD]


# ---- networks


def create_ours(preset: str, overrides: dict[str, Any]) -> ConditionalUNet:
    """Create our network by preset or by DeepFloyd IF's name, with random weights."""
    if preset in DEEPFLOYD:
        return unet_from_deepfloyd(create_deepfloyd(preset, overrides))
    return create_unet(preset, **overrides)


def create_deepfloyd(name: str, overrides: dict[str, Any]) -> UNet2DConditionModel:
    """Create a network of DeepFloyd IF with random weights; `overrides` are entries of diffusers' configuration.

    Raises:
        ValueError: For an unknown entry.
    """
    config = {**DEEPFLOYD_CONFIG, "block_out_channels": DEEPFLOYD[name], **overrides}
    unknown = sorted(set(config) - set(inspect.signature(UNet2DConditionModel).parameters))
    if unknown:
        raise ValueError(f"`{unknown[0]}` is not an entry of the configuration of {name}, a UNet2DConditionModel.")
    return UNet2DConditionModel(**{"cross_attention_dim": config["block_out_channels"][-1], **config})


@cache
def weightless_ours(preset: str, overrides: str) -> ConditionalUNet:
    with torch.device("meta"):
        return create_ours(preset, ast.literal_eval(overrides))


def twin(unet: ConditionalUNet) -> ConditionalUNet:
    """Return a network with modules of its own and the same weights in memory."""
    tensors = itertools.chain(unet.parameters(), unet.buffers())
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in tensors})


def weightless(network: nn.Module) -> nn.Module:
    """Return a copy of a network on the device `meta`."""
    memo: dict[int, Any] = {id(t): nn.Parameter(torch.empty_like(t, device="meta")) for t in network.parameters()}
    memo |= {id(t): torch.empty_like(t, device="meta") for t in network.buffers()}
    return copy.deepcopy(network, memo).float()


def nearest_share(flops_of: Callable[[int], int], flops: int, low: int = 4, high: int = 12) -> int:
    """Return the share of the widths, in eighths from `low` to `high`, with the nearest FLOPs, which grow with it."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if flops_of(middle) <= flops else (low, middle)
    return min((low, high), key=lambda share: abs(flops_of(share) - flops))


@cache
def share_of(rival: "Rival", preset: str, overrides: str, tokens: int) -> float:
    """Return the share of our network's widths that gives a rival the FLOPs of one prediction of ours."""
    ours = weightless_ours(preset, overrides)
    inputs = placed(make_inputs(ours, 1, tokens), "meta", torch.float32)

    def flops_of(contender: type[Contender], network: nn.Module) -> int:
        made = contender(network, inputs)
        return count_flops(lambda: made.call(made.inputs))

    with torch.device("meta"), torch.no_grad():
        flops = flops_of(TextEveryCall, ours)
        counted = cache(lambda eighths: flops_of(rival.contender, rival.create(ours, eighths / 8)))
        return nearest_share(counted, flops) / 8


def attending_levels(unet: ConditionalUNet) -> list[bool]:
    config = unet.config
    if isinstance(unet, ImagenUNetModel):
        sides = [config.sample_size // 2**i for i in range(len(config.block_out_channels))]
        return [side in config.attention_resolutions for side in sides]
    return [attention_type is not None for attention_type in config.attention_types]


def widths_of(unet: ConditionalUNet, share: float) -> list[int]:
    groups = unet.config.norm_num_groups
    return [max(groups, round(share * channels / groups) * groups) for channels in unet.config.block_out_channels]


def diffusers_unet(unet: ConditionalUNet, share: float) -> UNet2DConditionModel:
    """Create a UNet2DConditionModel with the same levels and attention, at a share of the widths."""
    config, attends = unet.config, attending_levels(unet)
    text = {"cross_attention_dim": config.encoder_hid_dim} if config.encoder_hid_dim else {}
    return UNet2DConditionModel(
        in_channels=config.in_channels * (2 if config.low_res_conditioning else 1),
        out_channels=config.out_channels,
        block_out_channels=widths_of(unet, share),
        layers_per_block=config.layers_per_block,
        down_block_types=["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        up_block_types=["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in attends[::-1]],
        mid_block_type="UNetMidBlock2DCrossAttn" if text else "UNetMidBlock2D",
        attention_head_dim=8,
        norm_num_groups=config.norm_num_groups,
        **text,
    )


@contextmanager
def offline_t5() -> Iterator[None]:
    """Let `T5Config.from_pretrained` return a default: imagen-pytorch calls it when it is imported, for a width."""
    original = T5Config.__dict__.get("from_pretrained")
    T5Config.from_pretrained = staticmethod(lambda *args, **kwargs: T5Config())
    try:
        yield
    finally:
        if original is None:
            del T5Config.from_pretrained
        else:
            T5Config.from_pretrained = original


def imagen_pytorch_unet(unet: ConditionalUNet, share: float) -> nn.Module:
    """Create a Unet of imagen-pytorch with the same levels and attention, at a share of the widths.

    Raises:
        ImportError: If the package is not installed.
    """
    with offline_t5():
        from imagen_pytorch import Unet

    config, attends = unet.config, tuple(attending_levels(unet))
    first, layers = config.block_out_channels[0], config.layers_per_block
    text = config.encoder_hid_dim is not None
    return Unet(
        dim=max(8, round(share * first / 8) * 8),
        dim_mults=tuple(max(1, round(channels / first)) for channels in config.block_out_channels),
        num_resnet_blocks=tuple(layers) if isinstance(layers, (tuple, list)) else layers,
        layer_attns=attends,
        layer_cross_attns=attends if text else False,
        cond_on_text=text,
        text_embed_dim=config.encoder_hid_dim or 1,
        lowres_cond=config.low_res_conditioning,
        channels=config.in_channels,
    )


class Rival(NamedTuple):
    """Network of another package: how it is called, and its function of our network and a share of the widths."""

    contender: type[Contender]
    create: Callable[[ConditionalUNet, float], nn.Module]


DIFFUSERS = Rival(Diffusers, diffusers_unet)
IMAGEN_PYTORCH = Rival(ImagenPytorch, imagen_pytorch_unet)


# ---- cases


class Networks:
    """Systems of one preset and batch size on a device.

    Args:
        preset (`str`): A preset, or the name of a network of DeepFloyd IF.
        settings: The command's options: `overrides`, `tokens`, `device`, `dtype`, `systems`, `compile`,
            `memory_formats`, `attention_backends`.
        batch_size (`int`): Images; guidance predicts twice as many.
    """

    def __init__(self, preset: str, settings: Any, batch_size: int):
        self.preset, self.settings, self.batch_size = preset, settings, batch_size
        self.counts: dict[tuple, int] = {}

    def meta(self) -> ConditionalUNet:
        """Return our network on the device `meta`: its configuration and shapes. It is not to be changed."""
        return weightless_ours(self.preset, repr(self.settings.overrides))

    @cached_property
    def unet(self) -> ConditionalUNet:
        """Our network, whose weights all variants of it share."""
        with self.settings.device:
            return self.place(create_ours(self.preset, self.settings.overrides))

    @cached_property
    def inputs(self) -> Inputs:
        inputs = make_inputs(self.meta(), self.batch_size, self.settings.tokens)
        return placed(inputs, self.settings.device, self.settings.dtype)

    def place(self, network: nn.Module) -> nn.Module:
        return network.to(self.settings.device, self.settings.dtype)

    def count(self, method: str, contender: type[Contender] = Ours, network: nn.Module | None = None) -> int:
        """Count the FLOPs of a method of a contender, without computing it; of our network if none is given."""
        key = method, contender
        if key not in self.counts:
            inputs = placed(make_inputs(self.meta(), self.batch_size, self.settings.tokens), "meta", torch.float32)
            inputs.pop("encoder_attention_mask", None)  # it has no values, and does not affect the FLOPs
            with torch.device("meta"), torch.set_grad_enabled(method == "train"):
                rival = contender(self.meta() if network is None else network, inputs)
                if method == "predict" and "encoder_hidden_states" in inputs:
                    rival.both  # of ours the text is encoded in advance
                self.counts[key] = count_flops(getattr(rival, method))
        return self.counts[key]

    def cases(self, method: str) -> list[Case]:
        """Return the chosen systems; `method` is "predict" or "train"."""
        chosen = self.settings.systems
        cases = []
        if "ours" in chosen:
            cases += self.our_variants(method)
        if "plain" in chosen:
            cases.append(self.case("plain", method, Plain, self.plain))
        if "diffusers" in chosen and self.preset not in DEEPFLOYD:
            cases.append(self.like("diffusers", method, DIFFUSERS))
        if "deepfloyd" in chosen and self.preset in DEEPFLOYD:
            cases.append(self.case("deepfloyd", method, DeepFloyd, self.deepfloyd))
        if "imagen-pytorch" in chosen:
            cases.append(self.like("imagen-pytorch", method, IMAGEN_PYTORCH))
        # compilation takes minutes: last, so that it takes no time from others
        if "compiled" in chosen:
            cases += [self.ours(f"ours, {how} compiled", method, compiled=how) for how in self.settings.compile]
        return cases

    def our_variants(self, method: str) -> list[Case]:
        cases = []
        for memory_format in self.settings.memory_formats:
            name = "ours" if memory_format == "channels_last" else f"ours, {memory_format}"
            cases.append(self.ours(name, method, memory_format=memory_format))
        if method == "predict" and "encoder_hidden_states" in self.inputs:
            cases.append(self.ours("ours, text every call", method, contender=TextEveryCall))
        if any(getattr(module, "to_q", None) is not None for module in self.meta().modules()):
            cases += [self.ours(f"ours, {name}", method, backend=name) for name in self.settings.attention_backends]
        return cases

    def ours(
        self,
        name: str,
        method: str,
        contender: type[TextEveryCall] = Ours,
        memory_format: str = "channels_last",
        compiled: str | None = None,
        backend: str | None = None,
    ) -> Case:
        def build() -> Callable[[], Any]:
            unet = twin(self.unet)
            if memory_format != "channels_last":
                unet = copy.deepcopy(self.unet)  # the layout is one of the weights
            if backend is not None:
                # the method sets the backend of all other networks too, which the context puts back
                with attention_dispatch.attention_backend(backend):
                    unet.set_attention_backend(backend)
            made = contender(unet, self.inputs, memory_format)
            if compiled is not None:
                made.unet = compile_network(unet, compiled)
            return runner(made, method)

        return Case(name, build, self.count(method, contender))

    def case(self, name: str, method: str, contender: type[Contender], create: Callable[[], nn.Module]) -> Case:
        def build() -> Callable[[], Any]:
            with self.settings.device:  # random weights are made fast on a GPU
                network = create()
            case.flops = self.count(method, contender, weightless(network))
            return runner(contender(self.place(network), self.inputs), method)

        case = Case(name, build)
        return case

    def plain(self) -> ConditionalUNet:
        plain = create_ours(self.preset, self.settings.overrides)
        plain.load_state_dict(self.unet.state_dict())
        return plain

    def like(self, name: str, method: str, rival: Rival) -> Case:
        """Return the case of a network of another package with the FLOPs of ours."""

        def create() -> nn.Module:
            share = share_of(rival, self.preset, repr(self.settings.overrides), self.settings.tokens)
            return rival.create(self.meta(), share)

        return self.case(name, method, rival.contender, create)

    def deepfloyd(self) -> UNet2DConditionModel:
        """Create the network of DeepFloyd IF with our weights."""
        return unet_to_deepfloyd(self.unet)


def runner(contender: Contender, method: str) -> Callable[[], Any]:
    """Return a method of a contender, without gradients if it is `predict`."""
    if method == "train":
        contender.unet.train()
        return contender.train
    contender.unet.eval()
    return torch.no_grad()(contender.predict)


def compile_network(unet: ConditionalUNet, how: str) -> nn.Module:
    """Compile a network by its repeated blocks or as a whole, without graph breaks."""
    # every block is compiled on its own, but they count together against the limits of one function
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096
    if how == "blocks":
        unet.compile_repeated_blocks(fullgraph=True)
        return unet
    return torch.compile(unet, fullgraph=True)


def usable_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the attention backends of diffusers that need no download and compute attention on the device."""
    query = torch.zeros(1, 64, 2, 64, device=device, dtype=dtype)  # (B, N, heads, C / heads)
    usable = []
    for backend in AttentionBackendName:
        try:
            attention_dispatch._check_attention_backend_requirements(backend)
            if not backend.value.endswith("_hub"):
                attention_dispatch.dispatch_attention_fn(query, query, query, backend=backend)
                usable.append(backend.value)
        # backends raise errors of any type where they cannot be used
        except Exception:
            continue
    return usable
