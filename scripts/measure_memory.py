#!/usr/bin/env python
"""Compute the memory requirements of DeepFloyd IF's cascade: weights, and the peak memory of a guided call.

    python scripts/measure_memory.py --check I-M
    python scripts/measure_memory.py --presets 500m_res_64 600m_res_256

Weights are counted from configurations. A call is simulated with tensors without data, which have the shapes, dtypes
and lifetimes of a call on a CPU; its peak is that of all live tensors. Temporary memory of kernels and libraries, and
memory cached by an allocator, are not counted. `--check` also runs a network with data, in float32 and bfloat16, and
compares with the profiler's record of PyTorch's CPU allocator. `--presets` counts the calls of presets instead, beside
what a call needs at least: the peak if every tensor were free after the last operation that reads it. `--quantized`
loads a T5 encoder with random weights in 8 and 4 bits, with bitsandbytes and torchao if they are installed.
"""

import argparse
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from benchmark_measures import peak_memory
from diffusers.utils import logging
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig, T5Config, T5EncoderModel, TorchAoConfig
from transformers.quantizers.base import get_keys_to_not_convert

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.commands.parser import Parser
from diffusers_imagen.models.presets import PRESETS
from diffusers_imagen.models.unet_base import ConditionalUNet
from diffusers_imagen.utils.errors import run_to_exit_code
from diffusers_imagen.utils.modules import memory_of


TEXT_WIDTH, TOKENS = 4096, 77
T5_XXL = {
    "d_model": TEXT_WIDTH,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
# T5 v1.1 large with 4 of its 24 layers and few tokens
T5_SMALLER = {**T5_XXL, "d_model": 1024, "d_ff": 2816, "num_layers": 4, "num_heads": 16, "vocab_size": 100}
KIND = {
    "out_channels": 6,
    "encoder_hid_dim": TEXT_WIDTH,
    "text_pooling": "class_token",
    "text_pooling_num_heads": 64,
    "resample_type": "resnet_nearest",
    "act_fn": "gelu",
    "attends_padding": True,
}


class Network(NamedTuple):
    """Network of IF: its stage in the cascade, widths of its levels, and their source."""

    name: str
    stage: int
    widths: tuple[int, ...]
    source: str

    @property
    def config(self) -> dict:
        """Return the configuration of an `ImagenUNetModel`."""
        kind = {**KIND, "block_out_channels": self.widths, "sinusoidal_dim": self.widths[0]}
        if self.stage == 1:
            levels = {"sample_size": 64, "layers_per_block": 3, "attention_resolutions": (32, 16, 8)}
            return {**kind, **levels, "cross_attention_dim": self.widths[-1], "shared_attention_norm": True}
        return {
            **kind,
            "sample_size": 256,
            "layers_per_block": (2, 2, 3, 5, 5),
            "attention_resolutions": (32, 16),
            "attention_type": "cross",
            "cross_attention_dim": self.widths[-1],
            "resnet_out_scale_factor": 1 / 0.7071,
            "low_res_conditioning": True,
            "low_res_noise_conditioning": True,
            "low_res_augmentation": "discrete",
        }


NETWORKS = (
    Network("I-M", 1, (192, 384, 576, 768), "published"),
    Network("I-L", 1, (320, 640, 960, 1280), "published"),
    Network("I-XL", 1, (704, 1408, 2112, 2816), "published"),
    Network("II-M", 2, (128, 256, 384, 640, 768), "assumed"),
    Network("II-L", 2, (192, 384, 640, 1024, 1280), "assumed"),
)
CASCADES = (("I-M", "II-M"), ("I-L", "II-M"), ("I-XL", "II-L"))


# ---- weights


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make_text_encoder() -> T5EncoderModel:
    with torch.device("meta"):
        return T5EncoderModel(T5Config(**T5_XXL))


def text_encoder_bytes(model: T5EncoderModel) -> dict[str, float]:
    """Return the bytes of the weights by format, as stored by transformers and bitsandbytes.

    In float16, `wo` stays in float32 and is not quantized. The other linear layers are quantized to one byte per
    weight and a float32 per row, or to half a byte and a float32 per 64 weights. The rest is in float16.
    """
    kept = [*get_keys_to_not_convert(model), *model._keep_in_fp32_modules]
    total = count(model)
    wide = sum(module.weight.numel() for name, module in model.named_modules() if name.endswith(".wo"))
    linear = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part in kept for part in (name, name.split(".")[-1]))
    ]
    quantized = sum(weight.numel() for weight in linear)
    rest = 2 * (total - wide - quantized) + 4 * wide
    return {
        "float32": 4 * total,
        "bfloat16": 2 * total,
        "float16": 2 * (total - wide) + 4 * wide,
        "8-bit": rest + quantized + 4 * sum(weight.shape[0] for weight in linear),
        "4-bit": rest + quantized / 2 + 4 * quantized / 64,
    }


# ---- calls


@dataclass
class Life:
    """Bytes of a tensor's memory, and the first and the last operation that use it."""

    size: int
    first: int
    last: int


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live; what was there before is free."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = self.operations = 0
        self.known: dict[int, tuple[weakref.finalize, Life]] = {}  # by storage address
        self.lives: list[Life] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        for tensor in _tensors((args, kwargs)):
            self.see(tensor.untyped_storage(), made=False)
        results = func(*args, **(kwargs or {}))
        for tensor in _tensors(results):
            self.see(tensor.untyped_storage(), made=True)
        return results

    def see(self, storage: torch.UntypedStorage, made: bool) -> None:
        if id(storage) in self.known:
            self.known[id(storage)][1].last = self.operations
            return
        size = storage.nbytes() if made else 0
        life = Life(size, self.operations, self.operations)
        self.known[id(storage)] = weakref.finalize(storage, self.drop, id(storage), size), life
        self.lives.append(life)
        self.held += size
        self.peak = max(self.peak, self.held)

    def drop(self, key: int, size: int) -> None:
        del self.known[key]
        self.held -= size

    @property
    def needed(self) -> int:
        """The peak if every tensor were free after the last operation that uses it."""
        changes: Counter[int] = Counter()
        for life in self.lives:
            changes[life.first] += life.size
            changes[life.last + 1] -= life.size
        return max(accumulate(changes[operation] for operation in range(self.operations + 1)))


def _tensors(values) -> Iterator[torch.Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))


class Call:
    """Guided call for one image, with the text encoded in advance; of a network without text a call for one image."""

    def __init__(
        self, config: dict, dtype: torch.dtype, network_class: type[ConditionalUNet] = ImagenUNetModel
    ) -> None:
        standard = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # tensors without data cannot be cast in place
        try:
            self.unet = network_class(**config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(standard)
        side = config["sample_size"]
        self.branches = 1 if self.unet.text_width is None else 2
        self.sample = torch.randn(self.branches, 3, side, side, dtype=dtype)
        self.options = {"low_res_sample": self.sample} if self.unet.takes_low_res else {}
        if self.unet.takes_low_res_noise_level:
            self.options["low_res_timestep"] = torch.full((self.branches,), 250.0)
        self.timestep, self.text = torch.full((self.branches,), 500.0), None

    def encode(self) -> None:
        if self.unet.text_width is not None:
            embeds = torch.randn(self.branches, TOKENS, self.unet.text_width, dtype=self.sample.dtype)
            self.text = self.unet.encode_text(embeds)

    def __call__(self) -> torch.Tensor:
        output = self.unet(self.sample, self.timestep, self.text, **self.options).sample
        if self.branches == 1:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + 7 * (conditional - unconditional)


@torch.no_grad()
def count_call(config: dict, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of the result of `encode_text`, kept for all steps, and the additional peak of a call."""
    with FakeTensorMode():
        call = Call(config, dtype)
        with LiveMemory() as text:
            call.encode()
        with LiveMemory() as memory:
            call()
    return text.held, memory.peak


@torch.no_grad()
def profile_call(config: dict, dtype: torch.dtype) -> int:
    """Return the peak of a call in the CPU's allocator, in bytes."""
    call = Call(config, dtype)
    call.encode()
    return round(peak_memory(call, torch.device("cpu")) * 2**20)


@contextmanager
def table(*headings: str) -> Iterator:
    """Print rows of a Markdown table, followed by an empty line."""
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    yield lambda *cells: print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print()


def in_gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def in_mib(size: float) -> str:
    return f"{size / 2**20:.0f}"


def print_tables() -> None:
    encoder = make_text_encoder()
    text = text_encoder_bytes(encoder)
    parameters = {}
    with table("weights, GiB", "parameters", *text) as row:
        row("T5-XXL's encoder", f"{count(encoder):,}", *map(in_gib, text.values()))
        for network in NETWORKS:
            with torch.device("meta"):
                parameters[network.name] = size = count(ImagenUNetModel(**network.config))
            halves = [in_gib(size * width) for width in (4, 2, 2)]
            row(f"{network.name}, {network.widths} {network.source}", f"{size:,}", *halves, "–", "–")

    calls = {}
    with table("a guided call, batch 1, MiB", "pixels", "float32", "float16", "text encoded, float16") as row:
        for network in NETWORKS:
            wide, (held, peak) = (count_call(network.config, dtype) for dtype in (torch.float32, torch.float16))
            calls[network.name] = held + peak
            row(network.name, network.config["sample_size"], *map(in_mib, (wide[1], peak, held)))

    together = [2 * sum(parameters[n] for n in names) + max(calls[n] for n in names) for names in CASCADES]
    alone = [max(2 * parameters[n] + calls[n] for n in names) for names in CASCADES]
    with table("peak by recipe, float16, GiB", "T5-XXL", *(f"{i}, {ii}" for i, ii in CASCADES)) as row:
        for name, size in text.items():
            if name in ("float16", "8-bit", "4-bit"):
                row("everything on the GPU", name, *(in_gib(size + networks) for networks in together))
        for recipe, networks in (("text first, then both networks", together), ("offload by stage", alone)):
            row(recipe, "float16", *(in_gib(max(text["float16"], size)) for size in networks))
            row(f"{recipe}: once the text is encoded", "–", *map(in_gib, networks))


def print_check(name: str) -> None:
    """Print the counted peak of a network and the allocator's."""
    config = next(network for network in NETWORKS if network.name == name).config
    with table(f"a guided call of {name}, MiB", "counted", "CPU allocator") as row:
        for dtype in (torch.float32, torch.bfloat16):
            row(
                str(dtype).removeprefix("torch."),
                *(f"{size / 2**20:.1f}" for size in (count_call(config, dtype)[1], profile_call(config, dtype))),
            )


def quantizations() -> dict[str, Callable[[], dict]]:
    """Return the arguments of `from_pretrained` for each way to load a text encoder."""

    def torchao() -> TorchAoConfig:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())

    eight, four = {"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    half = {"dtype": torch.bfloat16}
    return {
        "float32": lambda: {},
        "bfloat16": lambda: half,
        "bitsandbytes, 8 bits": lambda: {"quantization_config": BitsAndBytesConfig(**eight)},
        "bitsandbytes, 8 bits, bfloat16": lambda: {"quantization_config": BitsAndBytesConfig(**eight), **half},
        "bitsandbytes, 4 bits (nf4)": lambda: {"quantization_config": BitsAndBytesConfig(**four)},
        "torchao, int8 weights": lambda: {"quantization_config": torchao()},
        "torchao, int8 weights, bfloat16": lambda: {"quantization_config": torchao(), **half},
    }


@torch.no_grad()
def print_quantized() -> None:
    """Print the memory of a text encoder's weights as it is loaded, and the error of its embeddings."""
    torch.manual_seed(0)
    tokens = torch.randint(T5_SMALLER["vocab_size"], (2, TOKENS))
    expected = None
    with (
        TemporaryDirectory() as folder,
        table("text encoder", "weights, MiB", "share", "error of the embeddings") as row,
    ):
        T5EncoderModel(T5Config(**T5_SMALLER)).save_pretrained(folder)
        for name, arguments in quantizations().items():
            try:
                model = T5EncoderModel.from_pretrained(folder, **arguments())
            except ImportError as error:
                row(name, "–", "–", str(error).splitlines()[0])
                continue
            embeds = model(tokens).last_hidden_state.float()
            size = sum(map(memory_of, [*model.parameters(), *model.buffers()]))
            if expected is None:
                expected, whole = embeds, size
            error = (embeds - expected).norm() / expected.norm()
            row(name, f"{size / 2**20:.1f}", f"{size / whole:.2f}", f"{error:.1%}")


@torch.no_grad()
def print_presets(names: list[str]) -> None:
    """Print the weights of presets, the counted peak of a guided call in float32, and what it needs at least."""
    headings = (
        "a guided call, batch 1, float32, MiB",
        "weights",
        "peak",
        "needed",
        "(weights + peak) / (weights + needed)",
    )
    with table(*headings) as row:
        for name in names:
            preset = PRESETS[name]
            with FakeTensorMode():
                call = Call(preset.config, torch.float32, preset.network_class)
                call.encode()
                with LiveMemory() as memory:
                    call()
            weights = 4 * preset.num_parameters
            ratio = (weights + memory.peak) / (weights + memory.needed)
            row(name, *map(in_mib, (weights, memory.peak, memory.needed)), f"{ratio:.3f}")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", choices=[network.name for network in NETWORKS], help="a network to run with data")
    parser.add_argument("--quantized", action="store_true", help="measure a text encoder in 8 and 4 bits instead")
    parser.add_argument(
        "--presets", choices=list(PRESETS), nargs="+", help="presets to count in place of IF's networks"
    )
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.presets is not None:
        print_presets(args.presets)
    elif args.quantized:
        print_quantized()
    else:
        print_tables()
        if args.check is not None:
            print_check(args.check)


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "measure_memory.py"))
