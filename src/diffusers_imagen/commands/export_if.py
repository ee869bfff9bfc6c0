"""`diffusers-imagen export-if`: export a stage of DeepFloyd IF to diffusers' format."""

import argparse
from typing import TYPE_CHECKING

from .. import conversion
from ..utils.files import check_new_folder, whole_folder
from .convert_if import add_output_argument, copy_licenses, report
from .model_arguments import CASCADE, DTYPES, refuse_adapter
from .parser import Parser


if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD = """\
# {name}

A stage of DeepFloyd IF for `{class_name}` of diffusers, written by [diffusers-imagen]({package}).
"""


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Write a stage of DeepFloyd IF in this package's format, possibly fine-tuned, as the folder of an "
        "IFPipeline or IFSuperResolutionPipeline of diffusers."
    )
    command.add_argument("model", help="folder or Hub id of the stage, or of a cascade with the stage")
    command.add_argument("--stage", help="stage of a cascade: base or sr256")
    command.add_argument("--variant", help="variant of the weight files to read and write, such as fp16")
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the weights; default: %(default)s"
    )
    add_output_argument(command)
    command.set_defaults(run=export_if)


def export_if(args: argparse.Namespace) -> None:
    """Write the complete folder, or none, and print its content."""
    import torch
    from diffusers import DiffusionPipeline

    from ..pipelines.loading.folders import SINGLE_STAGES, check_source, load_pipeline_folder, loading
    from ..pipelines.origin import list_origins

    check_new_folder(args.output, "output")
    check_source("model", args.model)
    refuse_adapter("model", args.model)
    with loading("model", args.model):
        pipe = load_pipeline_folder(
            DiffusionPipeline,
            args.model,
            (CASCADE, *SINGLE_STAGES),
            dtype=getattr(torch, args.dtype),
            variant=args.variant,
        )
    theirs = conversion.pipeline_to_deepfloyd(pipe, args.stage)
    origin = pipe.config.origin or {}
    card = make_card(args.output.resolve().name, type(theirs).__name__, list_origins(origin.get(args.stage, origin)))
    with whole_folder(args.output) as partial:
        licenses = copy_licenses({"model": args.model}, partial)
        card.save(partial / "README.md")
        theirs.save_pretrained(partial, variant=args.variant)
    report(args.output, theirs, licenses)


def make_card(name: str, class_name: str, origins: list[dict[str, str]]) -> "ModelCard":
    """Create a card with the license that copies and derivatives must include."""
    from ..pipelines.model_card import PACKAGE, add_license, new_card

    card = new_card(CARD.format(name=name, class_name=class_name, package=PACKAGE))
    add_license(card, origins)
    return card
