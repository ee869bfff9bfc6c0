"""`diffusers-imagen evaluate`: compute FID, KID, CLIP score and other metrics of a model, over several settings."""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import evaluation
from ..evaluation.choices import CLIP, DISTANCES, METRICS, NAMED, OF_FEATURES
from ..utils.bounds import MAX_STEPS
from ..utils.files import check_folder
from ..utils.shipped import NAME
from .common import MAX_GUIDANCE, MAX_SEED, MAX_SIZE, check_device
from .generate import read_lines
from .model_arguments import add_model_arguments, check_model, load_model, place, use_scheduler
from .parser import Parser, check_prompt


if TYPE_CHECKING:
    from accelerate import PartialState

    from ..evaluation import PictureSet, Setting
    from ..pipelines import ImagenCascadePipeline
    from .evaluated_data import DataPictures

MOST = 10_000_000  # images


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Generate an image for each caption and compare the images with real ones; write report.html and "
        "results.json. An interrupted evaluation continues when it is started again. With several GPUs: accelerate "
        "launch -m diffusers_imagen evaluate ..."
    )
    add_model_arguments(command, sweeps=True)
    add_data_arguments(command)
    command.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=["fid", "kid"],
        help="metrics to compute; default: fid kid, which need --reference",
    )
    command.add_argument(
        "--features",
        default="inception",
        help=f"features for distances: {', '.join(NAMED)}, or the folder of an image encoder; default: %(default)s",
    )
    command.add_argument("--clip-model", default=CLIP, help="model for the metric clip; default: %(default)s")
    sweep = (
        "for all stages, or per stage with commas, such as 30,20; several are compared; default: that of each stage"
    )
    command.add_argument(
        "--steps",
        type=by_stage("steps", int, 1, MAX_STEPS),
        nargs="+",
        metavar="N",
        help=f"numbers of steps {sweep}",
    )
    command.add_argument(
        "--guidance-scale",
        type=by_stage("guidance-scale", float, 0, MAX_GUIDANCE),
        nargs="+",
        metavar="W",
        help=f"guidance scales {sweep}",
    )
    command.add_number("--resolution", int, 1, MAX_SIZE, help="resolution of the last stage to run")
    command.add_number("--seed", int, 0, MAX_SEED, default=0, help="seed of all noise; default: %(default)s")
    command.add_number("--batch-size", int, 1, 1024, default=16, help="images per batch; default: %(default)s")
    command.add_number(
        "--resamples", int, 0, 1000, default=5, help="bootstrap samples for the deviation of FID; default: %(default)s"
    )
    command.add_argument("--output-dir", type=Path, required=True, help="folder for images, features and the report")
    command.set_defaults(run=evaluate)


def add_data_arguments(command: Parser) -> None:
    """Add options for the captions and the reference images."""
    command.add_argument(
        "--captions", required=True, help="a text file with one caption per line, or a data set: a folder or Hub id"
    )
    command.add_argument("--captions-split", default="train", help="split of the captions; default: %(default)s")
    command.add_argument("--caption-column", default="text", help="column with captions; default: %(default)s")
    command.add_argument("--reference", help="real images: a folder of images, or a data set")
    command.add_argument("--reference-split", default="train", help="split of the reference; default: %(default)s")
    command.add_argument("--image-column", default="image", help="column with images; default: %(default)s")
    command.add_argument(
        "--styles", nargs="+", help="use only rows of captions and reference whose `style` is one of these"
    )
    command.add_number("--num-images", int, 2, MOST, help="number of captions, chosen at random; default: all")
    command.add_number(
        "--num-reference", int, 2, MOST, help="number of reference images, chosen at random; default: all"
    )


def by_stage(name: str, kind: type, lowest: float, highest: float) -> Callable[[str], tuple]:
    """Return a parser of numbers separated by commas, as the `type` of an argument."""

    def read(text: str) -> tuple:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"`{name}` is {text!r}, but should be numbers, such as 30,20") from None
        if not all(lowest <= value <= highest for value in values):
            raise argparse.ArgumentTypeError(f"`{name}` is {text!r}, but should be from {lowest:,} to {highest:,}")
        return values

    return read


def evaluate(args: argparse.Namespace) -> None:
    """Generate the images, compute the metrics and write the report."""
    from ..utils.processes import shared_work

    check_arguments(args)
    with shared_work(args.device) as (state, args.device):
        run(args, state)
        if state.is_main_process:
            print(args.output_dir / "report.html")


def run(args: argparse.Namespace, state: "PartialState") -> None:
    """Load data and model, generate the images and compute the metrics; called by all processes."""
    from ..utils.processes import shared_folder

    captions, reference = open_captions(args), open_reference(args)
    indices = evaluation.choose("num-images", len(captions), args.num_images, args.seed)
    real = (
        [] if reference is None else evaluation.choose("num-reference", len(reference), args.num_reference, args.seed)
    )
    features, clip = load_networks(args, state)
    pipe = load_model(args)
    model = evaluation.drawing.digest_networks(pipe)  # before it is placed, which can remove readable weights
    use = scheduler_switch(pipe, args)
    settings, resolutions = list_settings(pipe, args, use)
    whole = evaluation.Evaluation(
        captions=captions,
        indices=indices,
        settings=settings,
        resolutions=resolutions,
        folder=args.output_dir,
        metrics=tuple(args.metrics),
        reference=reference,
        reference_indices=real,
        network=features,
        clip=clip,
        seed=args.seed,
        batch_size=args.batch_size,
        resamples=args.resamples,
        source=args.model or NAME,
        model=model,
    )
    with shared_folder(state, args.output_dir, "output-dir"):
        whole.run(pipe, use, state)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for arguments that can be rejected before anything is read."""
    check_folder(args.output_dir, "output-dir")
    check_device(args.device)
    check_model(args)
    evaluation.evaluator.check_installed(args.metrics)
    needs_reference = [metric for metric in args.metrics if metric in (*DISTANCES, "nearest")]
    if needs_reference and args.reference is None:
        raise ValueError(f"`metrics` has {needs_reference[0]!r}, which needs real images: set --reference.")
    if args.num_reference is not None and args.reference is None:
        raise ValueError(f"`num-reference` is {args.num_reference}, but there is no `reference`.")


def load_networks(args: argparse.Namespace, state: "PartialState") -> tuple[Any, Any]:
    """Load the network for features and the one that compares images with captions, if a metric needs them."""
    from ..utils.processes import in_turn

    networks = evaluation.feature_networks
    features = clip = None
    if set(args.metrics) & set(OF_FEATURES):
        features = in_turn(state, lambda: networks.load_features(args.features, args.device))
    if "clip" in args.metrics:
        clip = in_turn(state, lambda: networks.load_clip(args.clip_model, args.device))
    return features, clip


def open_captions(args: argparse.Namespace) -> "PictureSet":
    """Open the captions: lines of a file, or rows of a data set."""
    if not Path(args.captions).is_file():
        return open_data(args, "captions", with_text=True)
    lines = [line.strip() for line in read_lines("captions", Path(args.captions)) if line.strip()]
    if not lines:
        raise ValueError(f"`captions` is '{args.captions}', which has no captions.")
    for line in lines:
        check_prompt("captions", line)
    return evaluation.CaptionList(lines, Path(args.captions).name)


def open_reference(args: argparse.Namespace) -> "PictureSet | None":
    """Open the real images, if any."""
    return None if args.reference is None else open_data(args, "reference", with_text=False)


def open_data(args: argparse.Namespace, name: str, with_text: bool) -> "DataPictures":
    """Open the rows of a data set; raise ValueError if there is none."""
    from .evaluated_data import DataPictures

    source, split = getattr(args, name), getattr(args, f"{name}_split")
    return DataPictures(
        name, source, split, args.image_column, args.styles, args.caption_column if with_text else None
    )


def scheduler_switch(pipe: "ImagenCascadePipeline", args: argparse.Namespace) -> Callable[[str], None]:
    """
    Place the model on its device; return a function that sets the samplers of its stages, by name or the saved ones.
    """
    own = {stage.kind.scheduler: stage.scheduler for stage in pipe.stages}
    defaults = pipe.config.call_defaults
    place(pipe, argparse.Namespace(**{**vars(args), "scheduler": "model"}))

    def use(name: str) -> None:
        for component, scheduler in own.items():
            setattr(pipe, component, scheduler)
        pipe.register_to_config(call_defaults=defaults)
        if name != "model":
            use_scheduler(pipe, name)

    return use


def list_settings(
    pipe: "ImagenCascadePipeline", args: argparse.Namespace, use: Callable[[str], None]
) -> "tuple[list[Setting], list[int]]":
    """
    Return all combinations of schedulers, steps and guidance, with a value for each stage, and the stages'
    resolutions.
    """
    settings = []
    for scheduler in dict.fromkeys(args.scheduler):
        use(scheduler)
        stages = pipe.stages_up_to(args.resolution)
        steps = [tuple(stage.defaults.num_inference_steps for stage in stages)]
        guidance = [tuple(float(stage.defaults.guidance_scale) for stage in stages)]
        if args.steps is not None:
            steps = [for_stages("steps", values, len(stages)) for values in args.steps]
        if args.guidance_scale is not None:
            guidance = [for_stages("guidance-scale", values, len(stages)) for values in args.guidance_scale]
        settings += [evaluation.Setting(scheduler, *values) for values in itertools.product(steps, guidance)]
    return list(dict.fromkeys(settings)), [stage.resolution for stage in stages]


def for_stages(name: str, values: tuple, count: int) -> tuple:
    """Return one value per stage."""
    if len(values) not in (1, count):
        raise ValueError(
            f"`{name}` is {','.join(map(str, values))}, but should have one value, or {count}, one per stage."
        )
    return values * count if len(values) == 1 else values
