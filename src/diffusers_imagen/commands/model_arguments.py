"""The model of a command: a cascade, or stages that are composed; its samplers, and where it computes."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .. import pipelines, schedulers
from ..pipelines.stage_table import AS_BASE, AS_STAGES, AS_UPSCALER, STAGES, most_steps
from ..utils.shipped import find_source, shipped_cascade
from .parser import Default, Parser


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..pipelines import ImagenCascadePipeline, ImagenSuperResolutionPipeline

UPSCALERS = tuple(kind.name for kind in STAGES if kind.takes_low_res)
CASCADE = "ImagenCascadePipeline"
DTYPES = ("float32", "bfloat16", "float16")
SCHEDULERS = {"adams": "EDMAdamsScheduler", "heun": "EDMHeunScheduler"}
UPSCALER_FLAGS = [f"--{name}" for name in UPSCALERS]
ADVICE = {  # where to give a stage, in the words of the command line
    AS_UPSCALER: f"give it as {' or '.join(UPSCALER_FLAGS)}",
    AS_BASE: "give it as --model",
    AS_STAGES: f"give a base stage as --model, and super-resolution stages as {' and '.join(UPSCALER_FLAGS)}",
}


def find_device() -> str:
    """Return the device that there is."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


DEVICE = Default("cuda if there is one, else cpu", find_device)


def add_model_arguments(command: Parser, sweeps: bool = False) -> None:
    """Which model, where and in which precision.

    Args:
        command (`Parser`): What they are added to.
        sweeps (`bool`): Whether the command compares models' settings: it takes the model without a flag, and several
            schedulers.
    """
    add_stage_arguments(
        command,
        "folder or Hub id of a cascade, or of a base stage, such as DeepFloyd/IF-I-M-v1.0; default: the shipped cascade",
        model="model" if sweeps else "--model",
    )
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default: %(default)s")
    default = "model"
    command.add_argument(
        "--scheduler",
        choices=("model", *SCHEDULERS),
        nargs="+" if sweeps else None,
        default=[default] if sweeps else default,
        help=f"sampler of every stage: the one that was saved, or one that needs fewer steps; default: {default}",
    )
    command.add_argument("--device", default=DEVICE, help="default: %(default)s")
    command.add_argument(
        "--offload",
        choices=("model", "sequential"),
        help="keep in CPU memory what does not run: whole models, or layers, which takes least memory and most time",
    )


def add_stage_arguments(command: Parser, model_help: str, or_none: str = "", model: str = "--model") -> None:
    """Which stages and which text encoder, and which of their files; `model` is the argument of the base stage."""
    command.add_argument(model, nargs=None if model.startswith("-") else "?", help=model_help)
    for kind in STAGES:
        if kind.takes_low_res:
            command.add_argument(
                f"--{kind.name}",
                help=f"folder or Hub id of the stage to {kind.resolution} px, where the model is a stage",
            )
    command.add_argument(
        "--text-encoder",
        help=f"folder or Hub id with text_encoder/ and tokenizer/{or_none}; default: the one of the model",
    )
    command.add_argument("--variant", help="of the files of weights, such as fp16")


def check_model(args: argparse.Namespace, upscaler_alone: bool = False) -> None:
    """Refuses what can be refused of the model before anything is read: options that do not go together.

    Args:
        args: With the options of `add_model_arguments`.
        upscaler_alone: Whether an upscaler without a base stage is a model for this command.
    """
    import torch

    if args.offload is not None and torch.device(args.device).type == "cpu":
        raise ValueError(
            f"`offload` is {args.offload!r}, but `device` is {args.device!r}, where there is nothing to make room on."
        )
    check_sources(sources_of(args), upscaler_alone)


def check_sources(given: dict[str, str], upscaler_alone: bool) -> None:
    """Raises ValueError for what is no folder of a stage and no Hub id, and for upscalers without what they enlarge."""
    from ..pipelines.loading.stage_loading import check_stage_source

    if "model" not in given and len(given) > upscaler_alone:
        name = next(iter(given))
        one = ", or one such stage alone" if upscaler_alone else ""
        raise ValueError(
            f"`{name}` is {given[name]!r}, but needs the base stage whose images it enlarges: give --model{one}."
        )
    for name, source in given.items():
        check_stage_source(name, source)


def sources_of(args: argparse.Namespace) -> dict[str, str]:
    """The folders and Hub ids of the stages that were named, by option; the shipped cascade if none was.

    Raises:
        ValueError: If that is not installed.
    """
    given = {name: getattr(args, name) for name in ("model", *UPSCALERS) if getattr(args, name) is not None}
    return {name: str(find_source(source)) for name, source in given.items()} or {"model": str(shipped_cascade())}


def load_pipeline(args: argparse.Namespace) -> "ImagenCascadePipeline | ImagenSuperResolutionPipeline":
    """The model that the options name, with their samplers, where they say; after `check_model`.

    Raises:
        ValueError: If there is none, or one that was never trained, or its stages do not fit together.
    """
    pipe = load_model(args)
    if pipe.text_source is None and any(stage.reads_text for stage in pipe.stages):
        raise ValueError("The model reads prompts, but has no text encoder: give --text-encoder.")
    return place(pipe, args)


def load_model(args: argparse.Namespace) -> "ImagenCascadePipeline | ImagenSuperResolutionPipeline":
    """The model in CPU memory, as it was saved."""
    from ..pipelines.loading.folders import load_text_parts

    given, options = sources_of(args), load_options(args)
    if is_cascade(given):
        if "text_encoder" in options:
            options |= load_text_parts(options.pop("text_encoder"), **options)
        return load_cascade(given["model"], **options)
    if "model" not in given:
        return open_stage(*next(iter(given.items())), options)
    return compose_stages(given, options)


def open_stage(name: str, source: str, options: dict[str, Any]) -> Any:
    """The stage that the option `name` gives, as the pipeline of it alone."""
    pipeline_class = pipelines.ImagenPipeline if name == "model" else pipelines.ImagenSuperResolutionPipeline
    with naming("source", name):
        return pipeline_class.from_stage(source, **options)


def compose_stages(given: dict[str, str], options: dict[str, Any]) -> "ImagenCascadePipeline":
    """The cascade of the stages that the options give, by name."""
    upscalers = {name: source for name, source in given.items() if name != "model"}
    with naming("base", "model"):
        return pipelines.ImagenCascadePipeline.from_stages(given["model"], **upscalers, **options)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What loading is told beside the stages."""
    import torch

    options = {"dtype": getattr(torch, args.dtype), "variant": args.variant}
    return options if args.text_encoder is None else {**options, "text_encoder": find_source(args.text_encoder)}


def load_cascade(model: str, **options: Any) -> "ImagenCascadePipeline":
    """A cascade from a folder or from the Hub; ValueError if there is none, or one that was never trained."""
    from ..pipelines.loading.folders import check_source, load_pipeline_folder, loading
    from ..pipelines.stages import check_stages, refuse_untrained

    check_source("model", model)
    with loading("model", model):
        pipe = load_pipeline_folder(pipelines.ImagenCascadePipeline, model, (CASCADE,), **options)
        check_stages(pipe.stages, pipe.text_width)
    refuse_untrained(pipe.stages)
    return pipe


def is_cascade(given: dict[str, str]) -> bool:
    """Whether the model is a whole cascade and no base stage; one small file is read, or downloaded.

    Raises:
        ValueError: For stages beside a cascade.
    """
    if "model" not in given or class_of("model", given["model"]) != CASCADE:
        return False
    for name in given.keys() - {"model"}:
        raise ValueError(
            f"`{name}` is '{given[name]}', but `model` '{given['model']}' is a whole cascade: give its base stage as --model."
        )
    return True


def class_of(name: str, source: str) -> str | None:
    """The class that the `model_index.json` of a folder or repository names; None for a stage that has none."""
    from ..pipelines.loading.folder_checks import INDEX, read_config
    from ..pipelines.loading.folders import download_index, loading

    with loading(name, source):
        if os.path.isdir(source):
            path = os.path.join(source, INDEX)
            return read_config(path).get("_class_name") if os.path.exists(path) else None
        try:
            return read_config(download_index(source, {})).get("_class_name")
        except LocalEntryNotFoundError:  # offline, and not in the cache
            raise
        except EntryNotFoundError:
            return None


@contextmanager
def naming(argument: str, option: str) -> Iterator[None]:
    """Inside, a ValueError about an argument of Python is one about the option that it came from."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for advice, own in ADVICE.items():
            message = message.replace(advice, own)
        if message.startswith(f"`{argument}` "):
            message = f"`{option}`" + message.removeprefix(f"`{argument}`")
        raise ValueError(message) from error


def place(pipe: "DiffusionPipeline", args: argparse.Namespace) -> Any:
    """The pipeline with the schedulers that were asked for, on the device."""
    if args.scheduler != "model":
        use_scheduler(pipe, args.scheduler)
    if args.offload == "model":
        pipe.enable_model_cpu_offload(device=args.device)
    elif args.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=args.device)
    else:
        pipe.to(args.device)
    return pipe


def use_scheduler(pipe: "DiffusionPipeline", name: str) -> None:
    """Replaces each stage's scheduler by one of this name for the same network, and default steps by as many as it needs.

    Raises:
        ValueError: If the configuration of a scheduler has a meaning that the other one does not know.
    """
    from ..pipelines.loading.folders import loading

    by_stage, is_cascade = {}, isinstance(pipe, pipelines.ImagenCascadePipeline)
    for stage in pipe.stages:
        component = stage.kind.scheduler if is_cascade else "scheduler"
        with loading("scheduler", name):
            setattr(pipe, component, getattr(schedulers, SCHEDULERS[name]).from_config(stage.scheduler.config))
        steps = min(stage.defaults.num_inference_steps, most_steps(name, not stage.is_base))
        by_stage[stage.name] = {**stage.defaults._asdict(), "num_inference_steps": steps}
    pipe.register_to_config(call_defaults=by_stage if is_cascade else by_stage[stage.name])
