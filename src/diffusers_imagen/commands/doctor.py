"""`diffusers-imagen doctor`: find problems of a data set, a stage, a cascade, or an embedding cache."""

import argparse
import re
from pathlib import Path

from ..utils.arguments import bad_argument
from ..utils.shipped import find_source
from .parser import Parser


HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Check a data set, a stage, a cascade or an embedding cache, and list problems. "
        "The exit code is 1 if there are any."
    )
    command.add_argument(
        "path",
        help="folder of a data set, a stage, a cascade or an embedding cache, a Hub data set, or imagen-emoji, the "
        "shipped cascade",
    )
    command.add_argument("--resolution", type=int, default=64, help="training resolution; default: %(default)s")
    command.add_argument(
        "--sigma-data", type=float, default=0.5, help="configured standard deviation; default: %(default)s"
    )
    command.add_argument("--text-encoder", help="count tokens with its tokenizer, or compare widths with it")
    command.add_argument(
        "--tokenizer-max-length", type=int, help="maximum tokens per caption; default: the tokenizer's limit"
    )
    command.add_argument("--image-column", default="image", help="column with images; default: %(default)s")
    command.add_argument("--caption-column", nargs="+", default=["text"], help="columns with captions; default: text")
    command.add_argument("--split", default="train", help="split of the data set; default: %(default)s")
    command.add_argument("--num-images", type=int, default=1000, help="images to open; default: %(default)s")
    command.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> int:
    """Print the findings; return 1 if there are problems."""
    # torch and transformers take seconds to import; --help should not
    from ..training.settings import COUNT, check_value
    from . import diagnostics as examine

    for name, kind in (("resolution", int), ("sigma_data", float), ("tokenizer_max_length", int)):
        if getattr(args, name) is not None:
            check_value(name, getattr(args, name), kind)
    if not COUNT.has(args.num_images):
        raise bad_argument("num_images", args.num_images, str(COUNT))
    args.path = str(find_source(args.path))
    if args.text_encoder is not None:
        args.text_encoder = str(find_source(args.text_encoder))
    path = Path(args.path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`path` is '{path}', a file, but should be a folder or a Hub data set.")
    if not path.is_dir() and not HUB_ID.fullmatch(args.path):
        raise ValueError(f"`path` is '{path}', which is neither a folder nor a Hub id like 'name/repository'.")
    if (path / "manifest.json").exists() or (path / "layout.json").exists():
        findings = examine.examine_cache(path)
    elif path.is_dir() and examine.find_networks(path):
        findings = examine.examine_stage(path, args.text_encoder)
    else:
        from ..training.data.data_config import DataConfig

        config = DataConfig(
            train_data_dir=args.path if path.is_dir() else None,
            dataset_name=None if path.is_dir() else args.path,
            image_column=args.image_column,
            caption_column=args.caption_column,
            train_split=args.split,
            resolution=args.resolution,
            tokenizer_max_length=args.tokenizer_max_length,
        )
        findings = examine.examine_data(config, args.sigma_data, args.text_encoder, args.num_images)
    for finding in findings:
        print(f"{'WRONG' if finding.wrong else 'ok   '}  {finding.text}")
    return int(any(finding.wrong for finding in findings))
