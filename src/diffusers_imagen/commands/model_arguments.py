"""Options for the model of a command: a cascade or composed stages, their samplers, and the device."""

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
ADVICE = {  # advice of error messages, as command line options
    AS_UPSCALER: f"pass it as {' or '.join(UPSCALER_FLAGS)}",
    AS_BASE: "pass it as --model",
    AS_STAGES: f"pass a base stage as --model, and super-resolution stages as {' and '.join(UPSCALER_FLAGS)}",
}


def find_device() -> str:
    """Return the available device."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


DEVICE = Default("cuda if available, else cpu", find_device)


def add_model_arguments(command: Parser, sweeps: bool = False) -> None:
    """Add options for the model, its device and its dtype.

    Args:
        command (`Parser`): Parser that the options are added to.
        sweeps (`bool`): Whether the command compares settings: the model is then a positional argument, and several
            schedulers are accepted.
    """
    add_stage_arguments(
        command,
        "folder or Hub id of a cascade, or of a base stage, such as DeepFloyd/IF-I-M-v1.0; default: the shipped "
        "cascade",
        model="model" if sweeps else "--model",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the weights; default: %(default)s"
    )
    default = "model"
    command.add_argument(
        "--scheduler",
        choices=("model", *SCHEDULERS),
        nargs="+" if sweeps else None,
        default=[default] if sweeps else default,
        help=f"sampler of every stage: the saved one, or one that needs fewer steps; default: {default}",
    )
    command.add_argument("--device", default=DEVICE, help="device of the model; default: %(default)s")
    command.add_argument(
        "--offload",
        choices=("model", "sequential"),
        help="keep idle models or layers in CPU memory: sequential (layers) needs the least memory and the most time",
    )


def add_stage_arguments(command: Parser, model_help: str, or_none: str = "", model: str = "--model") -> None:
    """
    Add options for the stages, the text encoder, and the variant of their files; `model` names the base stage's
    argument.
    """
    command.add_argument(model, nargs=None if model.startswith("-") else "?", help=model_help)
    for kind in STAGES:
        if kind.takes_low_res:
            command.add_argument(
                f"--{kind.name}",
                help=f"folder or Hub id of the stage to {kind.resolution} px, if the model is a stage",
            )
    command.add_argument(
        "--text-encoder",
        help=f"folder or Hub id with text_encoder/ and tokenizer/{or_none}; default: that of the model",
    )
    command.add_argument("--variant", help="variant of the weight files, such as fp16")


def check_model(args: argparse.Namespace, upscaler_alone: bool = False) -> None:
    """Raise ValueError for options of the model that are invalid or incompatible, before anything is read.

    Args:
        args: Namespace with the options of `add_model_arguments`.
        upscaler_alone: Whether the command accepts a super-resolution stage without a base stage.
    """
    import torch

    if args.offload is not None and torch.device(args.device).type == "cpu":
        raise ValueError(
            f"`offload` is {args.offload!r}, but `device` is {args.device!r}, from which nothing can be offloaded."
        )
    check_sources(sources_of(args), upscaler_alone)


def check_sources(given: dict[str, str], upscaler_alone: bool) -> None:
    """
    Raise ValueError for invalid folders or Hub ids of stages, and for super-resolution stages without a base stage.
    """
    from ..pipelines.loading.stage_loading import check_stage_source

    if "model" not in given and len(given) > upscaler_alone:
        name = next(iter(given))
        one = ", or only one such stage" if upscaler_alone else ""
        raise ValueError(
            f"`{name}` is {given[name]!r}, but needs the base stage whose images it upscales: pass --model{one}."
        )
    for name, source in given.items():
        check_stage_source(name, source)


def sources_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the folders and Hub ids of the stages, by option; those of the shipped cascade if none is given.

    Raises:
        ValueError: If the shipped cascade is not installed.
    """
    given = {name: getattr(args, name) for name in ("model", *UPSCALERS) if getattr(args, name) is not None}
    return {name: str(find_source(source)) for name, source in given.items()} or {"model": str(shipped_cascade())}


def load_pipeline(args: argparse.Namespace) -> "ImagenCascadePipeline | ImagenSuperResolutionPipeline":
    """Load the model of the options, with the requested samplers; `check_model` must be called before.

    Raises:
        ValueError: If there is none, it is untrained, or its stages do not fit together.
    """
    pipe = load_model(args)
    if pipe.text_source is None and any(stage.reads_text for stage in pipe.stages):
        raise ValueError("The model is conditioned on text, but has no text encoder: pass --text-encoder.")
    return place(pipe, args)


def load_model(args: argparse.Namespace) -> "ImagenCascadePipeline | ImagenSuperResolutionPipeline":
    """Load the model to CPU memory, as saved."""
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
    """Open the stage of the option `name` as a single-stage pipeline."""
    pipeline_class = pipelines.ImagenPipeline if name == "model" else pipelines.ImagenSuperResolutionPipeline
    with naming("source", name):
        return pipeline_class.from_stage(source, **options)


def compose_stages(given: dict[str, str], options: dict[str, Any]) -> "ImagenCascadePipeline":
    """Compose a cascade from the stages of the options."""
    upscalers = {name: source for name, source in given.items() if name != "model"}
    with naming("base", "model"):
        return pipelines.ImagenCascadePipeline.from_stages(given["model"], **upscalers, **options)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `from_pretrained`."""
    import torch

    options = {"dtype": getattr(torch, args.dtype), "variant": args.variant}
    return options if args.text_encoder is None else {**options, "text_encoder": find_source(args.text_encoder)}


def load_cascade(model: str, **options: Any) -> "ImagenCascadePipeline":
    """Load a cascade from a folder or the Hub; raise ValueError if there is none, or it is untrained."""
    from ..pipelines.loading.folders import check_source, load_pipeline_folder, loading
    from ..pipelines.stages import check_stages, refuse_untrained

    check_source("model", model)
    with loading("model", model):
        pipe = load_pipeline_folder(pipelines.ImagenCascadePipeline, model, (CASCADE,), **options)
        check_stages(pipe.stages, pipe.text_width)
    refuse_untrained(pipe.stages)
    return pipe


def is_cascade(given: dict[str, str]) -> bool:
    """Return whether the model is a cascade and not a base stage; reads or downloads one small file.

    Raises:
        ValueError: For other stages in addition to a cascade.
    """
    if "model" not in given or class_of("model", given["model"]) != CASCADE:
        return False
    for name in given.keys() - {"model"}:
        raise ValueError(
            f"`{name}` is '{given[name]}', but `model` '{given['model']}' is a whole cascade: pass its base stage as "
            "--model."
        )
    return True


def refuse_adapter(name: str, folder: str | os.PathLike) -> None:
    """Raise ValueError for the folder of a LoRA adapter, which lacks the weights of its network."""
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    if os.path.isfile(os.path.join(folder, LORA_WEIGHT_NAME_SAFE)):
        raise ValueError(
            f"`{name}` is '{folder}', the folder of a LoRA adapter: merge it into its network first, by `fuse_lora()`, "
            "`unload_lora_weights()` and `save_pretrained` of a pipeline."
        )


def class_of(name: str, source: str) -> str | None:
    """Return the class in the `model_index.json` of a folder or repository; None for a stage without the file."""
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
    """Context manager that renames a Python argument in the message of a ValueError to the command line option."""
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
    """Set the requested schedulers, and move the pipeline to the device."""
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
    """
    Replace each stage's scheduler by one of this name for the same network, and limit default steps to what it needs.

    Raises:
        ValueError: If the scheduler does not support an entry of the configuration.
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
