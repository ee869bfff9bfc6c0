"""`diffusers-imagen convert-if`: convert DeepFloyd IF to this package's format."""

import argparse
import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from ..utils.files import check_new_folder, whole_folder
from .model_arguments import (
    DTYPES,
    UPSCALERS,
    add_stage_arguments,
    check_sources,
    class_of,
    compose_stages,
    load_options,
    open_stage,
    sources_of,
)
from .parser import Parser


LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")  # files of a repository that are copied with its weights
NONE = "none"


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Write repositories or folders of DeepFloyd IF as one cascade, or one of them as a single stage: for "
        "--model of other commands, for from_pretrained, and for further training. All weights of the result are "
        "loaded at once. For repositories that require a login, run `hf auth login` first."
    )
    add_stage_arguments(command, "folder or Hub id of the base stage, such as DeepFloyd/IF-I-M-v1.0", ", or none")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the written weights; default: float16 with --variant fp16, else float32",
    )
    add_output_argument(command)
    command.set_defaults(run=convert_if)


def add_output_argument(command: Parser) -> None:
    """Add the option for the output folder."""
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new or empty folder to write")


def convert_if(args: argparse.Namespace) -> None:
    """Write the complete folder, or none, and print its content."""
    from ..pipelines.model_card import new_card

    if args.model is None and all(getattr(args, name) is None for name in UPSCALERS):
        raise ValueError("`model` is not given: pass the base stage, or a single super-resolution stage as --sr256.")
    check_new_folder(args.output, "output")
    given = sources_of(args)
    check_sources(given, upscaler_alone=True)
    check_if(given)
    args.dtype = args.dtype or ("float16" if args.variant == "fp16" else "float32")
    pipe = read_stages(args, given)
    print(f"writing {args.output} ...", flush=True)
    with whole_folder(args.output) as partial:
        licenses = copy_licenses(given, partial)
        pipe.write_card(new_card(pipe.describe(args.output.resolve().name)), partial / "README.md")
        pipe.save_pretrained(partial)
    report(args.output, pipe, licenses)


def check_if(given: dict[str, str]) -> None:
    """Raise ValueError for a source that is not a stage of DeepFloyd IF."""
    from ..pipelines.loading.deepfloyd_repository import is_deepfloyd

    for name, source in given.items():
        found = class_of(name, source)
        if not is_deepfloyd(found):
            raise ValueError(
                f"`{name}` is '{source}', of class {found}, but should be of class IFPipeline or "
                "IFSuperResolutionPipeline."
            )


def read_stages(args: argparse.Namespace, given: dict[str, str]):
    """Load the stages as a pipeline of this package: a single stage, or a cascade."""
    options = load_options(args)
    if options.get("text_encoder") == NONE:
        options |= {"text_encoder": None, "tokenizer": None}
    print(f"reading {', '.join(given.values())} ...", flush=True)
    return compose_stages(given, options) if len(given) > 1 else open_stage(*next(iter(given.items())), options)


def copy_licenses(given: dict[str, str], folder: Path) -> list[str]:
    """Copy the license files of the weights; files with the same name and different content are all kept.

    Returns:
        Their names.
    """
    names = []
    for stage, source in given.items():
        is_local = os.path.isdir(source)
        origin = Path(source if is_local else snapshot_download(source, allow_patterns=list(LICENSE_FILES)))
        for path in sorted(path for pattern in LICENSE_FILES for path in origin.glob(pattern) if path.is_file()):
            target = folder / path.name
            if target.exists() and target.read_bytes() != path.read_bytes():
                target = folder / f"{path.stem}-{stage}{path.suffix}"
            shutil.copyfile(path, target)
            names.append(target.name)
    return sorted(set(names))


def report(folder: Path, pipe, licenses: list[str]) -> None:
    """Print the content and size of the written folder."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {type(pipe).__name__}, {size / 2**30:.2f} GiB")
    parts = {name: part for name, part in pipe.components.items() if hasattr(part, "num_parameters")}
    for name, part in parts.items():
        print(f"  {name:<16}{type(part).__name__:<28}{part.num_parameters() / 1e6:>10,.1f} M parameters  {part.dtype}")
    if licenses:
        print(f"  with {', '.join(licenses)}")
