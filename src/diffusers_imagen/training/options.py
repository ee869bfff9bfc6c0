"""Options of a training script: command line flags, and a YAML file with the same names."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from transformers import HfArgumentParser

from ..utils.flags import BothSpellings
from ..utils.yaml import read_yaml
from .config import TrainingConfig
from .settings import check_unused, hints_of


Config = TypeVar("Config", bound=TrainingConfig)


# flags of diffusers' training scripts that are not supported here, with the reason or the alternative
OFFSET = (
    "noise is independent in each pixel, as in sampling; for brightness, which high noise levels determine, increase "
    "--p_mean"
)
ELSEWHERE = {
    "noise_offset": OFFSET,
    "offset_noise": OFFSET,
    "input_perturbation": "--noise_conditioning_augmentation is the noise in training that networks are conditioned on",
    "validation_prompt": "--validation_prompts accepts one or several",
    "validation_scheduler": "samples use the scheduler that is exported with the stage",
    "enable_xformers_memory_efficient_attention": "--attention_backend selects the attention backend",
    "local_rank": "`accelerate launch` numbers the processes",
    "set_grads_to_none": "gradients are always set to None",
    "lr_power": "--lr_scheduler polynomial has the power 1",
    "tracker_project_name": "the project name is always diffusers-imagen",
    "train_text_encoder": "the text encoder is frozen, as in Imagen",
    "tokenizer_name": "the tokenizer is that of --text_encoder",
    "text_encoder_use_attention_mask": "the text encoder always gets its attention mask",
    "pre_compute_text_embeddings": "captions are encoded once if they fit into memory, or use --embedding_cache",
    "skip_save_text_encoder": "the text encoder is saved by reference, without its weights",
    "class_labels_conditioning": "conditioning is part of the network's configuration",
    "prior_generation_precision": "class images are generated in --mixed_precision",
    "proportion_empty_prompts": "--text_drop_rate is the rate of dropped captions",
    "dream_training": "--preconditioning, --prediction_type and --loss_weighting select the objective",
    "non_ema_revision": "a stage has one set of weights, whose commit --revision selects",
}


def refuse_elsewhere(names: Iterable[str], where: str) -> None:
    """Raise ValueError for the first name that is a flag only of diffusers' scripts, with the alternative."""
    for name in names:
        if name in ELSEWHERE:
            raise ValueError(
                f"`{name}`{where} is an option of diffusers' scripts, but not supported here: {ELSEWHERE[name]}."
            )


class OneLineErrors(BothSpellings):
    """Parser that raises ValueError instead of printing all options and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options.")


class OptionParser(OneLineErrors, HfArgumentParser):
    """Parser with the fields of a dataclass as options."""

    def add_argument(self, *names: Any, place: str | None = None, **kwargs: Any) -> argparse.Action:
        """Add an argument, ignoring `place` of `arg`: HfArgumentParser passes all metadata of a field."""
        return super().add_argument(*names, **kwargs)


def parse_args(
    argv: list[str] | None = None,
    description: str | None = None,
    config_class: type[Config] = TrainingConfig,  # type: ignore[assignment]  # mypy does not support such defaults
    program: str | None = None,
) -> Config:
    """Parse the configuration of a run from the command line; flags take precedence over `--config FILE.yaml`.

    Args:
        argv (`list[str]`, *optional*): The arguments; those of the process if None.
        description (`str`, *optional*): First lines of `--help`.
        config_class (`type`, defaults to `TrainingConfig`): Configuration whose fields are the options.
        program (`str`, *optional*): Name of the program in `--help`; by default the file of the process.

    Raises:
        ValueError: If the file cannot be read, a name is not an option, or a value is invalid.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = {flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in argv if flag.startswith("--")}
    refuse_elsewhere(flags, "")
    file = OneLineErrors(add_help=False, allow_abbrev=False)
    file.add_argument("--config")
    given, rest = file.parse_known_args(argv)

    # HfArgumentParser accepts a dataclass, its base class does not
    options = {"prog": program, "description": description, "allow_abbrev": False}
    parser = OptionParser(config_class, **options)  # type: ignore[arg-type]
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="File with the same names; flags take precedence over it."
    )
    if given.config is not None:
        parser.set_defaults(**read_settings(given.config, config_class))
    namespace = parser.parse_args(rest)
    config = config_class(**{f.name: getattr(namespace, f.name) for f in fields(config_class)})
    check_unused(config, flags)  # a file may list every setting
    return config


def read_settings(path: str, config_class: type[TrainingConfig] = TrainingConfig) -> dict[str, Any]:
    """Read the entries of a YAML file, except null entries, which keep the default.

    Raises:
        ValueError: If it does not consist of names and values, or has names that are not options.
    """
    entries = read_yaml(path, "config")
    if not isinstance(entries, dict):
        raise ValueError(f"`config` is '{path}', but should have a line `name: value` for each option.")
    known = {f.name for f in fields(config_class)}
    refuse_elsewhere((name for name in entries if name not in known), f" in '{path}'")
    unknown = sorted(entries.keys() - known)
    if unknown:
        raise ValueError(f"`config` '{path}' has {unknown}, which are not options; --help lists the options.")
    hints = hints_of(config_class)
    return {name: read_value(value, hints[name]) for name, value in entries.items() if value is not None}


def read_value(value: Any, hint: Any) -> Any:
    """Convert an entry for its option: a single value to a list, and numbers that YAML reads as strings (1e-4).

    Other types are left to the check of types, and a single string to argparse.
    """
    kinds = [kind for part in (hint, *get_args(hint)) if get_origin(part) is list for kind in get_args(part)]
    if not kinds:
        return value
    entries = value if isinstance(value, list) else [value]
    try:
        return [float(entry) if float in kinds and isinstance(entry, str) else entry for entry in entries]
    except ValueError:
        return entries
