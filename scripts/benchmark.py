#!/usr/bin/env python
"""Benchmark networks, pipelines and training side by side, against other implementations and the device's own rate.

    python scripts/benchmark.py --presets emoji_base_64 --what step training --batch_size 1 4

Systems take turns within one run, so that a ratio compares times of the same minutes. Times are medians with quartiles;
the first call, which builds and compiles, is apart. Inputs and weights are random, from fixed seeds; nothing is
downloaded. A system that fails is listed with its error; what did not fit into `--minutes` or the memory is listed too.

What is measured:
- step: a prediction with guidance; training: forward and backward pass of one batch.
- stage, cascade: a call of a pipeline, from text embeddings to images.
- loop: a step of the training loop beside a bare one with its optimizer, and the rate of its data.
- normalization: group normalization, forward and backward; decoding: JPEG files to images of a batch.
- data: everything from the files of a data set to the batch that goes to the device, in one process without workers.
"""

import argparse
import ast
import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmark_contenders import MEMORY_FORMATS
from benchmark_kernels import decoding_groups, normalization_groups
from benchmark_measures import Budget, Case, Group, Meter, Row, matrix_rate, to_markdown
from benchmark_pipelines import CASCADES, sampling_group, size_of
from benchmark_plot import draw_plot
from benchmark_unet import COMPILE, NAMES, SYSTEMS, Networks, usable_backends
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import logging

from diffusers_imagen.commands.common import check_device
from diffusers_imagen.commands.parser import Parser, check_numbers
from diffusers_imagen.models.presets import PRESETS
from diffusers_imagen.utils.errors import run_to_exit_code
from diffusers_imagen.utils.files import check_folder, write_json, write_text


WHAT = ("step", "training", "stage", "cascade", "loop", "normalization", "decoding", "data")
METHODS = {"step": "predict", "training": "train"}


@dataclass
class Settings:
    """Settings of the benchmark's parts; see the command's options."""

    device: torch.device
    dtype: torch.dtype
    systems: Sequence[str] = SYSTEMS
    compile: Sequence[str] = COMPILE
    memory_formats: Sequence[str] = ("channels_last",)
    attention_backends: Sequence[str] = ()
    tokens: int = 128
    steps: Sequence[int] = (30, 20)
    overrides: dict[str, Any] = field(default_factory=dict)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=["step", "training"])
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=["all", *NAMES],
        default=["emoji_base_64"],
        help="all: the package's, and IF-I-M",
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--compile", nargs="+", choices=COMPILE, default=list(COMPILE), help="how `compiled` is compiled"
    )
    parser.add_argument(
        "--attention_backends",
        nargs="*",
        choices=["all", *(backend.value for backend in AttentionBackendName)],
        default=[],
        help="backends of diffusers that are measured beside the default; all: those that can be used here",
    )
    parser.add_argument("--memory_formats", nargs="+", choices=list(MEMORY_FORMATS), default=["channels_last"])
    parser.add_number("--batch_size", int, 1, 4096, nargs="+", default=[1])
    parser.add_number("--tokens", int, 3, 4096, default=128, help="text tokens; default: %(default)s")
    parser.add_number("--steps", int, 1, 1000, nargs=2, default=[30, 20], help="of bases, and of super-resolution")
    parser.add_number("--repeats", int, 1, 10**6, default=15, help="measured rounds; default: %(default)s")
    parser.add_number("--minutes", float, 0, 10**6, default=10.0, help="for the whole run; default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--override", nargs="+", default=[], metavar="NAME=VALUE", help="entries of the presets' configuration"
    )
    parser.add_argument(
        "--cpu_time", action="store_true", help="measure CPU time instead of wall-clock time, on a shared CPU"
    )
    parser.add_argument("--output_dir", type=Path, help="folder for benchmark.json, .md and .png")
    args = parser.parse_args(arguments)
    check_numbers(args)
    check_device(args.device)
    if args.cpu_time and torch.device(args.device).type != "cpu":
        raise ValueError(
            f"`cpu_time` is given with `device` {args.device!r}, which runs asynchronously: CPU time does not measure it."
        )
    if args.output_dir is not None:
        check_folder(args.output_dir, "output_dir")
    return args


def make_settings(args: argparse.Namespace) -> Settings:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    backends = args.attention_backends
    return Settings(
        device,
        dtype,
        args.systems,
        args.compile,
        args.memory_formats,
        usable_backends(device, dtype) if "all" in backends else backends,
        args.tokens,
        args.steps,
        read_overrides(args.override),
    )


def read_overrides(entries: Sequence[str]) -> dict[str, Any]:
    """Read entries NAME=VALUE, where the value is a Python literal."""
    overrides = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        try:
            overrides[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"`override` is {entry!r}, but should be a name and a literal: layers_per_block=1."
            ) from error
    return overrides


def make_groups(args: argparse.Namespace, settings: Settings) -> list[Group]:
    """Return the settings of the options."""
    presets = [*PRESETS, "IF-I-M"] if "all" in args.presets else list(dict.fromkeys(args.presets))
    groups = []
    for batch_size in args.batch_size:
        for what in dict.fromkeys(args.what):
            if what in METHODS:
                groups += [network_group(what, preset, settings, batch_size) for preset in presets]
            elif what == "stage":
                groups += [sampling_group(what, preset, (preset,), settings, batch_size) for preset in presets]
            elif what == "cascade":
                chosen = {name: parts for name, parts in CASCADES.items() if set(parts) <= set(presets)}
                groups += [sampling_group(what, *cascade, settings, batch_size) for cascade in chosen.items()]
            elif what == "loop":
                from benchmark_training import loop_group  # needs `datasets`

                groups += [loop_group(preset, settings, batch_size) for preset in presets]
    if "normalization" in args.what:
        groups += normalization_groups(settings)
    if "decoding" in args.what:
        groups += decoding_groups()
    if "data" in args.what:
        from benchmark_data import data_groups  # needs `datasets`

        groups += data_groups()
    return groups


def network_group(what: str, preset: str, settings: Settings, batch_size: int) -> Group:
    """Return the group of predictions or training steps of a preset."""
    networks = Networks(preset, settings, batch_size)
    method = METHODS[what]
    weights = size_of(networks) * (2 if method == "train" else 1)

    def cases() -> list[Case]:  # the networks live as long as the cases
        return Networks(preset, settings, batch_size).cases(method)

    return Group(what, preset, batch_size, cases, networks.count(method), weights)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return a description of the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": name,
        "threads": torch.get_num_threads(),
        "load_average": load,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Report:
    """Rows of a run, written to the folder as they come, so that a run that is ended early leaves its results.

    Args:
        folder (`Path`, *optional*): Folder of benchmark.json and benchmark.md, created with the first row.
        command (`str`): The command line.
        machine (`dict`): Description of the machine, with `matrix_tflop_per_s` and `dtype`.
    """

    def __init__(self, folder: Path | None, command: str, machine: dict[str, Any]):
        self.folder, self.command, self.machine = folder, command, machine
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Add a row, print it to the standard error, and write the files."""
        found = row.error or row.left_out or f"{row.ms:.4g} ms"
        print(f"{row.what}, {row.preset}, batch {row.batch_size}, {row.system}: {found}", file=sys.stderr, flush=True)
        self.rows.append(row)
        if self.folder is not None:
            self.write()

    def text(self) -> str:
        machine = self.machine
        return (
            f"`{self.command}` on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
            f"{machine['date']}, {machine['clock']} time; matrix products in {machine['dtype']} run at "
            f"{machine['matrix_tflop_per_s']:.4g} TFLOP/s.\n\n{to_markdown(self.rows)}"
        )

    def write(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"command": self.command, "machine": self.machine, "rows": [asdict(row) for row in self.rows]}
        write_json(self.folder / "benchmark.json", record)
        write_text(self.folder / "benchmark.md", self.text())


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    logging.set_verbosity_error()
    settings = make_settings(args)
    budget = Budget(60 * args.minutes)
    torch.manual_seed(0)
    clock = time.process_time if args.cpu_time else time.perf_counter
    rate = matrix_rate(settings.device, settings.dtype, clock=clock)
    command = " ".join(["python scripts/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)])
    machine = {**describe_machine(settings.device), "dtype": args.dtype, "clock": "CPU" if args.cpu_time else "wall"}
    report = Report(args.output_dir, command, {**machine, "matrix_tflop_per_s": rate / 1e12})
    Meter(settings.device, rate, args.repeats, clock).run(make_groups(args, settings), budget, report.add)
    print(report.text(), end="")
    if args.output_dir is not None:
        report.write()
        draw_plot(args.output_dir / "benchmark.png", report.rows)


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "benchmark.py"))
