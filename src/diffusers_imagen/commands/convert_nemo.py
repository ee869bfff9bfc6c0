"""`diffusers-imagen convert-nemo`: convert NeMo's checkpoints to a stage or a cascade for `from_pretrained`."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..pipelines.stage_table import STAGES, StageKind
from ..utils.files import check_new_folder, sha256, whole_folder, write_json
from .model_arguments import DTYPES
from .parser import Parser


RECORD, VERIFICATION = "nemo_conversion.json", "nemo_verification.json"
TRAINING = (
    "Optimizer and schedule were not converted: training continues from the weights, with a new optimizer "
    "(--pretrained_model_name_or_path, and the settings of convert-config)."
)
CARD = """\
{description}
## Origin
Converted from checkpoints of NVIDIA NeMo's Imagen by diffusers-imagen. No weight was changed{cast}.

 part | checkpoint | parameters | original dtype | dtype |
|---|---|---|---|---|
{stages}

{text}{training}
"""


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Convert .nemo archives and Lightning checkpoints of NVIDIA NeMo's Imagen: one to a stage, several "
        "to a cascade. No code in them is executed, and weights are converted one by one. Every converted and "
        "omitted key is reported."
    )
    command.add_argument("base", type=Path, metavar="base.nemo", help="a stage: .nemo, its unpacked folder, or .ckpt")
    command.add_argument("--base-config", type=Path, metavar="YAML", help="its configuration, if the file has none")
    for kind in STAGES[1:]:
        resolution = f"super-resolution stage, {kind.resolution} px"
        command.add_argument(f"--{kind.name}", type=Path, metavar="sr.nemo", help=resolution)
        command.add_argument(
            f"--{kind.name}-config", type=Path, metavar="YAML", help="its configuration, if the file has none"
        )
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder to write")
    command.add_argument("--text-encoder", metavar="MODEL", help="folder or Hub id of the text encoder to include")
    command.add_argument(
        "--ema", action="store_true", help="use averaged weights, from NAME-EMA.ckpt beside NAME.ckpt"
    )
    command.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; default: as in the checkpoint")
    command.add_argument("--verify", action="store_true", help="compare every written tensor with the checkpoint")
    command.set_defaults(run=convert_nemo)


def convert_nemo(args: argparse.Namespace) -> None:
    """Write the complete folder, or none, and print a report on each checkpoint."""
    from ..conversion.nemo_archive import find_source
    from ..text.pretrained import load_tokenizer

    sources = {kind: getattr(args, kind.name) for kind in STAGES if getattr(args, kind.name) is not None}
    check_new_folder(args.output, "output")
    for kind, source in sources.items():
        find_source(source, args.ema, kind.name)
    if args.text_encoder is not None:
        load_tokenizer(args.text_encoder, 1)  # fails early if there is none, before weights are read
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(args.output) as partial:
        stages, reports = convert_stages(args, sources, partial)
        pipe = make_pipeline(args, stages, partial)
        write_about(args, pipe, reports, partial)
    for name, report in reports.items():
        print(describe_report(name, report))
    print(TRAINING)
    print(args.output)


def convert_stages(
    args: argparse.Namespace, sources: dict[StageKind, Path], folder: Path
) -> tuple[dict[StageKind, Any], dict[str, dict[str, Any]]]:
    """
    Write the networks and schedulers; return the stages without weights, and by name the report on each checkpoint.
    """
    import torch

    from ..conversion.nemo_archive import open_nemo
    from ..conversion.nemo_stage import WEIGHTS_FILE, describe_stage, verify_nemo_stage, write_nemo_stage

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    stages, reports = {}, {}
    for kind, source in sources.items():
        prefix = f"{kind.name}_" if len(sources) > 1 else ""
        place = folder / f"{prefix}unet"
        config = getattr(args, f"{kind.name}_config")
        with open_nemo(source, config, args.ema, kind.name, scratch=folder) as checkpoint:
            takes_low_res = describe_stage(checkpoint.config).unet.takes_low_res
            if len(sources) > 1 and takes_low_res != kind.takes_low_res:
                found = "super-resolution" if takes_low_res else "base"
                raise ValueError(f"`{kind.name}` is '{source}', which is a {found} stage.")
            parts, report = write_nemo_stage(checkpoint, place, dtype)
            parts.scheduler.save_pretrained(folder / f"{prefix}scheduler")
            reports[kind.name] = report._asdict()
            if args.verify:
                tensors = verify_nemo_stage(checkpoint, place, dtype)
                record = {"source": report.source, "tensors": len(tensors), "differing": 0, "written": report.written}
                digests = {WEIGHTS_FILE: sha256(place / WEIGHTS_FILE), "by_key": tensors}
                write_json(place / VERIFICATION, record | digests)
                reports[kind.name]["verified"] = len(tensors)
        stages[kind] = parts
    return stages, reports


def make_pipeline(args: argparse.Namespace, stages: dict[StageKind, Any], folder: Path) -> Any:
    """Create the pipeline of stages without weights; write its index and, if any, text encoder and tokenizer."""
    from ..conversion.nemo_stage import cascade_components
    from ..pipelines import ImagenCascadePipeline, ImagenPipeline, ImagenSuperResolutionPipeline
    from ..pipelines.stages import check_factors, check_stages
    from ..text.pretrained import load_text

    first = next(iter(stages.values()))
    text = {} if args.text_encoder is None else load_text(args.text_encoder, first.token_length)
    pipe: Any
    if len(stages) > 1:
        pipe = ImagenCascadePipeline(**text, **cascade_components({kind.name: part for kind, part in stages.items()}))
        check_factors(pipe.stages, {kind: part.scale_factor for kind, part in stages.items()})
    elif first.scale_factor is None:
        pipe = ImagenPipeline(first.unet, first.scheduler, **text, call_defaults=first.call_defaults)
    else:
        settings = {"scale_factor": first.scale_factor, "call_defaults": first.call_defaults}
        pipe = ImagenSuperResolutionPipeline(first.unet, first.scheduler, **text, **settings)
    check_stages(pipe.stages, pipe.text_width)
    for name, component in text.items():
        component.save_pretrained(folder / name)
    pipe.save_config(folder)
    return pipe


def write_about(args: argparse.Namespace, pipe: Any, reports: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write the model card, and the record of the conversion, including NeMo's configurations."""
    from ..pipelines.model_card import new_card

    rows = (
        f"| `{name}` | `{report['source']}` | {report['parameters']:,} | {', '.join(report['dtypes'])} | "
        f"{', '.join(report['written'])} |"
        for name, report in reports.items()
    )
    name = args.output.resolve().name
    without = "The text encoder is not part of this folder: pass embeddings, or compose it with a text encoder.\n\n"
    text = CARD.format(
        description=pipe.describe(name),
        cast=f", except for its dtype, which is {args.dtype}" if args.dtype else "",
        stages="\n".join(rows),
        text="" if args.text_encoder else without,
        training=TRAINING,
    )
    pipe.write_card(new_card(text), folder / "README.md")
    record = {"stages": reports, "optimizer": TRAINING}
    write_json(folder / RECORD, json.loads(json.dumps(record, default=str)))  # YAML can contain dates


def describe_report(name: str, report: dict[str, Any]) -> str:
    """Return the report on a checkpoint as text."""
    types = f"{', '.join(report['dtypes'])} to {', '.join(report['written'])}".replace("torch.", "")
    lines = [f"{name}: {report['source']}, {report['parameters']:,} parameters, {report['mapped']} keys, {types}"]
    for title, entries in (("left out on purpose", report["dropped"]), ("not converted", report["left_out"])):
        reasons: dict[str, list[str]] = {}
        for key, reason in entries.items():
            reasons.setdefault(reason, []).append(key)
        for reason, keys in reasons.items():
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            lines.append(f"{title}: {', '.join(keys[:3])}{more} ({reason})")
    if "verified" in report:
        lines.append(f"verified: {report['verified']} tensors equal those of the checkpoint, by SHA-256")
    return "\n  ".join(lines)
