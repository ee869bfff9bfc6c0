"""`diffusers-imagen reconstruct-ema`: compute averages of any width from the snapshots of a finished run."""

import argparse
from pathlib import Path

from .parser import Parser


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Compute the averaged weights of a run for other widths, from the snapshots of a run with --ema_type power, "
        "and write a stage folder for each width."
    )
    command.add_argument("folder", metavar="run", type=Path, help="output folder of the run")
    command.add_argument(
        "--ema-std", type=float, nargs="+", required=True, help="widths as fractions of the run, such as 0.03 0.12"
    )
    command.add_argument("--step", type=int, help="compute averages up to this step; default: the last snapshot")
    command.add_argument(
        "--output-dir", type=Path, help="folder to write, for one width; default: ema-WIDTH inside the run"
    )
    command.set_defaults(run=reconstruct_ema)


def reconstruct_ema(args: argparse.Namespace) -> None:
    """Write a stage folder for each width."""
    # torch and diffusers take seconds to import; --help should not
    from ..training.ema.reconstruction import write_reconstructed

    if args.output_dir is not None and len(args.ema_std) > 1:
        raise ValueError(f"`output_dir` is given, but there are {len(args.ema_std)} widths: leave it out.")
    outputs = {std: args.output_dir or args.folder / f"ema-{std:g}" for std in args.ema_std}
    for std, error in write_reconstructed(args.folder, outputs, args.step).items():
        print(f"{outputs[std]}: width {std:g}, relative error of the profile {error:.4f}")
