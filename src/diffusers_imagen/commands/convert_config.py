"""`diffusers-imagen convert-config`: convert a NeMo configuration to settings of a training run."""

import argparse
import os
from pathlib import Path

from ..utils.files import check_writable, whole_folder, write_text
from .parser import Parser


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Translate the training sections of a NeMo Imagen configuration to the settings of the training commands' "
        "--config, list settings without a counterpart, and reject those that would change the training."
    )
    command.add_argument("nemo", type=Path, metavar="NEMO.yaml", help="NeMo's configuration file")
    command.add_argument("--output", type=Path, required=True, metavar="RUN.yaml", help="file to write")
    command.add_argument(
        "--network", type=Path, metavar="FOLDER", help="also write the configured network, with random weights"
    )
    command.set_defaults(run=convert_config)


def convert_config(args: argparse.Namespace) -> None:
    """
    Write the settings, and the network if requested, either both or none; print differences and missing settings.
    """
    import yaml

    from ..conversion.nemo_training import to_be_given, translate_training
    from ..utils.yaml import read_yaml

    check_outputs(args)
    config = read_yaml(args.nemo, "NEMO.yaml", number_keys=True)
    settings, differences, left_out = translate_training(config)
    if args.network is not None:
        settings["pretrained_model_name_or_path"] = str(args.network)
    text = f"# from {args.nemo.name}\n" + yaml.safe_dump(settings, sort_keys=False)
    if args.network is None:
        write_settings(args.output, text)
    else:
        unet = make_network(config["model"], settings.get("seed", 0))
        with whole_folder(args.network / "unet") as partial:
            unet.save_pretrained(partial)
            write_settings(args.output, text)

    print(f"{args.output}: {len(settings)} settings")
    sections = {
        "Differences": differences,
        "No counterpart, left out": left_out,
        "Still required": to_be_given(settings, args.network),
    }
    for title, lines in sections.items():
        if lines:
            print("\n  ".join([f"{title}:", *lines]))


def check_outputs(args: argparse.Namespace) -> None:
    """Raise ValueError for outputs that cannot be written, or that would overwrite each other or the input."""
    check_writable(args.output, "output")
    output = args.output.resolve()
    if output == args.nemo.resolve():
        raise ValueError(f"`output` is '{args.output}', which is the configuration to translate: choose another file.")
    if args.network is None:
        return
    if (args.network / "unet").exists():
        raise ValueError(f"`network` is '{args.network}', which already has a network: choose another folder.")
    check_writable(args.network / "unet", "network")
    network = args.network.resolve()
    if output in (network, *network.parents) or output.is_relative_to(network / "unet"):
        raise ValueError(f"`network` is '{args.network}', but `output` '{args.output}' would overwrite it.")


def write_settings(path: Path, text: str) -> None:
    """Write the settings to a file, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def make_network(model_config: dict, seed: int):
    """
    Create the network of a configuration with random weights; raise ValueError if it exceeds the machine's memory.
    """
    # torch and diffusers take seconds to import; --help should not
    import torch

    from ..conversion.nemo import unet_from_nemo_config

    try:
        with torch.device("meta"):
            size = unet_from_nemo_config(model_config).num_parameters()
    except (TypeError, KeyError, AttributeError, ArithmeticError, IndexError, RuntimeError) as error:
        raise ValueError(f"`model.unet` is not a valid network: {type(error).__name__}: {error}") from error
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * size > memory:
        raise ValueError(
            f"`model.unet` has {size:,} parameters, which do not fit into the {memory / 2**30:.0f} GiB of this "
            "machine's memory."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return unet_from_nemo_config(model_config)
