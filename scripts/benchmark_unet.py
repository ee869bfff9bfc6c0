#!/usr/bin/env python
"""Benchmark a network against a straightforward implementation of it and diffusers' UNet2DConditionModel.

    python scripts/benchmark_unet.py --preset emoji_base_64 --batch_size 1 4

Three contenders compute the same guided prediction (a conditional and an unconditional one), and the same training step:

- `ours`: both predictions in one batch, the text encoded in advance, attention through diffusers' backends,
  channels_last. `--compile` adds torch.compile.
- `plain`: the same layers in a straightforward implementation: two passes, each of which encodes the text, attention
  by einsum, no operation in place. Its prediction is checked against ours.
- `diffusers`: a UNet2DConditionModel with the same levels and a width that gives about as many FLOPs, both predictions
  in one batch.

They alternate within one run, so that a ratio compares times of the same minutes; the table has medians.

`--preset IF-I-M` builds a network of the size of DeepFloyd IF's medium stage I, with random weights. The contenders
are then `ours`, `ours, text every call`, which encodes the text again in each call, and `diffusers`, the
UNet2DConditionModel that ours was converted from: the same network, whose prediction is checked against ours.
"""

import argparse
import sys
import time
from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.commands.common import check_device
from diffusers_imagen.commands.parser import Parser, check_numbers
from diffusers_imagen.conversion import unet_from_deepfloyd
from diffusers_imagen.models.blocks import ResBlock
from diffusers_imagen.models.presets import PRESETS, create_unet
from diffusers_imagen.models.unet_base import ConditionalUNet
from diffusers_imagen.utils.errors import run_to_exit_code


GUIDANCE = 4.0
DEEPFLOYD = "IF-I-M"
# The configuration of DeepFloyd/IF-I-M-v1.0, 371,605,830 parameters, as written by diffusers' conversion script.
DEEPFLOYD_CONFIG = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (192, 384, 576, 768),
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "act_fn": "gelu",
    "attention_head_dim": 64,
    "encoder_hid_dim": 4096,
    "cross_attention_dim": 768,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "addition_embed_type": "text",
}


class EinsumAttnProcessor:
    """Attention as in the formula."""

    def __call__(self, attn, hidden_states, text=None):
        query, key, value, mask = attn.project(hidden_states, text)
        scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return attn.merge(torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), value), hidden_states)


def plain_resblock(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """Compute a residual block as in the formula."""
    h = F.silu(self.norm1(x))
    if self.resample_branch is not None:
        h, x = self.resample_branch(h), self.resample_shortcut(x)
    h = self.conv1(h)
    temb = self.time_emb_proj(temb)[:, :, None, None]
    if self.scale_shift:
        scale, shift = temb.chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
    else:
        h = self.norm2(h + temb)
    h = self.conv2(self.dropout(F.silu(h)))
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x)
    return h + x * self.shortcut_scale if self.shortcut_scale != 1.0 else h + x


class Contender:
    """Network with methods `predict`, with guidance, and `train`, which computes the gradients of one batch."""

    def __init__(self, unet: torch.nn.Module, inputs: dict[str, torch.Tensor]):
        self.unet, self.inputs = unet, inputs

    def predict(self) -> torch.Tensor:
        raise NotImplementedError

    def train(self) -> torch.Tensor:
        self.unet.zero_grad(set_to_none=True)
        output = self.unet(**self.inputs, return_dict=False)[0]
        output.float().square().mean().backward()
        return output


class Ours(Contender):
    def __init__(self, unet: ConditionalUNet, inputs: dict[str, torch.Tensor], compiled: bool):
        unet.to(memory_format=torch.channels_last)
        inputs = {**inputs, "sample": inputs["sample"].contiguous(memory_format=torch.channels_last)}
        super().__init__(torch.compile(unet, fullgraph=True) if compiled else unet, inputs)
        text = torch.cat([torch.zeros_like(inputs["encoder_hidden_states"]), inputs["encoder_hidden_states"]])
        with torch.no_grad():
            text = unet.encode_text(text, torch.cat([inputs["encoder_attention_mask"]] * 2))
        doubled = {name: torch.cat([value, value]) for name, value in inputs.items() if not name.startswith("encoder")}
        self.doubled = {**doubled, "encoder_hidden_states": text}

    def predict(self) -> torch.Tensor:
        unconditional, conditional = self.unet(**self.doubled, return_dict=False)[0].chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)


class TextEveryCall(Ours):
    """Ours, called with text embeddings instead of the result of `encode_text`."""

    def __init__(self, unet: ConditionalUNet, inputs: dict[str, torch.Tensor], compiled: bool):
        super().__init__(unet, inputs, compiled)
        text, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
        self.doubled["encoder_hidden_states"] = torch.cat([torch.zeros_like(text), text])
        self.doubled["encoder_attention_mask"] = torch.cat([mask, mask])


class Plain(Contender):
    def __init__(self, unet: ConditionalUNet, inputs: dict[str, torch.Tensor]):
        unet.set_attn_processor(EinsumAttnProcessor())
        for module in unet.modules():
            if isinstance(module, ResBlock):
                module.forward = MethodType(plain_resblock, module)
        super().__init__(unet, inputs)
        self.unprompted = {**inputs, "encoder_hidden_states": torch.zeros_like(inputs["encoder_hidden_states"])}

    def predict(self) -> torch.Tensor:
        conditional = self.unet(**self.inputs, return_dict=False)[0]
        unconditional = self.unet(**self.unprompted, return_dict=False)[0]
        return unconditional + GUIDANCE * (conditional - unconditional)


class Diffusers(Contender):
    def __init__(self, unet: UNet2DConditionModel, inputs: dict[str, torch.Tensor]):
        names = ("sample", "timestep", "encoder_hidden_states", "encoder_attention_mask")
        super().__init__(unet, {name: inputs[name] for name in names})
        self.doubled = {name: torch.cat([value, value]) for name, value in self.inputs.items()}

    def predict(self) -> torch.Tensor:
        unconditional, conditional = self.unet(**self.doubled, return_dict=False)[0].chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)


class SameInDiffusers(Diffusers):
    """DeepFloyd IF's network in diffusers, called without a mask."""

    def __init__(self, unet: UNet2DConditionModel, inputs: dict[str, torch.Tensor]):
        super().__init__(unet, inputs)
        for given in (self.inputs, self.doubled):
            del given["encoder_attention_mask"]
        text = self.inputs["encoder_hidden_states"]
        self.doubled["encoder_hidden_states"] = torch.cat([torch.zeros_like(text), text])


def make_inputs(unet: ConditionalUNet, batch_size: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return inputs for a batch of prompts, of which the even ones use half of their tokens."""
    generator = torch.Generator().manual_seed(0)
    config, side = unet.config, unet.config.sample_size
    lengths = torch.full((batch_size, 1), tokens)
    lengths[::2] = tokens // 2
    mask = torch.arange(tokens) < lengths
    inputs = {
        "sample": torch.randn(batch_size, config.in_channels, side, side, generator=generator),
        "timestep": torch.full((batch_size,), -0.5),
        "encoder_hidden_states": torch.randn(batch_size, tokens, config.encoder_hid_dim, generator=generator)
        * mask[..., None],
        "encoder_attention_mask": mask,
    }
    if config.low_res_conditioning:
        inputs["low_res_sample"] = torch.randn(inputs["sample"].shape, generator=generator)
    if config.low_res_noise_conditioning:
        inputs["low_res_timestep"] = torch.full((batch_size,), -1.0)
    return inputs


def count_flops(unet: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Count the FLOPs of one prediction for one image, without computing it."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet.to("meta")(**{name: value[:1].to("meta") for name, value in inputs.items()})
    return counter.get_total_flops()


def diffusers_unet(unet: ConditionalUNet, flops: int, inputs: dict[str, torch.Tensor]) -> UNet2DConditionModel:
    """Create a UNet2DConditionModel with the same levels and attention, and the width with the nearest FLOPs."""
    names = ("sample", "timestep", "encoder_hidden_states")
    inputs = {name: inputs[name] for name in names}
    config, groups = unet.config, unet.config.norm_num_groups
    if isinstance(unet, ImagenUNetModel):
        attends = [
            config.sample_size // 2**i in config.attention_resolutions for i in range(len(config.block_out_channels))
        ]
    else:
        attends = [attention_type is not None for attention_type in config.attention_types]

    def build(share: float) -> UNet2DConditionModel:
        return UNet2DConditionModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            block_out_channels=[max(groups, round(share * c / groups) * groups) for c in config.block_out_channels],
            layers_per_block=config.layers_per_block,
            down_block_types=["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
            up_block_types=["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in attends[::-1]],
            attention_head_dim=8,
            cross_attention_dim=config.encoder_hid_dim,
            norm_num_groups=groups,
        )

    def distance(share: float) -> int:
        with torch.device("meta"):
            return abs(count_flops(build(share), inputs) - flops)

    return build(min((eighths / 8 for eighths in range(4, 13)), key=distance))


def peak_memory(call: Callable, device: torch.device) -> float:
    """Return the peak memory of a call beyond what was allocated before, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def measure(calls: dict[str, Callable], device: torch.device, repeats: int, clock: Callable) -> dict[str, float]:
    """Return the median seconds of each call; calls alternate, and the first round is not counted."""
    times = {name: [] for name in calls}
    for _ in tqdm(range(repeats + 1), leave=False, disable=None):
        for name, call in calls.items():
            start = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return {name: torch.tensor(values[1:]).median().item() for name, values in times.items()}


def report(kind: str, batch_size: int, calls: dict[str, Callable], seconds: dict[str, float], device) -> None:
    """Print a row for each contender; ratios are its time over that of `ours`."""
    for name, call in calls.items():
        ratio = seconds[name] / seconds["ours"]
        memory = peak_memory(call, device)
        print(
            f"| {kind} | {batch_size} | {name} | {1000 * seconds[name]:.1f} | {ratio:.2f} | {memory:.0f} |", flush=True
        )


def make_networks(preset: str, tokens: int) -> dict[str, torch.nn.Module]:
    """Create the networks of all contenders, ours first, and print their FLOPs."""
    torch.manual_seed(0)
    if preset == DEEPFLOYD:
        theirs = UNet2DConditionModel(**DEEPFLOYD_CONFIG)
        unet = unet_from_deepfloyd(theirs)
        print(f"{preset}: {sum(p.numel() for p in unet.parameters()):,} parameters")
        return {"ours": unet, "diffusers": theirs}
    unet, plain = create_unet(preset), create_unet(preset)
    plain.load_state_dict(unet.state_dict())
    inputs = make_inputs(unet, 1, tokens)
    with torch.device("meta"):
        flops = count_flops(create_unet(preset), inputs)
    other = diffusers_unet(unet, flops, inputs)
    other_flops = count_flops(UNet2DConditionModel.from_config(other.config), Diffusers(other, inputs).inputs)
    print(f"{preset}: {flops / 1e9:.2f} GFLOP per prediction; UNet2DConditionModel: {other_flops / 1e9:.2f} GFLOP")
    return {"ours": unet, "plain": plain, "diffusers": other}


def make_contenders(
    networks: dict[str, torch.nn.Module], inputs: dict[str, torch.Tensor], compiled: bool
) -> dict[str, Contender]:
    ours = Ours(networks["ours"], inputs, compiled)
    if "plain" in networks:
        plain = Plain(networks["plain"], inputs)
        return {"ours": ours, "plain": plain, "diffusers": Diffusers(networks["diffusers"], inputs)}
    every_call = TextEveryCall(networks["ours"], inputs, compiled)
    same = SameInDiffusers(networks["diffusers"], inputs)
    return {"ours": ours, "ours, text every call": every_call, "diffusers": same}


def check_equal(contenders: dict[str, Contender]) -> None:
    """Raise AssertionError if the prediction of another contender with the same weights differs."""
    expected = contenders["ours"].predict()
    for contender in contenders.values():
        if not (isinstance(contender, Diffusers) and not isinstance(contender, SameInDiffusers)):
            torch.testing.assert_close(contender.predict(), expected, atol=1e-3, rtol=1e-3)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[*PRESETS, DEEPFLOYD], default="emoji_base_64")
    parser.add_number("--batch_size", int, 1, 4096, nargs="+", default=[1, 4])
    parser.add_number("--tokens", int, 1, 4096, default=128, help="text tokens; default: %(default)s")
    parser.add_number("--repeats", int, 1, 10**6, default=10, help="measured rounds; default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile our network")
    parser.add_argument("--no_training", action="store_true", help="skip the training step")
    parser.add_argument(
        "--cpu_time", action="store_true", help="measure CPU time instead of wall-clock time, on a shared CPU"
    )
    args = parser.parse_args()
    check_numbers(args)
    check_device(args.device)
    logging.set_verbosity_error()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.cpu_time and device.type != "cpu":
        raise ValueError(
            f"`cpu_time` is given with `device` '{device}', which runs asynchronously: CPU time does not measure it."
        )
    clock = time.process_time if args.cpu_time else time.perf_counter

    networks = make_networks(args.preset, args.tokens)
    for network in networks.values():
        network.to(device, dtype)
    unet = networks["ours"]
    print(f"{device}, {args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | batch | network | ms | time / ours | peak MiB |\n|---|---|---|---|---|---|")

    for batch_size in args.batch_size:
        inputs = {
            name: value.to(device, dtype) if name.endswith(("sample", "states")) else value.to(device)
            for name, value in make_inputs(unet, batch_size, args.tokens).items()
        }
        contenders = make_contenders(networks, inputs, args.compile)
        with torch.no_grad():
            if dtype == torch.float32:
                check_equal(contenders)
            predictions = {name: contender.predict for name, contender in contenders.items()}
            seconds = measure(predictions, device, args.repeats, clock)
            report("guided prediction", batch_size, predictions, seconds, device)
        if not args.no_training:
            training = {name: contender.train for name, contender in contenders.items()}
            seconds = measure(training, device, args.repeats, clock)
            report("training step", batch_size, training, seconds, device)


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "benchmark_unet.py"))
