"""`diffusers-imagen export-nemo`: export a stage to an archive of NVIDIA NeMo."""

import argparse
from pathlib import Path
from typing import Any

from ..pipelines.stage_table import STAGES
from ..utils.files import check_writable, read_json_object
from .convert_nemo import RECORD
from .model_arguments import refuse_adapter
from .parser import Parser


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Write the network of a stage folder, or of one stage of a cascade, as a .nemo archive, with NeMo's names, "
        "its configuration, and unchanged weights. Stages without a counterpart in NeMo are rejected."
    )
    command.add_argument("folder", type=Path, help="folder of a stage or a cascade")
    names = [kind.name for kind in STAGES]
    command.add_argument("--stage", choices=names, default=names[0], help="stage of a cascade; default: %(default)s")
    command.add_argument("--output", type=Path, required=True, metavar="base.nemo", help="file to write")
    command.set_defaults(run=export_nemo)


def export_nemo(args: argparse.Namespace) -> None:
    """Write the archive."""
    from ..conversion.nemo_export import export_nemo, nemo_config

    check_writable(args.output, "output")
    refuse_adapter("folder", args.folder)
    prefix = f"{args.stage}_" if (args.folder / f"{args.stage}_unet").is_dir() else ""
    if not (args.folder / f"{prefix}unet").is_dir():
        raise ValueError(f"`folder` is '{args.folder}', which has neither unet/ nor {args.stage}_unet/.")
    unet, weights = read_network(args.folder / f"{prefix}unet")
    scheduler = read_scheduler(args.folder / f"{prefix}scheduler")
    recorded = read_record(args.folder, args.stage)
    config = nemo_config(unet, scheduler, read_token_length(args.folder), recorded)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    count = export_nemo(unet, weights, config, args.output)
    print(f"{args.output}: {unet.num_parameters():,} parameters, {count} tensors")


def read_network(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the network of a folder without weights, and its weights as a memory map."""
    from safetensors import safe_open

    from ..models import EfficientUNetModel, ImagenUNetModel
    from ..pipelines.loading.folder_checks import check_component, describe_network, read_config

    config = read_config(folder / "config.json")
    unet = describe_network(config)
    if not isinstance(unet, (ImagenUNetModel, EfficientUNetModel)):
        raise ValueError(f"'{folder}' has a {type(unet).__name__}, which NeMo does not support.")
    check_component(folder.parent, folder.name, type(unet))
    weights: dict[str, Any] = {}
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}
    missing = [name for name in unet.state_dict() if name not in weights]
    if missing:
        raise ValueError(f"'{folder}' has no safetensors file with {missing[0]}.")
    return unet, weights


def read_scheduler(folder: Path) -> Any:
    """Load the scheduler of a folder."""
    from ..pipelines.loading.folder_checks import CONFIGS, configured_class, read_config

    config = read_config(folder / CONFIGS["scheduler"])
    return configured_class("scheduler", config).from_config(config)


def read_record(folder: Path, stage: str) -> dict[str, Any] | None:
    """Read the NeMo configuration that a stage was converted from, if any."""
    path = folder / RECORD
    if not path.is_file():
        return None
    stages = read_json_object(path).get("stages")
    report = stages.get(stage, next(iter(stages.values()), None)) if isinstance(stages, dict) else None
    config = report.get("config") if isinstance(report, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' has no configuration of the stage `{stage}`.")
    return config


def read_token_length(folder: Path) -> int | None:
    """Read the maximum number of tokens, if the folder has a tokenizer with a limit."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    limit = read_json_object(path).get("model_max_length") if path.is_file() else None
    return limit if type(limit) is int and limit < 2**20 else None
