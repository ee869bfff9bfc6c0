"""`diffusers-imagen convert-config`: a NeMo configuration as the settings of a training run."""

import argparse
import os
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "convert-config",
        help="translate a NeMo configuration for training",
        description="Translates the training sections of a NeMo Imagen configuration into the names of "
        "train_imagen.py --config, says by name what has no counterpart, and refuses what would train something else.",
    )
    parser.add_argument("nemo", type=Path, metavar="NEMO.yaml", help="NeMo's configuration")
    parser.add_argument("--output", type=Path, required=True, metavar="RUN.yaml", help="file to write")
    parser.add_argument(
        "--network", type=Path, metavar="FOLDER", help="also write the network that it describes, with random weights"
    )
    parser.set_defaults(run=convert_config)


def convert_config(args: argparse.Namespace) -> None:
    """Writes the settings, and says what became of the rest."""
    import yaml

    from ..conversion.nemo_training import to_be_given, translate_training

    config = read_yaml(args.nemo)
    settings, differences, left_out = translate_training(config)
    if args.network is not None:
        write_network(config["model"], args.network, settings.get("seed", 0))
        settings["pretrained_model_name_or_path"] = str(args.network)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(f".{args.output.name}.partial")
    partial.write_text(f"# from {args.nemo.name}\n" + yaml.safe_dump(settings, sort_keys=False))
    os.replace(partial, args.output)

    print(f"{args.output}: {len(settings)} settings")
    sections = {
        "Not quite the same": differences,
        "No counterpart, left out": left_out,
        "Still to be given": to_be_given(settings, args.network),
    }
    for title, lines in sections.items():
        if lines:
            print("\n  ".join([f"{title}:", *lines]))


def read_yaml(path: Path):
    """The contents of a YAML file.

    Raises:
        ValueError: If it cannot be read.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`NEMO.yaml` is '{path}', which cannot be read: {str(error).splitlines()[0]}") from error


def write_network(model_config: dict, folder: Path, seed: int) -> None:
    """Writes the network of a configuration, with random weights.

    Raises:
        ValueError: If the folder has a network.
    """
    # torch and diffusers take seconds to import; --help should not
    import torch

    from ..conversion.nemo import unet_from_nemo_config

    if (folder / "unet").exists():
        raise ValueError(f"`network` is '{folder}', which has a network: name another folder.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        unet = unet_from_nemo_config(model_config)
    unet.save_pretrained(folder / "unet")
